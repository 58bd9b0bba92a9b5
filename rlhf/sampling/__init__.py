"""Response sampling, shared by SFT, PPO, GRPO, evaluation and the pre-flight checks. It works without a trainer."""

from rlhf.sampling.decoding import position_limit
from rlhf.sampling.params import SamplingParams
from rlhf.sampling.rollout import Rollout
from rlhf.sampling.sampler import LocalSampler, Sampler

__all__ = ["LocalSampler", "Rollout", "Sampler", "SamplingParams", "position_limit"]
