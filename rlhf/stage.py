"""What every training stage does the same way: optimizer, schedule, names of logged numbers, what it leaves behind."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from rlhf.data import Batch
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.preflight import Check

SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class Result:
    """What a stage hands on: a causal language model, or a scalar model with its head."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    extra: dict[str, Any] = field(default_factory=dict)


class StageModule(lightning.LightningModule):
    """A LightningModule without a loss and without data: a stage adds both.

    Args:
        learning_rate: highest learning rate of AdamW.
        weight_decay: of matrices; vectors (norms, biases) have none.
        betas: decay rates of AdamW's two moments.
        eps: of AdamW.
        schedule: ``cosine`` or ``linear`` to 0, or ``constant``.
        warmup_ratio: share of all steps over which the learning rate rises from 0.
    """

    monitor = ""  # the logged number that train.py returns, for sweeps

    def __init__(
        self,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: str = "cosine",
        warmup_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise UserError(f"stage.schedule={schedule} is none of {', '.join(SCHEDULES)}", "stage.schedule=cosine")
        if not 0 <= warmup_ratio < 1:
            raise UserError(f"stage.warmup_ratio={warmup_ratio} is not a share of the steps, from 0 to below 1")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = tuple(betas)
        self.eps = eps
        self.schedule = schedule
        self.warmup_ratio = warmup_ratio
        self.tokenizer: PreTrainedTokenizerBase | None = None  # set by run.py, with the datamodule's
        self.numbers: dict[str, Any] = {}  # what was logged last; a callback that has read them takes them away
        self._since = _Tally()

    @abstractmethod
    def result(self) -> Result:
        """What the stage leaves behind; ``export.py`` writes it."""

    def checks(self, datamodule: Any) -> "Iterator[Check]":
        """What the stage proves of itself with ``check=true``, before it trains."""
        yield from ()

    # optimizer and schedule

    def trainable_modules(self) -> Iterator[tuple[nn.Module, float]]:
        """What is trained, each part with its learning rate."""
        yield self, self.learning_rate

    def configure_optimizers(self) -> Any:
        groups = []
        for part, learning_rate in self.trainable_modules():
            parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
            for decay, chosen in (
                (self.weight_decay, [p for p in parameters if p.ndim > 1]),
                (0.0, [p for p in parameters if p.ndim <= 1]),
            ):
                if chosen:
                    groups.append({"params": chosen, "lr": learning_rate, "weight_decay": decay})
        # Lightning refuses to clip the gradients of a fused optimizer under any mixed precision, with or without a
        # gradient scaler. None lets PyTorch choose among its other implementations.
        fused = None if isinstance(self.trainer.precision_plugin, MixedPrecision) else True
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(name, optimizer, int(self.warmup_ratio * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # numbers

    def log_train(self, values: Mapping[str, Any]) -> None:
        """Log numbers of a training step under their full names."""
        self.numbers |= {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
        self.log_dict(dict(values), on_step=True, on_epoch=False, batch_size=1)

    def log_val(self, values: Mapping[str, Any], weight: int) -> None:
        """Log numbers of a validation batch; the epoch's number is their mean, weighted by ``weight`` terms."""
        names = {f"val/{name}": value for name, value in values.items()}
        self.log_dict(names, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)

    def on_train_start(self) -> None:
        self._since = _Tally()
        self.restore_random_state()
        if self.global_rank:  # every rank draws answers of its own
            torch.manual_seed(int(torch.randint(2**31, ())) + self.global_rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, Batch):
            self._since.tokens += batch.token_count
            self._since.sequences += batch.sequence_count

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_train({**self.optimizer_metrics(optimizer), **self.throughput()})

    def optimizer_metrics(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Norm of the whole gradient before clipping, and the learning rate."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return {"grad_norm": nn.utils.get_total_norm(gradients), "lr": optimizer.param_groups[0]["lr"]}

    def throughput(self) -> dict[str, float]:
        """Real tokens and sequences a second, over all devices, since this was last asked."""
        seconds = max(time.perf_counter() - self._since.started, 1e-9)
        rates = {
            "throughput/tokens_per_s": self._since.tokens * self.trainer.world_size / seconds,
            "throughput/sequences_per_s": self._since.sequences * self.trainer.world_size / seconds,
        }
        self._since = _Tally()
        return rates

    def log_samples(self, samples: list[tuple[str, str]], name: str = "samples") -> None:
        """Prompts and answers as a table in TensorBoard's text tab."""
        table = "\n".join(f"| {_cell(prompt)} | {_cell(answer)} |" for prompt, answer in samples)
        for logger in self.loggers:
            if isinstance(logger, lightning.pytorch.loggers.TensorBoardLogger):
                logger.experiment.add_text(name, f"| prompt | answer |\n|---|---|\n{table}", self.global_step)

    # the random state travels with the checkpoint, so that a resumed run draws what the old one would have drawn

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint.get("random_state")

    def restore_random_state(self) -> None:
        """Take up the random state of the checkpoint that training goes on from, if there is one."""
        state = getattr(self, "_random_state", None)
        if state is not None:
            torch.set_rng_state(state["cpu"].cpu())
            if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
                torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])


def as_fraction(hits: Tensor, mask: Tensor) -> Tensor:
    """Share of the True entries of ``mask`` that are True in ``hits``."""
    return (hits & mask).sum() / mask.sum().clamp(min=1)


@dataclass
class _Tally:
    """Tokens and sequences since a point in time."""

    tokens: int = 0
    sequences: int = 0
    started: float = field(default_factory=time.perf_counter)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
