"""The sampler protocol, and the sampler that uses the training model itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ConfigError, UserError
from rlhf.models import gathered
from rlhf.sampling.decoding import INVALID_TOKEN, DecodingBatch, draw_tokens
from rlhf.sampling.params import SamplingParams
from rlhf.sampling.rollout import Rollout
from rlhf.schema import PositiveInt


class Sampler(Protocol):
    """Samples responses to prompts.

    Stages call ``sync`` before the first ``sample`` and after every weight update that the next responses must reflect.
    """

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use these weights and this tokenizer from now on.

        Args:
            policy: Language model whose current weights generate the responses.
            tokenizer: Tokenizer of the policy; resolves ``SamplingParams.stop_tokens``.
        """

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        """Sample one response per prompt, in the order of the prompts.

        Args:
            prompts: Token ids of each prompt, at least one per prompt.
            params: Sampling settings.
        """


class LocalSampler(Sampler):
    """Samples with the training model itself, in eval mode and with the model's own cache.

    Responses are drawn with the global random state of torch. Token ids that the tokenizer does not have, such as those
    of a padded embedding, are never drawn. As with ``top_k``, log-probs are those of the full distribution: they differ
    by the log of the total probability of the remaining ids, which is close to 0 in a trained model.

    Args:
        stop_interval: Number of decoding steps after which finished responses leave the batch. Each time, the host
            waits for the device. null: 1 on the CPU, 8 elsewhere. Responses end at their stop token in any case.
    """

    def __init__(self, *, stop_interval: PositiveInt | None = None) -> None:
        if stop_interval is not None and stop_interval < 1:
            raise ConfigError(
                f"stage.sampler.stop_interval must be at least 1 or null, got {stop_interval}.",
                "Set stage.sampler.stop_interval=8.",
            )
        self.stop_interval = stop_interval
        self.policy: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        # A reference is enough: the model is the one that is trained.
        self.policy, self.tokenizer = policy, tokenizer

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        if self.policy is None or self.tokenizer is None:
            raise RuntimeError("Call sync(policy, tokenizer) before sample().")
        stop_ids = params.stop_ids(self.tokenizer)
        vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        training = self.policy.training
        self.policy.eval()
        try:
            with gathered(self.policy), _cached_casts(self.policy.device.type):
                responses = self._decode(self.policy, list(map(list, prompts)), params, stop_ids, vocab_size)
        finally:
            self.policy.train(training)
        return Rollout.from_responses(prompts, responses, stop_ids, self.policy.device)

    def _decode(
        self,
        lm: PreTrainedModel,
        prompts: list[list[int]],
        params: SamplingParams,
        stop_ids: list[int],
        vocab_size: int,
    ) -> list[list[int]]:
        """Return the token ids of each response, including its stop token."""
        _check_positions(lm, max(map(len, prompts)) + params.max_new_tokens)
        interval = self.stop_interval or (1 if lm.device.type == "cpu" else 8)
        batch = DecodingBatch(lm, prompts)
        ends = torch.tensor([*stop_ids, INVALID_TOKEN], device=lm.device)
        unfinished = torch.arange(len(prompts), device=lm.device)  # index of the prompt of each row in `batch`
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=lm.device)
        responses = torch.zeros(len(prompts), params.max_new_tokens, dtype=torch.long, device=lm.device)
        for step in range(params.max_new_tokens):
            # 1. Compute the next-token logits: of the whole prompt first, then of one new token.
            logits = batch.next_logits()[:, :vocab_size]

            # 2. Draw one token per row. A finished row is continued until it leaves the batch.
            tokens = draw_tokens(logits, params)
            responses[unfinished, step] = tokens
            finished |= (tokens[:, None] == ends).any(dim=1)

            # 3. Remove the finished rows. Only here, the host waits for the device.
            if (step + 1) % interval == 0 and step + 1 < params.max_new_tokens:
                rows = (~finished).cpu().nonzero()[:, 0]
                if not len(rows):
                    break
                if len(rows) < len(finished):
                    rows = rows.to(lm.device)
                    batch.keep(rows)
                    unfinished, finished, tokens = unfinished[rows], finished[rows], tokens[rows]

            # 4. Feed the new tokens to the next step.
            batch.append(tokens.clamp(min=0))
        return [_response(tokens, set(stop_ids)) for tokens in responses.tolist()]


@contextmanager
def _cached_casts(device_type: str) -> Iterator[None]:
    """Let autocast cast each weight once in this context, in which weights do not change.

    Lightning switches the cache of autocast off. All weights would be cast again for every token.
    """
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        yield
        return
    try:
        with torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()  # An outer autocast context would keep the copies until its end.


def _response(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Return the drawn tokens up to and including the first stop token."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    if INVALID_TOKEN in tokens[:length]:
        raise UserError(
            f"The model's logits are NaN or infinite at token {tokens.index(INVALID_TOKEN) + 1} of a response, so no "
            "token can be drawn. Its weights or its activations have overflowed.",
            "Look at grad_norm and train/loss before this step. Reduce stage.learning_rate, or set "
            "trainer.precision=32-true.",
        )
    return tokens[:length]


def _check_positions(lm: PreTrainedModel, needed: int) -> None:
    """Refuse prompts that leave too few positions for ``max_new_tokens``."""
    available = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if available is not None and needed > available:
        raise ConfigError(
            f"The longest prompt and max_new_tokens need {needed} positions together, but the model has {available}.",
            f"Set data.max_length={available} or reduce max_new_tokens.",
        )
