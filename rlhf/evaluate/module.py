"""The evaluation stage."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import PromptBatch
from rlhf.evaluate.objective import bootstrap_interval, rouge_l, wins
from rlhf.models import Frozen, ModelSource, Policy
from rlhf.reward_functions import load_scorer
from rlhf.sampling import SamplingParams, generate
from rlhf.tensors import masked_sum, pad_right

TARGET = "target"  # the data's own answers, listed beside the models


@dataclass
class ScoringBatch:
    """What one model said, a list entry a prompt."""

    texts: list[str] = field(default_factory=list)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, texts: list[str], **numbers: Tensor | list[float]) -> None:
        self.texts += texts
        for name, values in numbers.items():
            self.numbers.setdefault(name, []).extend(float(value) for value in values)


class EvaluateModule(lightning.LightningModule):
    """Answers held-out prompts with every model and compares the answers.

    Args:
        models: name to model; null: every policy of the run.
        baseline: name of the model that the others are compared with, and that KL is measured to.
        reward_model: scores the answers; null for none.
        gold: ``file.py:function`` that scores them too; null for none.
        sampling: how answers are drawn, the same for every model.
        output: folder of metrics.json and samples.jsonl.
        bootstrap: resamples behind each interval.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, ModelSource],
        baseline: str,
        reward_model: Any,
        gold: str | None,
        sampling: SamplingParams,
        output: str,
        bootstrap: int = 2000,
    ) -> None:
        super().__init__()
        self.sources = dict(models)
        self.baseline = baseline
        self.reward_source = reward_model
        self.gold = load_scorer(gold, key="gold") if gold else None
        self.sampling = sampling
        self.output = Path(output)
        self.bootstrap = bootstrap
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.policies: torch.nn.ModuleDict | None = None
        self.answers: dict[str, ScoringBatch] = {}
        self.prompts: list[str] = []
        self.targets: list[str | None] = []
        self.metrics: dict[str, Any] = {}

    @property
    def response_budget(self) -> int:
        """Tokens of ``data.max_length`` that ``PromptDataModule`` reserves for the response."""
        return self.sampling.max_new_tokens

    def configure_model(self) -> None:
        if self.policies is None:
            self.policies = torch.nn.ModuleDict(
                {name: Frozen(Policy(source.language_model(self.tokenizer))) for name, source in self.sources.items()}
            )
            if self.reward_source is not None:
                self.reward_model = Frozen(self.reward_source.scalar_model(self.tokenizer))

    def on_test_start(self) -> None:
        self.answers = {name: ScoringBatch() for name in self.sources}
        self.prompts, self.targets = [], []

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.prompts += [prompt.raw_text for prompt in batch.prompts]
        self.targets += [prompt.target for prompt in batch.prompts]
        for name, policy in self.policies.items():
            self._answer(name, policy.model, batch)
        if all(prompt.target is not None for prompt in batch.prompts):
            self._take_targets(batch)

    def _answer(self, name: str, policy: Policy, batch: PromptBatch) -> None:
        rollout = generate(policy.lm, batch.input_ids, self.sampling, self.sampling.stop_ids(self.tokenizer))
        temperature = self.sampling.temperature or 1.0
        with self.trainer.precision_plugin.forward_context():
            ours, theirs = (
                model(rollout.input_ids, rollout.attention_mask, rollout.response_mask, temperature).logprobs
                for model in (policy, self.policies[self.baseline])
            )
        texts = rollout.decode(self.tokenizer)
        self.answers[name].add(
            texts,
            length=rollout.lengths,
            truncated=~rollout.finished,
            **{f"kl_to_{self.baseline}": masked_sum(ours - theirs, rollout.response_mask)},
            **self._scores(batch, texts, rollout.input_ids, rollout.attention_mask),
        )

    def _take_targets(self, batch: PromptBatch) -> None:
        encoder = self.trainer.datamodule.encoder()
        texts = [str(prompt.target) for prompt in batch.prompts]
        coded = [
            encoder.encode_response(prompt.messages, text) for prompt, text in zip(batch.prompts, texts, strict=True)
        ]
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad_right([row.input_ids for row in coded]))
        lengths = [float(len(row.input_ids) - row.start) for row in coded]
        self.answers.setdefault(TARGET, ScoringBatch()).add(
            texts, length=lengths, **self._scores(batch, texts, input_ids, attention_mask)
        )

    def _scores(
        self, batch: PromptBatch, texts: list[str], input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        if self.reward_source is not None:
            with self.trainer.precision_plugin.forward_context():
                scores["reward"] = self.reward_model(input_ids, attention_mask)
        if self.gold is not None:
            scores["gold"] = self.gold(
                [prompt.raw_text for prompt in batch.prompts], texts, [prompt.target for prompt in batch.prompts]
            )
        return scores

    def on_test_epoch_end(self) -> None:
        target = self.answers.get(TARGET)
        if target is not None and len(target.texts) < len(self.prompts):
            del self.answers[TARGET]  # some prompts have none: no comparison over different prompts
        if TARGET in self.answers:
            for answers in self.answers.values():
                answers.numbers["rougeL"] = rouge_l(answers.texts, self.answers[TARGET].texts).tolist()
        self.metrics = {
            "prompts": len(self.prompts),
            "models": {name: self._metrics_of(name, answers) for name, answers in self.answers.items()},
        }
        self._write()
        for logger in self.loggers:
            logger.log_metrics({name: value for name, value in self._flat().items() if value == value}, step=0)

    def _metrics_of(self, name: str, answers: ScoringBatch) -> dict[str, Any]:
        metrics: dict[str, Any] = {number: self._interval(values, "mean") for number, values in answers.numbers.items()}
        for other in (self.baseline, TARGET):
            if other != name and other in self.answers:
                metrics[f"win_rate_vs_{other}"] = {
                    scorer: self._interval(
                        wins(_tensor(answers, scorer), _tensor(self.answers[other], scorer)), "value"
                    )
                    for scorer in ("gold", "reward")
                    if scorer in answers.numbers
                }
        return metrics

    def _interval(self, values: Any, name: str) -> dict[str, float]:
        middle, low, high = bootstrap_interval(torch.as_tensor(values), draws=self.bootstrap)
        return {name: middle, "low": low, "high": high}

    def _flat(self) -> dict[str, float]:
        flat = {}
        for model, metrics in self.metrics["models"].items():
            for name, value in metrics.items():
                for scorer, interval in value.items() if name.startswith("win_rate") else [("", value)]:
                    middle = interval["value"] if "value" in interval else interval["mean"]
                    flat["/".join(part for part in (model, name, scorer) if part)] = middle
        return flat

    def _write(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "metrics.json").write_text(json.dumps(self.metrics, indent=2) + "\n", encoding="utf-8")
        with open(self.output / "samples.jsonl", "w", encoding="utf-8") as file:
            for row, prompt in enumerate(self.prompts):
                answers = {
                    name: {
                        "text": said.texts[row],
                        **{key: round(values[row], 4) for key, values in said.numbers.items()},
                    }
                    for name, said in self.answers.items()
                    if name != TARGET
                }
                file.write(
                    json.dumps({"prompt": prompt, "target": self.targets[row], "answers": answers}, ensure_ascii=False)
                    + "\n"
                )

    @property
    def merit(self) -> float:
        """Win rate of the last model against the baseline: by the gold score, or by the reward model without one."""
        rates = [
            metrics.get(f"win_rate_vs_{self.baseline}", {})
            for name, metrics in self.metrics["models"].items()
            if name != TARGET
        ]
        last = next((rate for rate in reversed(rates) if rate), {})
        return next((last[scorer]["value"] for scorer in ("gold", "reward") if scorer in last), float("nan"))

    def table(self) -> Table:
        """The comparison as a table for the terminal."""
        table = Table(
            title=f"{self.metrics['prompts']} held-out prompts; 95 % bootstrap intervals; ties count half",
            caption=f"wins by gold or reward model (RM); KL to {self.baseline}, nats an answer; more in {self.output}",
            box=box.SIMPLE_HEAD,
            padding=(0, 0, 0, 1),
        )
        columns = {
            "gold\nscore": ("gold",),
            "RM\nscore": ("reward",),
            f"gold wins\nvs {self.baseline}": (f"win_rate_vs_{self.baseline}", "gold"),
            f"RM wins\nvs {self.baseline}": (f"win_rate_vs_{self.baseline}", "reward"),
            f"gold wins\nvs {TARGET}": (f"win_rate_vs_{TARGET}", "gold"),
            "KL": (f"kl_to_{self.baseline}",),
            "tokens": ("length",),
            "ROUGE\nL": ("rougeL",),
        }
        models = self.metrics["models"]
        shown = {
            title: keys for title, keys in columns.items() if any(_dig(metrics, keys) for metrics in models.values())
        }
        table.add_column("model", overflow="fold", min_width=6)  # a long name gives way to the numbers
        for title in shown:
            table.add_column(title, justify="right", no_wrap=True)
        for name, metrics in models.items():
            table.add_row(
                name, *(_show(_dig(metrics, keys), short="wins" not in title) for title, keys in shown.items())
            )
        return table


def _tensor(answers: ScoringBatch, name: str) -> Tensor:
    return torch.tensor(answers.numbers[name], dtype=torch.float64)


def _dig(metrics: dict[str, Any], keys: tuple[str, ...]) -> dict[str, float]:
    for key in keys:
        metrics = metrics.get(key, {})
    return metrics


def _show(interval: dict[str, float], short: bool) -> str:
    if not interval:
        return ""
    middle = interval["value"] if "value" in interval else interval["mean"]
    return f"{middle:.2f}" if short else f"{middle:.2f}\n{interval['low']:.2f}..{interval['high']:.2f}"
