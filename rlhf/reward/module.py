"""The reward stage."""

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import track
from torch import Tensor

from rlhf.data import PairBatch, RatingBatch, RecordDataModule, SequenceBatch
from rlhf.distributed import gather_objects, sum_over_ranks
from rlhf.errors import ConfigError
from rlhf.files import write_json
from rlhf.models import ModelSource, ScalarHead, ScalarModel, allows_shared_prompts, disable_dropout, state_width
from rlhf.reward.objective import bradley_terry_loss, centering_penalty, ensemble_std, regression_loss
from rlhf.reward.preflight import reward_model_checks
from rlhf.reward.report import pair_report, rating_report
from rlhf.reward.report_output import plot, scalars, summary
from rlhf.schema import FractionBelowOne, NonNegativeFloat, PositiveFloat, PositiveInt, has_default
from rlhf.stage import Metrics, Result, StageModule
from rlhf.stage.check import Check
from rlhf.stage.loggers import log_figure
from rlhf.stage.optimizer import Schedule

log = logging.getLogger(__name__)
MIN_PROGRESS_BATCHES = 20  # The report shows a progress bar from this many batches on.


class RewardModule(StageModule):
    """Trains a reward model: with the Bradley-Terry loss on preference pairs, with regression on ratings.

    The other arguments are those of ``StageModule``.

    Args:
        policy: Language model whose trunk the reward model starts from. null: the run's SFT model.
        input_dim: Width of the hidden states. null: read from the model.
        hidden_dim: Width of the inner layers of the head, with ``num_layers`` of at least 2.
        num_layers: Number of linear layers of the head. 1: a linear head.
        num_heads: Number of heads with independent initial weights. Each head has its own loss, and the score is their
            mean. PPO and GRPO can penalize their disagreement (``reward.uncertainty_penalty``).
        label_smoothing: Probability that a label is wrong, at least 0 and below 0.5. Preference pairs only (Wang et al.
            2024, arXiv:2401.06080).
        centering_coef: Weight of the squared sum of a pair's scores, in nats per squared reward unit. Preference pairs
            only. TRL suggests 0.01 (Eisenstein et al. 2023, arXiv:2312.09244).
        output: Directory of metrics.json, the report on the validation data. null: no file.
    """

    model: ScalarModel

    def __init__(
        self,
        *,
        policy: ModelSource,
        input_dim: PositiveInt | None = None,
        hidden_dim: PositiveInt = 128,
        num_layers: PositiveInt = 1,
        num_heads: PositiveInt = 1,
        label_smoothing: Annotated[float, ">= 0", "< 0.5"] = 0.0,
        centering_coef: NonNegativeFloat = 0.0,
        output: str | None = None,
        learning_rate: PositiveFloat = 5e-4,
        weight_decay: NonNegativeFloat = 0.01,
        schedule: Schedule = "linear",
        warmup_ratio: FractionBelowOne = 0.05,
        **optimizer: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_ratio=warmup_ratio,
            **optimizer,
        )
        if num_layers == 1 and not has_default(RewardModule, "hidden_dim", hidden_dim):
            raise ConfigError(
                f"stage.hidden_dim={hidden_dim} has no effect with stage.num_layers=1: the head has no inner layers.",
                "Set stage.num_layers=2 or remove stage.hidden_dim.",
            )
        self.source = policy
        self.input_dim = input_dim
        self.head_settings = {"hidden_dim": hidden_dim, "num_layers": num_layers, "num_heads": num_heads}
        self.label_smoothing = label_smoothing
        self.centering_coef = centering_coef
        self.output = output

    @property
    def monitor(self) -> str:  # type: ignore[override]
        return "val/accuracy" if "val/accuracy" in self.trainer.callback_metrics else "val/loss"

    @property
    def data(self) -> Any:
        """The datamodule that is being trained on."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Reject keys that apply to preference pairs only, before any weights are loaded."""
        if stage == "fit" and self.data.has_ratings:
            for key in ("label_smoothing", "centering_coef"):
                if value := getattr(self, key):
                    raise ConfigError(
                        f"stage.{key} applies to preference pairs only, but the data contain ratings, got {value}.",
                        f"Set stage.{key}=0.",
                    )

    def open_models(self) -> None:
        lm = disable_dropout(self.source.language_model(self.tokenizer))
        width = state_width(lm)
        if self.input_dim not in (None, width):
            raise ConfigError(
                f"stage.input_dim must be {width}, the width of the model's hidden states, got {self.input_dim}.",
                f"Set stage.input_dim={width} or stage.input_dim=null.",
            )
        allows_shared_prompts(lm.base_model)
        self.model = ScalarModel(lm.base_model, ScalarHead(width, **self.head_settings))

    # Training

    def on_train_start(self) -> None:
        super().on_train_start()
        self.model.reward_mean.zero_()  # Training uses raw scores, even if the checkpoint already stores a mean.

    def training_loss(self, batch: PairBatch | RatingBatch) -> tuple[Tensor, Metrics]:
        loss, metrics = self.loss_and_metrics(batch)
        return loss * batch.loss_weight, {f"train/{name}": value for name, value in metrics.items()}

    def validation_step(self, batch: PairBatch | RatingBatch, batch_idx: int) -> None:
        self.log_val(self.loss_and_metrics(batch)[1], batch.loss_terms)

    def loss_and_metrics(self, batch: PairBatch | RatingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the unweighted loss of a batch, and the metrics of training and validation."""
        sequences = batch.sequences
        scores = self.model.scores(  # [sequences, heads]
            sequences.input_ids, sequences.attention_mask, **sequences.layout
        )
        if isinstance(batch, RatingBatch):
            loss, metrics = self._rating_loss(batch, scores)
        else:
            loss, metrics = self._pair_loss(batch, scores)
        if scores.shape[1] > 1:
            metrics["ensemble_std"] = ensemble_std(scores, self._offsets(batch, scores))
        return loss, {"loss": loss, **metrics, "mean_reward": scores.mean()}

    @staticmethod
    def _offsets(batch: PairBatch | RatingBatch, scores: Tensor) -> Tensor:
        """Return the mean score of each head over the batches of all ranks: [heads], in reward units."""
        own = scores.detach()[:0] if batch.is_filler else scores.detach()
        total = sum_over_ranks(torch.cat([own.sum(dim=0), own.new_tensor([len(own)])]))
        return total[:-1] / total[-1]

    def _rating_loss(self, batch: RatingBatch, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ratings = scores + self.model.reward_mean  # On the scale of the data, even if the mean is already stored.
        loss = regression_loss(ratings, batch.rewards[:, None].expand_as(ratings))
        return loss, {"absolute_error": (ratings.mean(dim=1) - batch.rewards).abs().mean()}

    def _pair_loss(self, batch: PairBatch, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = batch.halves(scores)
        loss = bradley_terry_loss(chosen, rejected, batch.margin[:, None], label_smoothing=self.label_smoothing)
        metrics = {}
        if self.centering_coef:
            metrics["centering"] = centering_penalty(chosen, rejected)
            loss = loss + self.centering_coef * metrics["centering"]
        chosen, rejected = chosen.mean(dim=1), rejected.mean(dim=1)
        return loss, {
            **metrics,
            "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean(),
            "chosen_reward": chosen.mean(),
            "rejected_reward": rejected.mean(),
        }

    # After training

    @torch.no_grad()
    def on_fit_end(self) -> None:
        """Center the scores and write the report.

        Lightning calls this hook at the end of every fit. It skips ``on_train_end`` when a finished run is resumed,
        because no training loop runs, and the last checkpoint is written before the scores are centered.
        """
        self.to(self.trainer.strategy.root_device)  # Lightning has already moved the module to the CPU.
        self.model.eval()
        self._center_scores()
        self._report()
        if self.device_mesh is None:  # The shards of trainer=fsdp can be gathered on their device only.
            self.cpu()

    def _center_scores(self) -> None:
        """Store the mean raw score of the demonstrations, which is then subtracted from every score.

        The result depends only on the weights and the demonstrations, so calling this twice changes nothing.

        Reference: Huang et al. 2024, detail 12 (arXiv:2403.17031).
        """
        mean = self.model.reward_mean
        mean.zero_()
        # Every rank scores its share.
        sums, own_count = torch.zeros(mean.numel(), device=mean.device), 0
        for sequences in self.data.demonstration_batches():
            scores = self._scores(sequences)
            if not sequences.is_filler:
                sums, own_count = sums + scores.sum(dim=0), own_count + len(scores)
        if count := sum(gather_objects(own_count)):
            mean.copy_((sum_over_ranks(sums) / count).view_as(mean))
            log.info("The mean score of %d demonstrations, %.4f, is now subtracted.", count, float(mean.mean()))
        elif mean.numel() > 1 and not self.centering_coef and not self.data.has_ratings:
            log.warning(
                "The offsets of the %d heads are arbitrary, so their disagreement is not meaningful. Set "
                "data.demonstrations=<path> or stage.centering_coef=0.01.",
                mean.numel(),
            )

    def _report(self) -> None:
        """Report calibration and length bias on the validation data: in metrics.json, in the loggers and in the log."""
        batches = list(self.data.report_batches())
        if not batches:
            return
        has_ratings = isinstance(batches[0], RatingBatch)
        columns: Callable[[Any], tuple[Tensor, ...]] = self._rating_columns if has_ratings else self._pair_columns
        # Every rank scores its share. A filler batch is scored as well, because the model may be sharded.
        progress = track(batches, "report", transient=True, disable=len(batches) < MIN_PROGRESS_BATCHES)
        scored = [(batch, columns(batch)) for batch in progress]
        ranks = gather_objects([values for batch, values in scored if not batch.is_filler])
        if not self.trainer.is_global_zero:
            return
        rows = map(torch.cat, zip(*chain.from_iterable(ranks), strict=True))
        report = rating_report(*rows) if has_ratings else pair_report(*rows)
        log.info("%s", summary(report))
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.output is not None:
            write_json(Path(self.output) / "metrics.json", report)
        for logger in self.loggers:
            logger.log_metrics(scalars(report), step=self.global_step)
        loggers: Any = self.loggers
        log_figure(loggers, "report", lambda: plot(report), step=self.global_step)

    def _pair_columns(self, batch: PairBatch) -> tuple[Tensor, ...]:
        """Return the arguments of ``pair_report`` for one batch."""
        lengths = batch.sequences.response_mask.sum(dim=1)
        return (*batch.halves(self._scores(batch.sequences).cpu()), *batch.halves(lengths))

    def _rating_columns(self, batch: RatingBatch) -> tuple[Tensor, ...]:
        """Return the arguments of ``rating_report`` for one batch."""
        scores = (self._scores(batch.sequences) + self.model.reward_mean).cpu()
        return scores, batch.rewards, batch.sequences.response_mask.sum(dim=1)

    def _scores(self, sequences: SequenceBatch) -> Tensor:
        """Score sequences with every head in the precision of training, [sequences, heads]."""
        with self.trainer.precision_plugin.forward_context():
            sequences = sequences.to(self.device)
            return self.model.scores(sequences.input_ids, sequences.attention_mask, **sequences.layout)

    def preflight_checks(self, datamodule: RecordDataModule) -> Iterator[Check]:
        return reward_model_checks(self, self.model, datamodule)

    def result(self) -> Result:
        return Result(self.model, self.tokenizer)
