"""The reward model's stage."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import track
from torch import Tensor

from rlhf.check import Check
from rlhf.data import PairBatch, RatingBatch, SequenceBatch
from rlhf.errors import UserError
from rlhf.models import ModelSource, ScalarHead, ScalarModel, disable_dropout
from rlhf.reward.objective import bradley_terry_loss, centering_penalty, ensemble_std, regression_loss
from rlhf.reward.preflight import checks
from rlhf.reward.report import pair_report, rating_report
from rlhf.reward.report_output import as_text, picture, scalars, write_json
from rlhf.stage import Metrics, Result, StageModule

log = logging.getLogger(__name__)
LONG = 20  # batches from which on a progress bar is shown


class RewardModule(StageModule):
    """Learns to score answers: Bradley-Terry on pairs, regression on ratings; the data decide.

    Args:
        policy: the language model whose body it starts from; null: the run's SFT model.
        input_dim: width of the hidden state the head reads; null asks the model.
        hidden_dim: width of the head's inner layers.
        num_layers: linear layers of the head; 1 is a plain linear map.
        num_heads: heads of independent first weights, each with its own loss; a score is their mean, and PPO can
            charge for their spread.
        label_smoothing: probability that a label is the wrong way round, from 0 to below 1/2; pairs only.
        centering_coef: weight of the centring penalty, nats per squared reward unit; pairs only.
        output: folder of metrics.json, the report on the validation set; null for none.
        optimizer keys: see StageModule.
    """

    def __init__(
        self,
        *,
        policy: ModelSource,
        input_dim: int | None = None,
        hidden_dim: int = 128,
        num_layers: int = 1,
        num_heads: int = 1,
        label_smoothing: float = 0.0,
        centering_coef: float = 0.0,
        output: str | None = None,
        **optimizer: Any,
    ) -> None:
        super().__init__(**optimizer)
        if not 0 <= label_smoothing < 0.5:
            raise UserError(
                f"stage.label_smoothing={label_smoothing} is no probability from 0 to below 1/2",
                "stage.label_smoothing=0.1",
            )
        if centering_coef < 0:
            raise UserError(
                f"stage.centering_coef={centering_coef} would drive scores away from 0", "stage.centering_coef=0.01"
            )
        self.source = policy
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.label_smoothing = label_smoothing
        self.centering_coef = centering_coef
        self.output = output
        self.model: ScalarModel | None = None

    @property
    def monitor(self) -> str:  # type: ignore[override]
        return "val/accuracy" if "val/accuracy" in self.trainer.callback_metrics else "val/loss"

    def setup(self, stage: str) -> None:
        """Refuse keys that only mean something for pairs, before any weight is loaded."""
        if stage == "fit" and self.trainer.datamodule.has_ratings:
            for key in ("label_smoothing", "centering_coef"):
                if value := getattr(self, key):
                    raise UserError(f"stage.{key}={value} speaks of pairs, and the data are ratings", f"stage.{key}=0")

    def configure_model(self) -> None:
        if self.model is None:
            lm = disable_dropout(self.source.language_model(self.tokenizer))
            width = lm.config.get_text_config().hidden_size
            if self.input_dim not in (None, width):
                raise UserError(
                    f"stage.input_dim={self.input_dim}, but the model's hidden state is {width} wide",
                    f"stage.input_dim={width}, or null",
                )
            self.model = ScalarModel(lm.base_model, ScalarHead(width, self.hidden_dim, self.num_layers, self.num_heads))

    # learning

    def on_train_start(self) -> None:
        super().on_train_start()
        self.model.reward_mean.zero_()  # Training uses raw scores, even if the checkpoint already stores a mean.

    def training_loss(self, batch: PairBatch | RatingBatch) -> tuple[Tensor, Metrics]:
        loss, metrics = self.score(batch)
        return loss * batch.loss_weight, {f"train/{name}": value for name, value in metrics.items()}

    def validation_step(self, batch: PairBatch | RatingBatch, batch_idx: int) -> None:
        self.log_val(self.score(batch)[1], batch.loss_terms)

    def score(self, batch: PairBatch | RatingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and the numbers to log."""
        scores = self.model.scores(batch.sequences.input_ids, batch.sequences.attention_mask)  # [texts, heads]
        on_kind = self._score_ratings if isinstance(batch, RatingBatch) else self._score_pairs
        loss, numbers = on_kind(batch, scores)
        if self.num_heads > 1:
            numbers["spread"] = ensemble_std(scores)
        return loss, {"loss": loss, **numbers, "mean_reward": scores.mean()}

    def _score_ratings(self, batch: RatingBatch, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rated = scores + self.model.reward_mean  # on the scale of the data, also once the mean is stored
        loss = regression_loss(rated, batch.rewards[:, None].expand_as(rated))
        return loss, {"absolute_error": (rated.mean(dim=1) - batch.rewards).abs().mean()}

    def _score_pairs(self, batch: PairBatch, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = batch.halves(scores)
        loss = bradley_terry_loss(chosen, rejected, batch.margin[:, None], label_smoothing=self.label_smoothing)
        numbers = {}
        if self.centering_coef:
            numbers["centering"] = centering_penalty(chosen, rejected)
            loss = loss + self.centering_coef * numbers["centering"]
        chosen, rejected = chosen.mean(dim=1), rejected.mean(dim=1)
        return loss, {
            **numbers,
            "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean(),
            "chosen_reward": chosen.mean(),
            "rejected_reward": rejected.mean(),
        }

    # after learning

    @torch.no_grad()
    def on_fit_end(self) -> None:
        """Center the scores and write the report.

        Lightning calls this hook at the end of every fit. It skips ``on_train_end`` when a finished run is resumed,
        because no training loop runs, and the last checkpoint is written before the scores are centered.
        """
        self.to(self.trainer.strategy.root_device)  # Lightning has already moved the module to the CPU.
        self.model.eval()
        self._centre()
        if self.trainer.is_global_zero:
            self._report()
        self.cpu()

    def _centre(self) -> None:
        """Store the mean raw score of the demonstrations, to be subtracted (arXiv:2403.17031, detail 12).

        The result depends only on the weights and the demonstrations, so calling this twice changes nothing.
        """
        data = self.trainer.datamodule
        self.model.reward_mean.zero_()
        scores = [self._scores(texts) for texts in data.demonstration_batches()]
        if scores:
            self.model.reward_mean.copy_(torch.cat(scores).mean(dim=0).view_as(self.model.reward_mean))
            log.info(
                "mean score of %d demonstrations: %.4f, subtracted from now on",
                sum(map(len, scores)),
                float(self.model.reward_mean.mean()),
            )
        elif self.num_heads > 1 and not self.centering_coef and not data.has_ratings:
            log.warning(
                "nothing ties the zeros of the %d heads together, so that their spread says little: "
                "data.demonstrations=<file> does, or stage.centering_coef=0.01",
                self.num_heads,
            )

    def _report(self) -> None:
        """Calibration and length bias on the validation data: metrics.json, TensorBoard, a few lines in the log."""
        batches = list(self.trainer.datamodule.report_batches())
        if not batches:
            return
        report = self._rating_report(batches) if isinstance(batches[0], RatingBatch) else self._pair_report(batches)
        log.info("%s", as_text(report))
        if self.trainer.fast_dev_run:
            return
        if self.output is not None:
            write_json(report, Path(self.output) / "metrics.json")
        for logger in self.loggers:
            logger.log_metrics(scalars(report), step=self.global_step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("report", picture(report), self.global_step)

    def _pair_report(self, batches: list[PairBatch]) -> dict[str, Any]:
        columns = [
            (
                *batch.halves(self._scores(batch.sequences).cpu()),
                *batch.halves(batch.sequences.response_mask.sum(dim=1)),
            )
            for batch in track(batches, "report", transient=True, disable=len(batches) < LONG)
        ]
        return pair_report(*map(torch.cat, zip(*columns, strict=True)))

    def _rating_report(self, batches: list[RatingBatch]) -> dict[str, Any]:
        columns = [
            (
                (self._scores(batch.sequences) + self.model.reward_mean).cpu(),
                batch.rewards,
                batch.sequences.response_mask.sum(dim=1),
            )
            for batch in track(batches, "report", transient=True, disable=len(batches) < LONG)
        ]
        return rating_report(*map(torch.cat, zip(*columns, strict=True)))

    def _scores(self, texts: SequenceBatch) -> Tensor:
        """What each head says of some texts, [texts, heads], in the precision of training."""
        with self.trainer.precision_plugin.forward_context():
            return self.model.scores(texts.input_ids.to(self.device), texts.attention_mask.to(self.device))

    def preflight_checks(self, datamodule: Any) -> Iterator[Check]:
        return checks(self, datamodule)

    def result(self) -> Result:
        return Result(self.model, self.tokenizer)
