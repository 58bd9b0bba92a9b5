"""Step-by-step decoding, shared by ``sample`` and ``stream``."""

import logging
from collections.abc import Collection, Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.errors import ConfigError, UserError
from rlhf.models import is_sharded
from rlhf.models.probes import length_boundary
from rlhf.sampling.batch import DecodingBatch
from rlhf.sampling.cached_batch import CachedBatch
from rlhf.sampling.drawing import INVALID_TOKEN, draw_tokens
from rlhf.sampling.lean import AttentionBatch, LeanBatch
from rlhf.sampling.lean_layers import has_attention_decoder
from rlhf.sampling.lean_mamba import MambaBatch, has_mamba_decoder
from rlhf.sampling.params import SamplingParams
from rlhf.speed import speed_settings
from rlhf.tensors import upload

log = logging.getLogger(__name__)

REFILL = 8  # The next prompts are computed when one in this many rows is free.


class Decoding:
    """The responses to a batch of prompts, which each step continues by one token.

    Args:
        lm: Causal language model in eval mode.
        prompts: Token ids of each prompt, at least one per prompt.
        params: Sampling settings.
        stop_ids: Ids of the tokens that end a response.
        vocab_size: Number of token ids that may be drawn.
        interval: Number of steps after which finished responses leave the batch.
        max_rows: Largest number of responses that are decoded at once. The next prompts take the rows of finished
            responses. It has no effect for models without a lean decoder.
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
        max_rows: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        capacity = max(map(len, prompts)) + params.max_new_tokens
        _check_positions(lm, min(map(len, prompts)), capacity)
        self.prompts, self.params, self.stop_ids = prompts, params, set(stop_ids)
        self.vocab_size, self.interval, self.generator = vocab_size, interval, generator
        lean = lean_decoder(lm)
        max_rows = min(max_rows or len(prompts), len(prompts)) if lean else len(prompts)
        # A finished row goes on until the end of an interval.
        self.batch: DecodingBatch = lean(lm, max_rows, capacity + interval) if lean else CachedBatch(lm)
        self.ends = upload([*stop_ids, INVALID_TOKEN], lm.device)
        # Of each row: the index of its prompt, the number of drawn tokens, the last one, and whether it is finished.
        self.prompt = torch.zeros(max_rows, dtype=torch.long, device=lm.device)
        self.drawn_count, self.token = torch.zeros_like(self.prompt), torch.zeros_like(self.prompt)
        self.finished = torch.zeros(max_rows, dtype=torch.bool, device=lm.device)
        # Of each prompt: the drawn tokens. The last column is for what rows draw after their last token.
        self.drawn = torch.zeros(len(prompts), params.max_new_tokens + 1, dtype=torch.long, device=lm.device)
        self.started = 0  # number of prompts that have been computed
        self.is_ordered = True  # whether the rows are in the order of their prompts
        self.steps = 0
        self.steps_left = 0  # number of steps after which all rows are finished
        self.is_done = False

    def step(self) -> None:
        """Draw the next token of each response.

        ``is_done`` is True after the last step.
        """
        if self.steps == 0:
            self._start(range(len(self.prompt)))
        else:
            self._draw(slice(self.batch.count), self.batch.decode(self.token[: self.batch.count].clamp(min=0)))
            self.steps_left -= 1
        self.steps += 1
        # Only here, the host waits for the device.
        if self.started < len(self.prompts) or self.steps_left:
            if self.steps % self.interval == 0:
                self._release()
        else:
            self.is_done = True

    def _start(self, rows: Sequence[int]) -> None:
        """Compute the next prompts in the given rows, and draw the first token of each response."""
        numbers = range(self.started, self.started + len(rows))
        self.started = numbers.stop
        index = upload(rows, self.prompt.device)
        self.prompt[index] = upload(numbers, self.prompt.device)
        self.drawn_count[index] = 0
        self.finished[index] = False
        self._draw(index, self.batch.prefill(rows, [self.prompts[number] for number in numbers]))
        self.steps_left = self.params.max_new_tokens - 1

    def _draw(self, rows: Tensor | slice, logits: Tensor) -> None:
        """Draw a token for each of the given rows."""
        prompt, count, finished = self.prompt[rows], self.drawn_count[rows], self.finished[rows]
        # Random numbers go to responses in the order of their prompts, wherever their rows are.
        ranks = None if self.is_ordered else prompt.argsort().argsort()
        tokens = draw_tokens(logits[:, : self.vocab_size], self.params, self.generator, ranks)
        drawn = tokens.where(~finished, 0)
        self.drawn[prompt, count.clamp(max=self.params.max_new_tokens)] = drawn
        ends = (tokens[:, None] == self.ends).any(dim=1) | (count + 1 >= self.params.max_new_tokens)
        self.finished[rows] = finished | ends
        self.drawn_count[rows] = count + 1
        self.token[rows] = tokens

    def _release(self) -> None:
        """Replace finished rows by the next prompts, or remove them."""
        count = self.batch.count
        rows: list[int] = self.finished[:count].cpu().nonzero()[:, 0].tolist()
        if not rows:
            return
        waiting = len(self.prompts) - self.started
        if waiting:
            if len(rows) < min(waiting, -(-count // REFILL)):  # Several prompts at once are computed faster.
                self.batch.rewind(rows)
                return
            self.is_ordered = False
            self._start(rows[:waiting])
            rows = rows[waiting:]
        if len(rows) == count:
            self.is_done = True
        elif rows:
            order = upload(self.batch.remove(rows), self.prompt.device)
            self.is_ordered = False
            for values in (self.prompt, self.drawn_count, self.token, self.finished):
                values[: len(order)] = values[order]

    def responses(self) -> list[list[int]]:
        """Return the token ids of each response, including its stop token.

        Raises:
            UserError: The logits of a token were NaN or infinite.
        """
        return [_response(tokens, self.stop_ids) for tokens in self.drawn[:, :-1].tolist()]


def _response(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Return the drawn tokens up to and including the first stop token."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    if INVALID_TOKEN in tokens[:length]:
        raise invalid_logits(tokens.index(INVALID_TOKEN) + 1)
    return tokens[:length]


def lean_decoder(lm: PreTrainedModel) -> type[LeanBatch] | None:
    """Return the class that decodes a model without the modules of transformers.

    None: there is none, or ``speed.lean_decoding`` is off.
    """
    if not speed_settings().lean_decoding or is_sharded(lm):
        return None
    if has_attention_decoder(lm):
        return AttentionBatch
    return MambaBatch if has_mamba_decoder(lm) else None


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


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return the maximum length of prompt and response together when a model samples; None if it has no limit.

    Args:
        config: The configuration of the model.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_positions(lm: PreTrainedModel, shortest: int, needed: int) -> None:
    """Refuse prompts that leave too few positions for ``max_new_tokens``, and warn of positions that may change."""
    available = position_limit(lm.config)
    if available is not None and needed > available:
        raise ConfigError(
            f"The longest prompt and max_new_tokens need {needed} positions together, but the model has {available}.",
            f"Set data.max_length={available} or reduce max_new_tokens.",
        )
    boundary = length_boundary(lm.base_model)
    if boundary is not None and shortest <= boundary < needed:
        _warn_of_boundary(boundary)


@cache
def _warn_of_boundary(boundary: int) -> None:
    """Warn once per process."""
    log.warning(
        "The model encodes positions of sequences of more than %d tokens differently (rope_type=longrope). Log-probs "
        "of responses that cross this length differ between sampling and scoring. Set data.max_length=%d or reduce "
        "max_new_tokens.",
        boundary,
        boundary,
    )
