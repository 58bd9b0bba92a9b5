"""The evaluation stage: samples responses with every model and scores them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import PromptBatch
from rlhf.errors import ConfigError
from rlhf.evaluate.metrics import (
    TARGET,
    ModelResponses,
    compare_with_targets,
    monitored_win_rate,
    point_estimates,
    summarize,
)
from rlhf.evaluate.report_output import comparison_table, write_samples
from rlhf.files import write_json
from rlhf.models import Frozen, ModelSource, Policy
from rlhf.reward_functions import load_reward_models, load_scorer
from rlhf.sampling import LocalSampler, Sampler, SamplingParams
from rlhf.tensors import masked_sum, pad_right


class EvaluateModule(lightning.LightningModule):
    """Compares the responses of several models to held-out prompts.

    Args:
        models: Models to compare, by name. null: all policies of the run.
        baseline: Name of the model that win rates and KL refer to.
        reward_model: Reward model that scores the responses, or several as an ensemble. null: the reward model of the
            run, if there is one.
        gold: Function that scores the responses as well, as ``file.py:function``; see ``PythonReward``. null: none.
        sampling: Sampling settings, equal for all models.
        sampler: Sampler of the responses. null: ``LocalSampler``.
        output: Directory of metrics.json and samples.jsonl.
        bootstrap: Number of resamples behind each bootstrap interval.
        tokenizer: Tokenizer of all models. null: the tokenizer of the baseline.
    """

    policies: torch.nn.ModuleDict

    def __init__(
        self,
        *,
        models: Mapping[str, ModelSource],
        baseline: str = "sft",
        reward_model: ModelSource | Sequence[ModelSource] | None = None,
        gold: str | None = None,
        sampling: SamplingParams | None = None,
        sampler: Sampler | None = None,
        output: str,
        bootstrap: int = 2000,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if baseline not in models:
            raise ConfigError(
                f"stage.baseline must be one of the models ({', '.join(models)}), got {baseline}.",
                f"Set stage.baseline={next(iter(models), '<model>')}.",
            )
        if bootstrap < 1:
            raise ConfigError(f"stage.bootstrap must be at least 1, got {bootstrap}.", "Set stage.bootstrap=2000.")
        self.sources = dict(models)
        self.baseline = baseline
        if reward_model is None or isinstance(reward_model, Sequence):
            self.reward_sources = list(reward_model or ())
        else:
            self.reward_sources = [reward_model]
        self.gold = load_scorer(gold, key="stage.gold") if gold else None
        self.sampling = sampling or SamplingParams()
        self.sampler = sampler or LocalSampler()
        self.output = Path(output)
        self.bootstrap = bootstrap
        self.tokenizer = tokenizer or self.sources[baseline].tokenizer(())
        self.reward_model: Frozen | None = None
        self.responses: dict[str, ModelResponses] = {}
        self.prompts: list[str] = []
        self.targets: list[str | None] = []
        self.metrics: dict[str, Any] = {}

    @property
    def response_budget(self) -> int:
        """Maximum response length in tokens, which the data module reserves in ``max_length``."""
        return self.sampling.max_new_tokens

    def configure_model(self) -> None:
        if hasattr(self, "policies"):
            return
        self.policies = torch.nn.ModuleDict(
            {name: Frozen(Policy(source.language_model(self.tokenizer))) for name, source in self.sources.items()}
        )
        if self.reward_sources:
            self.reward_model = load_reward_models(self.reward_sources, self.tokenizer)

    def on_test_start(self) -> None:
        self.responses = {name: ModelResponses() for name in self.sources}
        self.prompts, self.targets = [], []

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.prompts += [prompt.raw_text for prompt in batch.prompts]
        self.targets += [prompt.target for prompt in batch.prompts]
        for name in self.sources:
            self.evaluate_policy(name, batch)
        if all(prompt.target is not None for prompt in batch.prompts):
            self.evaluate_targets(batch)

    def evaluate_policy(self, name: str, batch: PromptBatch) -> None:
        """Sample responses to a batch of prompts with one model, and collect them with their metrics."""
        policies: Any = self.policies  # ModuleDict does not know the type of its entries.
        policy, baseline = policies[name], policies[self.baseline]

        # 1. Sample.
        self.sampler.sync(policy.model.lm, self.tokenizer)
        rollout = self.sampler.sample(batch.input_ids, self.sampling)
        texts = rollout.decode(self.tokenizer)

        # 2. Estimate the KL to the baseline at the sampling temperature.
        temperature = self.sampling.temperature or 1.0
        with self.trainer.precision_plugin.forward_context():
            logprobs, baseline_logprobs = (
                model(rollout.input_ids, rollout.attention_mask, rollout.response_mask, temperature).logprobs
                for model in (policy, baseline)
            )

        # 3. Score.
        self.responses[name].add(
            texts,
            length=rollout.lengths,
            truncated=~rollout.finished,
            **{f"kl_to_{self.baseline}": masked_sum(logprobs - baseline_logprobs, rollout.response_mask)},
            **self.score(batch, texts, rollout.input_ids, rollout.attention_mask),
        )

    def evaluate_targets(self, batch: PromptBatch) -> None:
        """Collect the reference responses of the data with their metrics."""
        encoder = self.trainer.datamodule.encoder()  # type: ignore[attr-defined]
        texts = [str(prompt.target) for prompt in batch.prompts]
        rows = [
            encoder.encode_response(prompt.messages, text) for prompt, text in zip(batch.prompts, texts, strict=True)
        ]
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad_right([row.input_ids for row in rows]))
        lengths = [float(len(row.input_ids) - row.start) for row in rows]
        self.responses.setdefault(TARGET, ModelResponses()).add(
            texts, length=lengths, **self.score(batch, texts, input_ids, attention_mask)
        )

    def score(
        self, batch: PromptBatch, texts: list[str], input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor | list[float]]:
        """Score responses with the reward model and with the gold function, where they are configured."""
        scores: dict[str, Tensor | list[float]] = {}
        if self.reward_model is not None:
            with self.trainer.precision_plugin.forward_context():
                scores["reward"] = self.reward_model(input_ids, attention_mask)
        if self.gold is not None:
            scores["gold"] = self.gold(
                [prompt.raw_text for prompt in batch.prompts], texts, [prompt.target for prompt in batch.prompts]
            )
        return scores

    def on_test_epoch_end(self) -> None:
        compare_with_targets(self.responses, len(self.prompts))
        summary = summarize(self.responses, baseline=self.baseline, bootstrap=self.bootstrap)
        self.metrics = {"prompts": len(self.prompts), "models": summary}
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.output / "metrics.json", self.metrics)
        write_samples(self.output / "samples.jsonl", self.prompts, self.targets, self.responses)
        for logger in self.loggers:
            logger.log_metrics(point_estimates(summary), step=0)

    @property
    def monitored(self) -> float:
        """Win rate of the last model against the baseline, which ``train.py`` returns for sweeps."""
        return monitored_win_rate(self.metrics["models"], self.baseline)

    def table(self) -> Table:
        """Return the comparison as a table for the terminal."""
        return comparison_table(self.metrics, baseline=self.baseline, output=self.output)
