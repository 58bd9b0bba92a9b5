"""What is logged of a rollout and of an update; the README's table says what each number means."""

from typing import Any

import torch
from torch import Tensor

from rlhf.models import PolicyOutput
from rlhf.rl.experience import Experience, Minibatch
from rlhf.rl.kl import KLController
from rlhf.rl.objective import policy_ratio
from rlhf.rl.scores import ScoreShaping
from rlhf.sampling import repeated_ngram_fraction
from rlhf.tensors import masked_mean, masked_sum


@torch.no_grad()
def rollout_metrics(
    seen: Experience, raw: Tensor, rewards: Tensor, kl: KLController, scores: ScoreShaping
) -> dict[str, Any]:
    """Numbers of a rollout, before anything is learned from it.

    Args:
        seen: the rollout and what the models say of it.
        raw: [batch] rewards of the answers as they were given, reward units.
        rewards: [batch, time] what the tokens earn, reward units.
        kl: the price of KL at present.
        scores: with the moments of all scores so far.
    """
    rollout = seen.rollout
    kl_coef = float(kl.coef)
    charged = masked_sum(seen.kl, rollout.response_mask).mean()
    return {
        "objective/kl": seen.kl_per_sequence.mean(),
        "objective/kl_estimate": charged,
        "objective/entropy": -masked_sum(seen.logprobs, rollout.response_mask).mean(),
        "objective/scores": raw.mean(),
        "objective/scores_std": scores.std.float(),
        "objective/non_score_reward": -kl_coef * charged * (not kl.in_loss),
        "objective/rlhf_reward": rewards.sum(dim=1).mean(),
        "response/length": rollout.lengths.float().mean(),
        "response/truncated": 1 - rollout.finished.float().mean(),
        "response/repetition": repeated_ngram_fraction(rollout.response_ids()),
        "kl_coef": kl_coef,
    }


@torch.no_grad()
def update_metrics(part: Minibatch, scores: PolicyOutput, *, low: float, high: float) -> dict[str, Tensor]:
    """Numbers of one update.

    Args:
        part: what is learned from.
        scores: what the policy says of its tokens now.
        low, high: the clip ranges below and above a ratio of 1.
    """
    ratio = policy_ratio(scores.logprobs, part.old_logprobs, part.response_mask)
    change = scores.logprobs - part.old_logprobs
    clipped = (ratio < 1 - low) | (ratio > 1 + high)
    return {
        "policy/approxkl_avg": 0.5 * masked_mean(change.square(), part.response_mask),
        "policy/clipfrac_avg": masked_mean(clipped.float(), part.response_mask),
        "policy/entropy_avg": masked_mean(scores.entropy, part.response_mask),
        "policy/ratio": masked_mean(ratio, part.response_mask),
    }
