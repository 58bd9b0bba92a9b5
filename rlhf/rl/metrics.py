"""Metrics of rollouts and of updates. docs/metrics.md explains each of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.models import PolicyOutput
from rlhf.rl.experience import Experience, Minibatch
from rlhf.rl.kl import KLController
from rlhf.rl.objective import explained_variance, policy_ratio
from rlhf.rl.scores import ScoreShaping
from rlhf.tensors import masked_mean, masked_sum


@torch.no_grad()
def rollout_metrics(
    experience: Experience, raw_scores: Tensor, rewards: Tensor, kl: KLController, scores: ScoreShaping
) -> dict[str, Any]:
    """Compute the metrics of a rollout before any update.

    Args:
        experience: The evaluated rollout.
        raw_scores: [batch] scores of the responses before shaping.
        rewards: [batch, time] reward of each token.
        kl: KL penalty with its current coefficient.
        scores: Score shaping with its running moments.
    """
    rollout = experience.rollout
    kl_coef = float(kl.coef)
    kl_estimate = masked_sum(experience.kl, rollout.response_mask).mean()
    return {
        "objective/kl": experience.kl_per_sequence.mean(),
        "objective/kl_estimate": kl_estimate,
        "objective/entropy": -masked_sum(experience.logprobs, rollout.response_mask).mean(),
        "objective/scores": raw_scores.mean(),
        "objective/scores_std": scores.std.float(),
        "objective/non_score_reward": -kl_coef * kl_estimate * (not kl.in_loss),
        "objective/rlhf_reward": rewards.sum(dim=1).mean(),
        "response/length": rollout.lengths.float().mean(),
        "response/truncated": 1 - rollout.finished.float().mean(),
        "response/repetition": repeated_ngram_fraction(rollout.response_ids()),
        "kl_coef": kl_coef,
    }


def repeated_ngram_fraction(responses: Sequence[Sequence[int]], size: int = 4) -> float:
    """Fraction of n-grams that already occurred earlier in the same response.

        1 - distinct n-grams / n-grams,    both summed over the responses

    Args:
        responses: Token ids of each response.
        size: Number of tokens in an n-gram.

    Returns:
        A fraction between 0 and 1; 0 if every response is shorter than one n-gram.

    Reference: Welleck et al. 2019, section 6, seq-rep-n (arXiv:1908.04319).
    """
    ngrams = [list(zip(*(response[i:] for i in range(size)), strict=False)) for response in responses]
    return 1 - sum(len(set(own)) for own in ngrams) / max(sum(map(len, ngrams)), 1) if any(ngrams) else 0.0


def critic_metrics(experience: Experience, returns: Tensor | None) -> dict[str, Any]:
    """Compute the metrics of the critic on a rollout; none without a critic."""
    if experience.values is None or returns is None:
        return {}
    fit = explained_variance(experience.values, returns, experience.rollout.response_mask)
    return {"critic/explained_variance": fit}


@torch.no_grad()
def update_metrics(minibatch: Minibatch, output: PolicyOutput, *, low: float, high: float) -> dict[str, Tensor]:
    """Compute the metrics of one policy update.

    Args:
        minibatch: The minibatch of the update.
        output: Output of the current policy on it.
        low: Clip range below a ratio of 1.
        high: Clip range above a ratio of 1.
    """
    ratio = policy_ratio(output.logprobs, minibatch.old_logprobs, minibatch.response_mask)
    change = output.logprobs - minibatch.old_logprobs
    clipped = (ratio < 1 - low) | (ratio > 1 + high)
    return {
        "policy/approxkl_avg": 0.5 * masked_mean(change.square(), minibatch.response_mask),
        "policy/clipfrac_avg": masked_mean(clipped.float(), minibatch.response_mask),
        "policy/entropy_avg": masked_mean(output.entropy, minibatch.response_mask),
        "policy/ratio": masked_mean(ratio, minibatch.response_mask),
    }


class IterationMetrics:
    """Collects the metrics of a rollout and of its updates, which are logged together.

    Attributes:
        rollout: Metrics of the current rollout.
        updates: Values of each update metric since the last ``summarize``.
    """

    def __init__(self) -> None:
        self.rollout: Mapping[str, Any] = {}
        self.updates: dict[str, list[Tensor]] = defaultdict(list)

    def add_update(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add metrics of one update."""
        for name, value in metrics.items():
            self.updates[name].append(torch.as_tensor(value).detach())

    def summarize(self) -> dict[str, float]:
        """Return the metrics of the rollout and the means of the update metrics, and forget the latter."""
        means = {name: torch.stack(values).float().mean() for name, values in self.updates.items()}
        self.updates.clear()
        return {name: float(value) for name, value in {**self.rollout, **means}.items()}
