"""The collection stage: samples several responses per prompt, and labels the best and the worst as a pair."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.collect.objective import best_and_worst
from rlhf.data import Prompt, PromptBatch
from rlhf.distributed import gather_objects
from rlhf.errors import ConfigError
from rlhf.files import atomic_write
from rlhf.models import Frozen, ModelSource, Policy
from rlhf.reward_functions import RewardFunction, ScoringBatch, end_as_in_training
from rlhf.sampling import LocalSampler, Rollout, Sampler, SamplingParams
from rlhf.stage.precision import frozen_on_device, move_frozen

log = logging.getLogger(__name__)


@dataclass
class Responses:
    """The responses to a batch of prompts; those to one prompt are adjacent. Tensors are on the CPU.

    Args:
        prompts: The prompts.
        rollout: Prompts with sampled responses.
        texts: The responses as text.
    """

    prompts: list[Prompt]
    rollout: Rollout
    texts: list[str]


class CollectModule(lightning.LightningModule):
    """Samples responses of a policy, scores them, and writes the best and the worst response to each prompt as a pair.

    Pairs whose responses are identical, or have equal scores, are left out. The file is a preference file, which
    ``stage=reward`` and ``stage=dpo`` read.

    Args:
        policy: Policy that responds. null: the SFT model of the run.
        reward_model: Reward model that scores the responses, or several as an ensemble, if ``reward`` uses one. null:
            the reward model of the run.
        reward: Reward function that scores the responses.
        num_generations: Number of responses per prompt.
        sampling: Sampling settings.
        sampler: Sampler of the responses. null: ``LocalSampler``.
        include: Preference files whose rows come first in the output, such as those of earlier rounds.
        output: Preference file to write.
        tokenizer: Tokenizer. null: the tokenizer of the policy.
    """

    def __init__(
        self,
        *,
        policy: ModelSource,
        reward: RewardFunction,
        reward_model: ModelSource | Sequence[ModelSource] | None = None,
        num_generations: Annotated[int, ">= 2"] = 2,
        sampling: SamplingParams | None = None,
        sampler: Sampler | None = None,
        include: Sequence[str] = (),
        output: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.source, self.reward = policy, reward
        if reward_model is None or isinstance(reward_model, Sequence):
            self.reward_sources = list(reward_model or ())
        else:
            self.reward_sources = [reward_model]
        self.num_generations = num_generations
        self.sampling = sampling or SamplingParams()
        if self.sampling.temperature == 0:
            raise ConfigError(
                "stage.sampling.temperature must be above 0 in stage=collect, got 0: all responses to a prompt would "
                "be the same.",
                "Set stage.sampling.temperature=1.",
            )
        self.sampler = sampler or LocalSampler()
        self.include, self.output = [Path(path) for path in include], Path(output)
        self.tokenizer = tokenizer or policy.tokenizer(())
        self.batches: list[PromptBatch] = []
        self.metrics: dict[str, float] = {}

    @staticmethod
    def unused_inputs(settings: Mapping[str, Any]) -> set[str]:
        """Return the inputs that the configured reward function does not use."""
        return set() if settings["reward"].needs_model else {"reward_model"}

    @property
    def response_budget(self) -> int:
        """Maximum response length in tokens, which the data module reserves in ``max_length``."""
        return self.sampling.max_new_tokens

    def on_test_start(self) -> None:
        self.batches = []

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        # All prompts are sampled before the reward model is loaded, so that one model is in memory at a time.
        if not batch.is_filler:
            self.batches.append(batch)

    def on_test_epoch_end(self) -> None:
        # 1. Sample.
        torch.manual_seed(torch.initial_seed() + self.global_rank)
        with frozen_on_device(self, Frozen(Policy(self.source.language_model(self.tokenizer)))) as policy:
            self.sampler.sync(policy.model.lm, self.tokenizer)
            sampled = [self.sample(batch) for batch in self.batches]

        # 2. Score.
        self.reward.load(self.reward_sources if self.reward.needs_model else (), self.tokenizer)
        move_frozen(self, self.reward)
        scores = [self.score(responses) for responses in sampled]

        # 3. Write the pairs of all ranks.
        shares = gather_objects([(r.prompts, r.texts, s) for r, s in zip(sampled, scores, strict=True)])
        rows, prompts = [], 0
        for batch_prompts, texts, batch_scores in (batch for share in shares for batch in share):
            rows += self.pairs(batch_prompts, texts, batch_scores)
            prompts += len(batch_prompts)
        self.report(rows, prompts)

    def sample(self, batch: PromptBatch) -> Responses:
        """Sample ``num_generations`` responses to each prompt."""
        repeated = [input_ids for input_ids in batch.input_ids for _ in range(self.num_generations)]
        with self.trainer.precision_plugin.forward_context():
            rollout = self.sampler.sample(repeated, self.sampling)
        return Responses(list(batch.prompts), rollout.to("cpu"), rollout.decode(self.tokenizer))

    def score(self, responses: Responses) -> Tensor:
        """Score responses: [prompts, num_generations], in reward units."""
        repeated = [prompt for prompt in responses.prompts for _ in range(self.num_generations)]
        stop_ids = self.sampling.stop_ids(self.tokenizer)
        batch = ScoringBatch(
            *end_as_in_training(responses.rollout.to(self.device), self.tokenizer, stop_ids),
            [prompt.raw_text for prompt in repeated],
            responses.texts,
            [prompt.target for prompt in repeated],
        )
        with self.trainer.precision_plugin.forward_context():
            scores: Tensor = self.reward(batch)
        return scores.float().cpu().view(-1, self.num_generations)

    def pairs(self, prompts: Sequence[Prompt], texts: Sequence[str], scores: Tensor) -> list[dict[str, Any]]:
        """Return the preference rows of a batch of prompts."""
        rows = []
        for number, (prompt, (best, worst)) in enumerate(zip(prompts, best_and_worst(scores).tolist(), strict=True)):
            chosen, rejected = (texts[number * self.num_generations + index] for index in (best, worst))
            if chosen != rejected:
                rows.append(
                    {
                        "prompt": prompt_field(prompt),
                        "chosen": chosen,
                        "rejected": rejected,
                        "chosen_score": round(scores[number, best].item(), 4),
                        "rejected_score": round(scores[number, worst].item(), 4),
                    }
                )
        return rows

    def report(self, rows: list[dict[str, Any]], prompts: int) -> None:
        """Write the pairs, and log how many there are.

        Raises:
            ConfigError: There is no pair.
        """
        if not rows:
            raise ConfigError(
                f"stage=collect found no pair: all responses to each of the {prompts} prompts are identical or have "
                "equal scores.",
                "Set stage.sampling.temperature=1, or more responses per prompt: stage.num_generations=8",
            )
        if self.trainer.is_global_zero:
            earlier = b"".join(path.read_bytes() for path in self.include)
            own = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            atomic_write(self.output, lambda file: file.write(earlier + own))
        self.trainer.strategy.barrier()
        difference = sum(row["chosen_score"] - row["rejected_score"] for row in rows) / len(rows)
        self.metrics = {"pairs": len(rows), "prompts": prompts, "score_difference": difference}
        for logger in self.loggers:
            logger.log_metrics({f"collect/{name}": float(value) for name, value in self.metrics.items()}, step=0)
        log.info(
            "saved %s: %d pairs of %d prompts; mean difference of the scores %.3f",
            self.output,
            len(rows),
            prompts,
            difference,
        )


def prompt_field(prompt: Prompt) -> Any:
    """Return a prompt as a row of data has it: text, or a list of messages."""
    is_text = len(prompt.messages) == 1 and prompt.messages[0]["role"] == "user"
    return prompt.messages[0]["content"] if is_text else [dict(message) for message in prompt.messages]
