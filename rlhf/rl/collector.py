"""Collection of experience: sampling, evaluation under the current weights, and scoring."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import PromptBatch
from rlhf.models import PolicyOutput
from rlhf.reward_functions import RewardFunction, ScoringBatch
from rlhf.rl.experience import Experience, select_rows
from rlhf.rl.policies import PolicyWithReference
from rlhf.sampling import Rollout, Sampler, SamplingParams

# From the policy's output, input_ids, attention_mask and response_mask to values, [batch, time]; None without a critic.
ValueFunction: TypeAlias = Callable[[PolicyOutput, Tensor, Tensor, Tensor], Tensor | None]


class Collector:
    """Samples responses, evaluates them under the current weights, and scores them.

    Args:
        policies: The policy and its reference model.
        token_values: Values of the critic at each token, or None for stages without a critic.
        reward: The reward function.
        sampler: The sampler.
        sampling: Sampling settings.
        tokenizer: Tokenizer of the policy.
        num_generations: Number of responses per prompt.
        precision_context: Enters the Trainer's precision, such as autocast.
    """

    def __init__(
        self,
        *,
        policies: PolicyWithReference,
        token_values: ValueFunction,
        reward: RewardFunction,
        sampler: Sampler,
        sampling: SamplingParams,
        tokenizer: PreTrainedTokenizerBase,
        num_generations: int,
        precision_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.policies = policies
        self.token_values = token_values
        self.reward = reward
        self.sampler = sampler
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.num_generations = num_generations
        self.precision_context = precision_context

    def sample(self, prompts: PromptBatch) -> Rollout:
        """Sample responses from the current policy. The responses to one prompt are adjacent rows."""
        repeated = [input_ids for input_ids in prompts.input_ids for _ in range(self.num_generations)]
        self.sampler.sync(self.policies.policy.lm, self.tokenizer)
        with self.precision_context():
            return self.sampler.sample(repeated, self.sampling)

    @torch.no_grad()
    def evaluate_rollout(self, rollout: Rollout, split: Sequence[Tensor]) -> Experience:
        """Compute log-probs, KL and values of a rollout under the current weights.

        Args:
            rollout: Prompts with sampled responses.
            split: Row indices of the batches to evaluate. Use the minibatches of the first pass: equal shapes give
                equal rounding, so the first probability ratio is exactly 1.
        """
        tensors: dict[str, Tensor] = {}
        with self.precision_context():
            for rows in split:
                for name, values in self._evaluate(*select_rows(rollout, rows)).items():
                    if name not in tensors:
                        tensors[name] = torch.zeros_like(rollout.input_ids, dtype=torch.float)
                    tensors[name][rows.to(values.device), : values.shape[1]] = values
        return Experience(rollout, **tensors)

    def _evaluate(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> dict[str, Tensor]:
        """Compute the tensors of ``Experience`` for some rows: [rows, time] each."""
        output = self.policies.policy_output(input_ids, attention_mask, response_mask)
        reference = self.policies.reference_output(input_ids, attention_mask, response_mask)
        tensors = {
            "logprobs": output.logprobs,
            "ref_logprobs": reference.logprobs,
            "kl": self.policies.kl(output, reference.logprobs, response_mask, reference),
        }
        values = self.token_values(output, input_ids, attention_mask, response_mask)
        return tensors if values is None else {**tensors, "values": values}

    @torch.no_grad()
    def score(self, rollout: Rollout, prompts: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Score the responses.

        Returns:
            [batch] scores, in reward units, and the components that they consist of, by name: [batch] each.
        """
        repeated = [prompt for prompt in prompts.prompts for _ in range(self.num_generations)]
        batch = ScoringBatch(
            rollout.input_ids,
            rollout.attention_mask,
            [prompt.raw_text for prompt in repeated],
            rollout.decode(self.tokenizer),
            [prompt.target for prompt in repeated],
        )
        with self.precision_context():
            return self.reward.score_with_components(batch)
