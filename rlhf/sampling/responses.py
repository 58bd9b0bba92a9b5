"""Responses in the making: one decoding step after the other, for ``sample`` and ``stream`` alike."""

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import ConfigError, UserError
from rlhf.sampling.decoding import INVALID_TOKEN, DecodingBatch, draw_tokens
from rlhf.sampling.params import SamplingParams


class Decoding:
    """The responses to a batch of prompts, which each step continues by one token.

    Args:
        lm: Causal language model in eval mode.
        prompts: Token ids of each prompt, at least one per prompt.
        params: Sampling settings.
        stop_ids: Ids of the tokens that end a response.
        vocab_size: Number of token ids that may be drawn.
        interval: Number of steps after which finished responses leave the batch.
        generator: Random state of the draws, on the device of the model. None: the global random state of torch.

    Raises:
        ConfigError: The model has too few positions for the prompts and ``max_new_tokens``.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        stop_ids: Collection[int],
        vocab_size: int,
        interval: int,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_positions(lm, max(map(len, prompts)) + params.max_new_tokens)
        self.params, self.stop_ids, self.vocab_size, self.interval = params, set(stop_ids), vocab_size, interval
        self.generator = generator
        self.batch = DecodingBatch(lm, prompts)
        self.ends = torch.tensor([*stop_ids, INVALID_TOKEN], device=lm.device)
        self.unfinished = torch.arange(len(prompts), device=lm.device)  # index of the prompt of each row of the batch
        self.finished = torch.zeros(len(prompts), dtype=torch.bool, device=lm.device)
        self.drawn = torch.zeros(len(prompts), params.max_new_tokens, dtype=torch.long, device=lm.device)
        self.steps = 0
        self.is_done = False

    def step(self) -> None:
        """Draw the next token of each response.

        ``is_done`` is True after the last step.
        """
        # 1. Compute the next-token logits: of the whole prompt first, then of one new token.
        logits = self.batch.next_logits()[:, : self.vocab_size]

        # 2. Draw one token per row. A finished row is continued until it leaves the batch.
        tokens = draw_tokens(logits, self.params, self.generator)
        self.drawn[self.unfinished, self.steps] = tokens
        self.finished |= (tokens[:, None] == self.ends).any(dim=1)
        self.steps += 1

        # 3. Remove the finished rows. Only here, the host waits for the device.
        if self.steps == self.params.max_new_tokens:
            self.is_done = True
            return
        if self.steps % self.interval == 0:
            rows = (~self.finished).cpu().nonzero()[:, 0]
            if not len(rows):
                self.is_done = True
                return
            if len(rows) < len(self.finished):
                rows = rows.to(tokens.device)
                self.batch.keep(rows)
                self.unfinished, self.finished, tokens = self.unfinished[rows], self.finished[rows], tokens[rows]

        # 4. Feed the new tokens to the next step.
        self.batch.append(tokens.clamp(min=0))

    def last_tokens(self) -> Tensor:
        """[prompts] the tokens that the last step has drawn; undefined for responses that were finished before."""
        return self.drawn[:, self.steps - 1]

    def responses(self) -> list[list[int]]:
        """Return the token ids of each response, including its stop token.

        Raises:
            UserError: The logits of a token were NaN or infinite.
        """
        return [_response(tokens, self.stop_ids) for tokens in self.drawn.tolist()]


def _response(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Return the drawn tokens up to and including the first stop token."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    if INVALID_TOKEN in tokens[:length]:
        raise invalid_logits(tokens.index(INVALID_TOKEN) + 1)
    return tokens[:length]


def invalid_logits(position: int) -> UserError:
    """Return the error for logits that are NaN or infinite.

    Args:
        position: Position in the response, from 1.
    """
    return UserError(
        f"The model's logits are NaN or infinite at token {position} of a response, so no token can be drawn. Its "
        "weights or its activations have overflowed.",
        "Look at grad_norm and train/loss before this step. Reduce stage.learning_rate, or set "
        "trainer.precision=32-true.",
    )


def _check_positions(lm: PreTrainedModel, needed: int) -> None:
    """Refuse prompts that leave too few positions for ``max_new_tokens``."""
    available = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if available is not None and needed > available:
        raise ConfigError(
            f"The longest prompt and max_new_tokens need {needed} positions together, but the model has {available}.",
            f"Set data.max_length={available} or reduce max_new_tokens.",
        )
