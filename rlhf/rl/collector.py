"""Collection of experience: sampling, evaluation under the current weights, and scoring."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import PromptBatch
from rlhf.errors import ConfigError
from rlhf.models import common_count, gathered
from rlhf.reward_functions import RewardFunction, ScoringBatch, check_rewards
from rlhf.rl.experience import Experience, Lengths, ModelInputs, select_rows
from rlhf.rl.models import OnPolicyModels
from rlhf.sampling import Rollout, Sampler, SamplingParams
from rlhf.tensors import upload

log = logging.getLogger(__name__)


class Collector:
    """Samples responses, evaluates them under the current weights, and scores them.

    Args:
        models: The policy, its reference model and the critic.
        reward: The reward function.
        sampler: The sampler.
        sampling: Sampling settings.
        tokenizer: Tokenizer of the policy.
        num_generations: Number of responses per prompt.
        rollout_batch_size: Number of responses to sample at once; None: all.
        precision_context: Enters the Trainer's precision, such as autocast.
        scoring_context: Enters the precision of reward functions.
    """

    def __init__(
        self,
        *,
        models: OnPolicyModels,
        reward: RewardFunction,
        sampler: Sampler,
        sampling: SamplingParams,
        tokenizer: PreTrainedTokenizerBase,
        num_generations: int,
        rollout_batch_size: int | None = None,
        precision_context: Callable[[], AbstractContextManager[Any]],
        scoring_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.models = models
        self.reward = reward
        self.sampler = sampler
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.num_generations = num_generations
        self.rollout_batch_size = rollout_batch_size
        self.precision_context = precision_context
        self.scoring_context = scoring_context

    def sample(self, prompts: PromptBatch) -> Rollout:
        """Sample responses from the current policy. The responses to one prompt are adjacent rows."""
        repeated = prompts.repeat(self.num_generations).input_ids
        self.sampler.sync(self.models.policy.lm, self.tokenizer)
        size = self.rollout_batch_size or len(repeated)
        # Ranks may sample different numbers of batches from a sharded policy.
        with gathered(self.models.policy), self.precision_context():
            parts = [
                self.sampler.sample(repeated[start : start + size], self.sampling)
                for start in range(0, len(repeated), size)
            ]
        return concatenate(parts)

    @torch.no_grad()
    def evaluate_rollout(self, rollout: Rollout, split: Sequence[Sequence[int]]) -> Experience:
        """Compute log-probs, KL and values of a rollout under the current weights.

        Args:
            rollout: Prompts with sampled responses.
            split: Row indices of the batches to evaluate. Use the minibatches of the first pass: equal shapes give
                equal rounding, so the first probability ratio is exactly 1.
        """
        tensors: dict[str, Tensor] = {}
        lengths = Lengths.of(rollout)
        with self.precision_context():
            for rows in split:
                index = upload(rows, rollout.input_ids.device)
                inputs, _ = select_rows(rollout, lengths, rows)
                for name, values in self._evaluate(inputs).items():
                    if name not in tensors:
                        tensors[name] = torch.zeros_like(rollout.input_ids, dtype=torch.float)
                    tensors[name][index, : values.shape[1]] = values.float()
        return Experience(rollout, lengths, **tensors)

    def evaluate_in_order(self, rollout: Rollout, size: int) -> Experience:
        """Compute what ``evaluate_rollout`` does, with at most ``size`` rows at once and in the order of the rows."""
        count = len(rollout.input_ids)
        split = [range(start, min(start + size, count)) for start in range(0, count, size)]
        idle = common_count(self.models.policy, len(split)) - len(split)  # Other ranks have more responses.
        return self.evaluate_rollout(rollout, split + split[-1:] * idle)

    def _evaluate(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Compute the tensors of ``Experience`` for some rows: [rows, time] each."""
        output, reference, values = self.models.rollout_outputs(inputs)
        tensors = {"logprobs": output.logprobs, "kl": torch.zeros_like(output.logprobs)}
        if reference is not None:
            tensors["kl"] = self.models.kl(inputs, output, reference.logprobs, reference)
            tensors["ref_logprobs"] = reference.logprobs
        if values is not None:
            tensors["values"] = values
        return tensors

    @torch.no_grad()
    def score(self, rollout: Rollout, prompts: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Score the responses.

        Returns:
            [batch] scores, in reward units, and the components that they consist of, by name: [batch] each.
        """
        repeated = prompts.repeat(self.num_generations).prompts
        batch = ScoringBatch.of(rollout, repeated, self.tokenizer)
        with self.scoring_context():
            scores, components = self.reward.score_with_components(batch)
        for result in (scores, *components.values()):
            check_rewards(self.reward, result, len(repeated))
        return scores.float(), components

    def sample_rows(
        self, rollout: Rollout, prompts: PromptBatch, columns: Mapping[str, Tensor], count: int
    ) -> list[tuple[str | float, ...]]:
        """Return prompt, response, score and any KL of the first response to each of the first prompts.

        Args:
            rollout: Prompts with sampled responses.
            prompts: The prompts.
            columns: ``scores`` and, with a reference model, ``kl`` of each response, on the CPU.
            count: Number of prompts.
        """
        shown = prompts.prompts[:count]
        texts = rollout.decode(self.tokenizer) if shown else []
        rows = range(0, len(shown) * self.num_generations, self.num_generations)
        numbers = [columns[name] for name in ("scores", "kl") if name in columns]
        return [
            (prompt.raw_text, texts[row], *(float(column[row]) for column in numbers))
            for prompt, row in zip(shown, rows, strict=True)
        ]


def check_sampling(sampling: SamplingParams) -> None:
    """Refuse greedy sampling, and warn about filters."""
    if sampling.temperature == 0:
        raise ConfigError(
            "stage.sampling.temperature must be above 0 in on-policy training, got 0: greedy responses explore "
            "nothing.",
            "Set stage.sampling.temperature=0.7.",
        )
    if sampling.top_k or sampling.top_p < 1:
        log.warning(
            "stage.sampling.top_k=%s and top_p=%s restrict sampling, but log-probs, ratios and KL are computed over "
            "the full vocabulary: the responses come from a narrower distribution than the one that is updated.",
            sampling.top_k,
            sampling.top_p,
        )


def concatenate(parts: Sequence[Rollout]) -> Rollout:
    """Join rollouts with the same stop tokens in order, padded on the right to the longest row."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.input_ids.shape[1] for part in parts)

    def join(name: str) -> Tensor:
        return torch.cat([F.pad(getattr(part, name), (0, width - part.input_ids.shape[1])) for part in parts])

    finished = torch.cat([part.finished for part in parts])
    return Rollout(join("input_ids"), join("attention_mask"), join("response_mask"), finished, parts[0].stop_ids)
