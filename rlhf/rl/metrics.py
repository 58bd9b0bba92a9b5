"""Metrics of rollouts and of updates, over all ranks. docs/metrics.md explains each of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.distributed import gather_objects
from rlhf.models import PolicyOutput
from rlhf.rl.experience import Experience, Minibatch
from rlhf.rl.kl import KLController
from rlhf.rl.objective import explained_variance, policy_ratio
from rlhf.rl.scores import ScoreShaping
from rlhf.stage.step_metrics import StepMetrics
from rlhf.tensors import masked_mean, masked_sum, upload


@torch.no_grad()
def response_columns(experience: Experience, scores: Tensor, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather one number per response and quantity from all ranks, in a single transfer from the device.

    Args:
        experience: The evaluated rollout.
        scores: [batch] scores of the responses, before shaping.
        components: [batch] components of the scores, by name.

    Returns:
        Columns by name, [responses of all ranks] each, on the CPU. The responses of rank 0 come first.
    """
    rollout = experience.rollout
    ngrams, distinct_ngrams = count_ngrams(rollout.response_ids())
    columns = {
        "scores": scores,
        "logprobs": masked_sum(experience.logprobs, rollout.response_mask),
        "length": rollout.lengths,
        "finished": rollout.finished,
        "ngrams": upload(ngrams, scores.device),
        "distinct_ngrams": upload(distinct_ngrams, scores.device),
        **{f"reward/{name}": values for name, values in components.items()},
    }
    if (kl := experience.kl_per_sequence) is not None:
        columns["kl"] = kl
        columns["kl_estimate"] = masked_sum(experience.kl, rollout.response_mask)
    if experience.values is not None:
        columns["values"] = masked_sum(experience.values, rollout.response_mask)
    table = torch.stack([column.to(scores.device).float() for column in columns.values()]).cpu()
    return dict(zip(columns, torch.cat(gather_objects(table), dim=1), strict=True))


def checked_columns(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns that must be finite, by the name of their quantity; see ``response_columns``."""
    names = {"scores": "score", "logprobs": "log-prob", "kl": "log-ratio", "kl_estimate": "KL", "values": "value"}
    return {name: columns[column] for column, name in names.items() if column in columns}


def rollout_metrics(columns: Mapping[str, Tensor], kl: KLController, scores: ScoreShaping) -> dict[str, Any]:
    """Compute the metrics of a rollout before any update.

    Args:
        columns: See ``response_columns``.
        kl: KL penalty with its current coefficient.
        scores: Score shaping with its running moments.
    """
    means = {name: float(column.double().mean()) for name, column in columns.items()}
    non_score_reward = -kl.reward_coef * means.get("kl_estimate", 0.0)
    shaped = scores(columns["scores"].double(), columns["finished"].bool())
    return {
        **{f"objective/{name}": means[name] for name in ("kl", "kl_estimate") if name in means},
        "objective/entropy": -means["logprobs"],
        "objective/scores": means["scores"],
        "objective/scores_std": scores.std,
        "objective/score_range": float(columns["scores"].max() - columns["scores"].min()),
        "objective/non_score_reward": non_score_reward,
        "objective/rlhf_reward": float(shaped.mean()) + non_score_reward,
        "response/length": means["length"],
        "response/truncated": 1 - means["finished"],
        "response/repetition": 1 - means["distinct_ngrams"] / means["ngrams"] if means["ngrams"] else 0.0,
        **{name: mean for name, mean in means.items() if name.startswith("reward/")},
    }


def count_ngrams(responses: Sequence[Sequence[int]], size: int = 4) -> tuple[list[int], list[int]]:
    """Return the number of n-grams and the number of distinct n-grams of each response.

    ``response/repetition`` is 1 - distinct n-grams / n-grams, both summed over the responses.

    Args:
        responses: Token ids of each response.
        size: Number of tokens in an n-gram.

    Reference: Welleck et al. 2019, section 6, seq-rep-n (arXiv:1908.04319).
    """
    ngrams = [list(zip(*(response[i:] for i in range(size)), strict=False)) for response in responses]
    return [len(own) for own in ngrams], [len(set(own)) for own in ngrams]


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
    assert output.entropy is not None
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
        steps: Metrics of the optimizer steps that have ended since the last ``summarize``.
        step: Metrics of the current optimizer step.
    """

    def __init__(self) -> None:
        self.rollout: Mapping[str, Any] = {}
        self.steps, self.step = StepMetrics(), StepMetrics()

    @property
    def has_updates(self) -> bool:
        """Whether there are metrics of updates that ``summarize`` has not returned."""
        return bool(self.steps.means or self.step.means)

    def finish_step(self, metrics: Mapping[str, Tensor | float]) -> None:
        """End an optimizer step and add its metrics."""
        self.step.add(metrics)
        self.steps.take(self.step)

    def skip_step(self) -> None:
        """End an optimizer step that is skipped: its minibatches count in ``policy/skipped`` only."""
        minibatches = len(self.step.means["policy/skipped"])
        self.step = StepMetrics()
        self.steps.add({"policy/skipped": 1.0}, minibatches)

    def add_minibatch(self, minibatch: Minibatch, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of an update: losses as means over their terms, the others as means over tokens."""
        losses = {name: value for name, value in metrics.items() if name.startswith(("loss/", "train/"))}
        others = {name: value for name, value in metrics.items() if name not in losses}
        self.step.add(losses, minibatch.loss_terms)
        self.step.add(others, minibatch.response_tokens)
        self.step.add({"policy/skipped": 0.0})

    def summarize(self) -> dict[str, float]:
        """Return the metrics of the rollout and the weighted means of the update metrics, and forget the latter."""
        self.steps.take(self.step)
        return {**{name: float(value) for name, value in self.rollout.items()}, **self.steps.reduce()}
