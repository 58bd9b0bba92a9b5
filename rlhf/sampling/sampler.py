"""The sampler protocol, and the sampler that uses the training model itself."""

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ConfigError
from rlhf.sampling.decoding import DecodingBatch, draw_tokens
from rlhf.sampling.params import SamplingParams
from rlhf.sampling.rollout import Rollout


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

    Responses are drawn with the global random state of torch. Finished rows leave the batch, so each step computes the
    unfinished responses only.
    """

    def __init__(self) -> None:
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
        training = self.policy.training
        self.policy.eval()
        try:
            responses = _decode(self.policy, [list(prompt) for prompt in prompts], params, stop_ids)
        finally:
            self.policy.train(training)
        return Rollout.from_responses(prompts, responses, stop_ids, self.policy.device)


def _decode(
    lm: PreTrainedModel, prompts: list[list[int]], params: SamplingParams, stop_ids: list[int]
) -> list[list[int]]:
    """Return the token ids of each response, including its stop token."""
    _check_positions(lm, max(map(len, prompts)) + params.max_new_tokens)
    batch = DecodingBatch(lm, prompts)
    stops = torch.tensor(stop_ids, device=lm.device)
    unfinished = torch.arange(len(prompts), device=lm.device)  # index of the prompt of each row in `batch`
    responses = torch.zeros(len(prompts), params.max_new_tokens, dtype=torch.long, device=lm.device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=lm.device)
    for step in range(params.max_new_tokens):
        # 1. Compute the next-token logits of the unfinished rows: of the whole prompt first, then of one new token.
        logits = batch.next_logits()

        # 2. Draw one token per row and append it to the response.
        tokens = draw_tokens(logits, params)
        responses[unfinished, step] = tokens
        lengths[unfinished] += 1

        # 3. Remove the rows that have just finished.
        continues = ~torch.isin(tokens, stops)
        if not bool(continues.any()):
            break
        if not bool(continues.all()):
            rows = continues.nonzero()[:, 0]
            batch.keep(rows)
            unfinished, tokens = unfinished[rows], tokens[rows]

        # 4. Feed the new tokens to the next step.
        batch.append(tokens)
    return [row[:length].tolist() for row, length in zip(responses, lengths, strict=True)]


def _check_positions(lm: PreTrainedModel, needed: int) -> None:
    """Refuse prompts that leave too few positions for ``max_new_tokens``."""
    available = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if available is not None and needed > available:
        raise ConfigError(
            f"The longest prompt and max_new_tokens need {needed} positions together, but the model has {available}.",
            f"Set data.max_length={available} or reduce max_new_tokens.",
        )
