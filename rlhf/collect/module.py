"""The collection stage: samples several responses per prompt, and has them labeled."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.collect.candidates import Candidates
from rlhf.collect.labels import Labels, RewardLabels
from rlhf.data import Preference, PromptBatch
from rlhf.data.files import read_rows
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader
from rlhf.distributed import gather_objects
from rlhf.errors import ConfigError, DataError
from rlhf.files import write_json_lines
from rlhf.models import Frozen, ModelSource, Policy
from rlhf.reward_functions import ModelReward, RewardFunction, ScoringBatch, check_rewards, check_targets, read_columns
from rlhf.sampling import Rollout, Sampler, SamplingParams
from rlhf.stage.precision import frozen_on_device, move_frozen, scoring_context
from rlhf.stage.sampling_module import SamplingModule

log = logging.getLogger(__name__)


class CollectModule(SamplingModule):
    """Samples responses of a policy, and writes which of them are preferred to a file that reward models and DPO read.

    The responses themselves are written to ``candidates.jsonl`` in the same directory.

    Args:
        policy: Policy that responds. null: the SFT model of the run.
        reward_model: Reward model that scores the responses, or several as an ensemble, if ``reward`` uses one. null:
            the reward model of the run.
        labels: Who decides which response is better: ``RewardLabels`` or ``PageLabels``. null: ``RewardLabels``.
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
        labels: Labels | None = None,
        reward_model: ModelSource | Sequence[ModelSource] | None = None,
        num_generations: Annotated[int, ">= 2"] = 2,
        sampling: SamplingParams | None = None,
        sampler: Sampler | None = None,
        include: Sequence[str] = (),
        output: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(reward_model, sampling, sampler)
        self.source, self.reward, self.labels = policy, reward, labels or RewardLabels()
        self.num_generations = num_generations
        if self.sampling.temperature == 0:
            raise ConfigError(
                "stage.sampling.temperature must be above 0 in stage=collect, got 0: all responses to a prompt would "
                "be the same.",
                "Set stage.sampling.temperature=1.",
            )
        self.include, self.output = [Path(path) for path in include], Path(output)
        self.tokenizer = tokenizer or policy.tokenizer(())
        self.metrics: dict[str, float] = {}

    @staticmethod
    def unused_inputs(settings: Mapping[str, Any]) -> set[str]:
        """Return the inputs that labels and reward function do not use."""
        needs_scores = settings["labels"] is None or settings["labels"].needs_scores
        return set() if needs_scores and settings["reward"].needs_model else {"reward_model"}

    def on_test_start(self) -> None:
        super().on_test_start()
        if self.labels.needs_single_process and self.trainer.world_size > 1:
            raise ConfigError(
                f"labels=page requires a single process, but there are {self.trainer.world_size}.",
                "Set trainer.devices=1 trainer.strategy=auto.",
            )
        reward_models = self.reward_sources if self.reward.needs_model else ()
        self.check_positions({"policy": self.source}, reward_models, "train")
        if self.labels.needs_scores or self.reward_sources:
            datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            check_targets(self.reward, datamodule, ("train",))
            read_columns(self.reward.columns, datamodule, ("train",))
        self.check_included()

    def check_included(self) -> None:
        """Read the files of ``include``, so that an invalid one is reported before anything is sampled.

        Raises:
            ConfigError: A file does not exist, or it contains a row that is not a preference pair.
        """
        for path in self.include:
            if not path.is_file():
                raise ConfigError(
                    f"stage.include=[{path}]: there is no such file.",
                    "Name a file of preference pairs, or set stage.include=[].",
                )
            try:
                RecordReader(RecordParser()).read(str(path), "train", (Preference,))
            except DataError as error:
                raise ConfigError(
                    f"stage.include=[{path}] must contain preference pairs.\n{error.args[0]}",
                    "Correct the file, or remove it from stage.include.",
                ) from error

    def on_test_epoch_end(self) -> None:
        with self.labels.opened():
            self.collect()

    def collect(self) -> None:
        """Sample responses, score them, and have them labeled."""
        # 1. Sample.
        torch.manual_seed(torch.initial_seed() + self.global_rank)
        with frozen_on_device(self, Frozen(Policy(self.source.language_model(self.tokenizer)))) as policy:
            self.sampler.sync(policy.model.lm, self.tokenizer)
            rollouts = [self.sample(batch) for batch in self.batches]
        candidates = [
            found
            for batch, rollout in zip(self.batches, rollouts, strict=True)
            for found in self.candidates(batch, rollout)
        ]

        # 2. Score.
        if self.labels.needs_scores or self.reward_sources:
            self.reward.load(self.reward_sources if self.reward.needs_model else (), self.tokenizer)
            move_frozen(self, self.reward)
            remaining = iter(candidates)
            for rollout in rollouts:
                self.score(rollout, [next(remaining) for _ in range(len(rollout.input_ids) // self.num_generations)])

        # 3. Label the responses of all ranks.
        everything = [found for share in gather_objects(candidates) for found in share]
        self.report(everything)

    def sample(self, batch: PromptBatch) -> Rollout:
        """Sample ``num_generations`` responses to each prompt. Those to one prompt are adjacent."""
        repeated = batch.repeat(self.num_generations).input_ids
        with self.trainer.precision_plugin.forward_context():
            return self.sampler.sample(repeated, self.sampling).to("cpu")

    def candidates(self, batch: PromptBatch, rollout: Rollout) -> list[Candidates]:
        """Return the responses to each prompt of a batch, without scores."""
        texts, size = rollout.decode(self.tokenizer), self.num_generations
        parts = [slice(number * size, (number + 1) * size) for number in range(len(batch.prompts))]
        return [
            Candidates(prompt, texts[rows], truncated=size - int(rollout.finished[rows].sum()))
            for prompt, rows in zip(batch.prompts, parts, strict=True)
        ]

    def score(self, rollout: Rollout, candidates: Sequence[Candidates]) -> None:
        """Set the scores of the responses in a rollout.

        Args:
            rollout: Prompts with sampled responses.
            candidates: The same responses.

        Raises:
            DataError: A score is not finite, so that it cannot be compared with the others.
        """
        prompts = [found.prompt for found in candidates for _ in found.texts]
        batch = ScoringBatch.of(rollout.to(self.device), prompts, self.tokenizer)
        reward: RewardFunction = self.reward
        with scoring_context(self.trainer.precision_plugin):
            if isinstance(reward, ModelReward):
                members = reward.member_scores(batch)
                scores = reward.combine(members)
            else:
                scores = reward(batch)
                check_rewards(reward, scores, len(prompts))
                members = scores[:, None]
        size = self.num_generations
        for number, found in enumerate(candidates):
            rows = slice(number * size, (number + 1) * size)
            found.scores = scores[rows].float().tolist()
            found.members = members[rows].float().tolist() if members.shape[1] > 1 else []
            check_scores(found)

    def report(self, candidates: Sequence[Candidates]) -> None:
        """Write the responses and the pairs, and log how many there are.

        Raises:
            ConfigError: There is no pair.
        """
        rows: list[dict[str, Any]] = []
        if self.trainer.is_global_zero:
            with self._file() as output:
                candidates_file = output.with_name("candidates.jsonl")
                write_json_lines(candidates_file, (found.row() for found in candidates))
                rows = self.labels.label(candidates, candidates_file)
                if rows:
                    write_json_lines(output, (row for path in (*self.include, None) for row in self._rows(path, rows)))
        rows = gather_objects(rows)[0]
        if not rows:
            raise ConfigError(
                f"stage=collect found no pair: the responses to each of the {len(candidates)} prompts are identical, "
                "or none of them was preferred.",
                "Set stage.sampling.temperature=1, or more responses per prompt: stage.num_generations=8",
            )
        self.metrics = {"pairs": len(rows), "prompts": len(candidates)}
        self._warn_about_truncated(candidates)
        if "chosen_score" in rows[0]:
            differences = [row["chosen_score"] - row["rejected_score"] for row in rows]
            self.metrics["score_difference"] = sum(differences) / len(differences)
        for logger in self.loggers:
            logger.log_metrics({f"collect/{name}": float(value) for name, value in self.metrics.items()}, step=0)
        found = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.warning("trainer.fast_dev_run=true: the pairs are not written (%s).", found)
        else:
            log.info("saved %s: %s", self.output, found)

    @contextmanager
    def _file(self) -> Iterator[Path]:
        """Yield the path of the pairs; with ``trainer.fast_dev_run``, one in a temporary directory."""
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            yield self.output
            return
        with TemporaryDirectory() as directory:
            yield Path(directory) / self.output.name

    def _warn_about_truncated(self, candidates: Sequence[Candidates]) -> None:
        if truncated := sum(found.truncated for found in candidates):
            log.warning(
                "%d of %d responses were cut off at %d tokens. Training on the pairs would end them there with EOS. "
                "Raise stage.sampling.max_new_tokens.",
                truncated,
                self.num_generations * len(candidates),
                self.sampling.max_new_tokens,
            )

    @staticmethod
    def _rows(path: Path | None, own: list[dict[str, Any]]) -> Iterable[Mapping[str, Any]]:
        return own if path is None else read_rows(str(path))


def check_scores(candidates: Candidates) -> None:
    """Raise an error if a score of a response to a prompt is not finite."""
    row, text = candidates.prompt.row, candidates.prompt.raw_text
    prompt = f"the prompt {text!r:.60}" if row is None else f"the prompt in row {row + 1} of data.train"
    for number, score in enumerate(candidates.scores, 1):
        if not math.isfinite(score):
            raise DataError(
                f"The score of response {number} to {prompt} is {score}, but scores must be finite.",
                "Correct the function of reward.path, or choose another reward model: stage.reward_model=<path>",
            )
