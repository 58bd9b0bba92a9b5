"""Response sampling, shared by SFT, PPO, GRPO, evaluation and the pre-flight checks. It works without a trainer."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf.sampling.params import SamplingParams
from rlhf.sampling.rollout import Rollout, repeated_ngram_fraction
from rlhf.sampling.sampler import LocalSampler, Sampler, _decode

__all__ = ["LocalSampler", "Rollout", "Sampler", "SamplingParams", "generate", "repeated_ngram_fraction"]


@torch.no_grad()
def generate(
    lm: PreTrainedModel, prompts: Sequence[Sequence[int]], params: SamplingParams, eos: int | Sequence[int]
) -> Rollout:
    """Sample without a sampler; deprecated: use ``LocalSampler``."""
    stop_ids = [eos] if isinstance(eos, int) else list(eos)
    training = lm.training
    lm.eval()
    try:
        responses = _decode(lm, [list(prompt) for prompt in prompts], params, stop_ids)
    finally:
        lm.train(training)
    return Rollout.from_responses(prompts, responses, stop_ids, lm.device)
