"""The reward model's stage."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf.checks import Check
from rlhf.data import PairBatch, RatingBatch
from rlhf.errors import UserError
from rlhf.models import ModelSource, ScalarHead, ScalarModel, switch_off_dropout
from rlhf.reward.checks import checks
from rlhf.reward.objective import bradley_terry_loss, regression_loss
from rlhf.stage import Result, StageModule

log = logging.getLogger(__name__)


class RewardModule(StageModule):
    """Learns to score answers: Bradley-Terry on pairs, regression on ratings; the data decide.

    Args:
        policy: the language model whose body it starts from; null: the run's SFT model.
        input_dim: width of the hidden state the head reads; null asks the model.
        hidden_dim: width of the head's inner layers.
        num_layers: linear layers of the head; 1 is a plain linear map.
        optimizer keys: see StageModule.
    """

    def __init__(
        self, *, policy: ModelSource, input_dim: int | None = None, hidden_dim: int = 128, num_layers: int = 1,
        **optimizer: Any,
    ) -> None:  # fmt: skip
        super().__init__(**optimizer)
        self.source = policy
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.model: ScalarModel | None = None

    @property
    def figure_of_merit(self) -> str:  # type: ignore[override]
        return "val/accuracy" if "val/accuracy" in self.trainer.callback_metrics else "val/loss"

    def configure_model(self) -> None:
        if self.model is None:
            lm = switch_off_dropout(self.source.language_model(self.tokenizer))
            width = lm.config.get_text_config().hidden_size
            if self.input_dim not in (None, width):
                raise UserError(f"stage.input_dim={self.input_dim}, but the model's hidden state is {width} wide",
                                f"stage.input_dim={width}, or null")  # fmt: skip
            self.model = ScalarModel(lm.base_model, ScalarHead(width, self.hidden_dim, self.num_layers))

    def training_step(self, batch: PairBatch | RatingBatch, batch_idx: int) -> Tensor:
        loss, numbers = self.judge(batch)
        self.log_train({f"train/{name}": value for name, value in numbers.items()})
        return loss * batch.share

    def validation_step(self, batch: PairBatch | RatingBatch, batch_idx: int) -> None:
        self.log_val(self.judge(batch)[1], batch.loss_terms)

    def judge(self, batch: PairBatch | RatingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and the numbers to log."""
        scores = self.model(batch.texts.tokens, batch.texts.mask)
        if isinstance(batch, RatingBatch):
            loss = regression_loss(scores, batch.rewards)
            error = (scores - batch.rewards).abs().mean()
            return loss, {"loss": loss, "absolute_error": error, "mean_reward": scores.mean()}
        chosen, rejected = batch.halves(scores)
        loss = bradley_terry_loss(chosen, rejected, batch.margin)
        return loss, {
            "loss": loss,
            "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean(),
            "mean_reward": scores.mean(),
            "chosen_reward": chosen.mean(),
            "rejected_reward": rejected.mean(),
        }

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Store the mean score of the demonstrations; from now on it is subtracted (arXiv:2403.17031, detail 12)."""
        self.model.eval()
        scores = [
            self.model(batch.tokens.to(self.device), batch.mask.to(self.device))
            for batch in self.trainer.datamodule.demonstration_batches()
        ]
        if scores:
            self.model.reward_mean += torch.cat(scores).mean()
            log.info("mean score of %d demonstrations: %.4f, subtracted from now on", sum(map(len, scores)),
                     float(self.model.reward_mean))  # fmt: skip

    def checks(self, datamodule: Any) -> Iterator[Check]:
        return checks(self, datamodule)

    def result(self) -> Result:
        return Result(self.model, self.tokenizer)
