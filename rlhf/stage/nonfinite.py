"""Losses, gradients and rollouts with NaN or infinite values, found before they change the weights."""

import logging
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.distributed import gather_objects, world_size
from rlhf.errors import ConfigError, TrainingError, listed
from rlhf.logs import metrics_log
from rlhf.models.sharding import local_tensor
from rlhf.overrides import to_override
from rlhf.stage.dumps import row_locations, write_dump
from rlhf.stage.precision import gradient_scaler
from rlhf.stage.random_state import get_random_state, set_random_state

log = logging.getLogger(__name__)
MAX_STEPS = 10  # the default of stage.max_nonfinite_steps


@dataclass
class MicroBatch:
    """A batch of the current optimizer step.

    Args:
        batch: The batch.
        random_state: State of the random number generators before its forward pass.
        loss: Its weighted loss; None until it is known.
    """

    batch: Any
    random_state: dict[str, Any]
    loss: Tensor | None = None


class NonfiniteGuard:
    """Stops training at a loss, gradient or rollout that is not finite, or skips the optimizer step and counts it.

    All ranks decide alike without communicating: a loss that is not finite is multiplied by NaN, so the gradient that
    the ranks share is not finite either, and only the norm of that gradient is read.

    Args:
        action: ``stop`` or ``skip``.
        max_steps: Number of consecutive optimizer steps that may be skipped. A rollout without updates counts as one.

    Raises:
        ConfigError: ``max_steps`` is not its default, but no step may be skipped.

    Attributes:
        count: Number of optimizer steps that have been skipped.
        step: The batches of the current optimizer step.
        skips_rollout: Whether all updates on the current rollout are skipped: its steps have no gradients.
        run: ``stage``, ``command`` and ``config`` of this run, for messages and for the dump.
        writes_dumps: Whether a dump can be written; False during pre-flight checks.
    """

    def __init__(self, action: Literal["stop", "skip"], max_steps: int) -> None:
        self.skips = action == "skip"
        if not self.skips and max_steps != MAX_STEPS:
            raise ConfigError(
                f"stage.max_nonfinite_steps={max_steps} has no effect with stage.on_nonfinite={action}.",
                "Set stage.on_nonfinite=skip or remove stage.max_nonfinite_steps.",
            )
        self.max_steps = max_steps
        self.count = 0
        self.skips_rollout = False
        self.run: dict[str, Any] = {"stage": "<stage>", "command": "python train.py stage=<stage>", "config": {}}
        self.writes_dumps = False
        self._consecutive = 0
        self._has_dump = False
        self.step: list[MicroBatch] = []

    # A training batch

    def start_batch(self, batch: Any) -> None:
        """Remember a batch and the random state before its forward pass until the optimizer step is complete."""
        self.step.append(MicroBatch(batch, get_random_state()))

    def watch(self, loss: Tensor) -> Tensor:
        """Return the loss of the batch that was started last; if it is not finite, every gradient of it is NaN.

        If a batch is computed in chunks, this is called for each of them.
        """
        earlier = self.step[-1].loss
        self.step[-1].loss = loss.detach() if earlier is None else earlier + loss.detach()
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def must_skip(self, module: Any, norm: float) -> bool:
        """Return whether the optimizer step must be skipped because its loss or its gradient is not finite.

        Args:
            module: The stage, with the gradient of the step.
            norm: Norm of the total gradient, equal on all ranks.

        Raises:
            TrainingError: The step is not finite, and training stops.
        """
        step, self.step = self.step, []
        if self.skips_rollout:  # The step has no gradient.
            self.count += 1
            return False
        if self._is_finite(module, norm, step):
            self._consecutive = 0
            return False
        faulty = [micro for micro in step if micro.loss is not None and not bool(micro.loss.isfinite())]
        loss = float(faulty[0].loss) if faulty and faulty[0].loss is not None else None
        ranks = gather_objects((loss, _nonfinite(_gradients(module)), _nonfinite(module.named_parameters())))
        self._handle(
            module,
            _describe_step(*zip(*ranks, strict=True)),
            [_faulty_rows(module, micro) for micro in faulty] or [micro.batch for micro in step],
            [{"batch": micro.batch, "random_state": micro.random_state} for micro in step],
            "The step is",
        )
        self._consecutive += 1
        self.count += 1
        return True

    @staticmethod
    def _is_finite(module: Any, norm: float, step: Sequence[MicroBatch]) -> bool:
        if gradient_scaler(module.trainer.precision_plugin) is None:
            return math.isfinite(norm)
        # With float16, the gradient scaler skips steps whose scaled gradient overflows, which is expected.
        losses = [micro.loss.float() for micro in step if micro.loss is not None]
        return all(gather_objects(bool(torch.stack(losses).isfinite().all()) if losses else True))

    # A rollout

    def must_skip_rollout(self, module: Any, columns: Mapping[str, Tensor], dump: Mapping[str, Any]) -> bool:
        """Return whether all updates on a rollout must be skipped because a value of it is not finite.

        Args:
            module: The stage.
            columns: Values of each response by name, [responses of all ranks] each, on the CPU.
            dump: What a replay needs: the ``batch`` of prompts and the ``rollout``.

        Raises:
            TrainingError: The rollout is not finite, and training stops.
        """
        faults = {name: (~values.isfinite()).nonzero().flatten().tolist() for name, values in columns.items()}
        faults = {name: rows for name, rows in faults.items() if rows}
        self.skips_rollout = bool(faults)
        if not faults:
            return False
        count = len(next(iter(columns.values())))
        parts = [
            f"the {name} of {len(rows)} of {count} responses ({float(columns[name][rows[0]])})"
            for name, rows in faults.items()
        ]
        batch, own = dump["batch"], len(dump["rollout"].input_ids)
        start = sum(gather_objects(own)[: module.global_rank])
        per_prompt = own // batch.row_count
        prompts = sorted({(row - start) // per_prompt for row in chain(*faults.values()) if 0 <= row - start < own})
        weights = gather_objects(_nonfinite(module.named_parameters()))[0]
        text = f"{listed(parts)} {'is' if len(parts) == 1 else 'are'} not finite" + _weights_text(weights)
        faulty = [batch.select(prompts)] if prompts else []
        self._handle(module, text, faulty, [dict(dump)], "The updates on this rollout are")
        self._consecutive += 1
        return True

    # What happens then

    def _handle(self, module: Any, fault: str, faulty: Sequence[Any], dump: list[dict[str, Any]], what: str) -> None:
        """Write the dump, and stop training or log that the step is skipped."""
        step = module.global_step + 1
        stops = not self.skips or self._consecutive >= self.max_steps
        own = [row for batch in faulty for row in row_locations(module, batch)]
        rows = listed(chain(*gather_objects(own)))
        message = f"stage={self.run['stage']}, optimizer step {step}: {fault}."
        details = [f"Rows: {rows}"] if rows else []
        # A run that skips steps writes only the first of them, and the one at which it stops.
        if self.writes_dumps and (stops or not self._has_dump):
            directory = Path(module.trainer.default_root_dir) / "nonfinite" / f"step{step}"
            details += self._dump(module, directory, dump, {"step": step, "fault": message, **self.run})
        if not stops:
            log.warning("%s", "\n  ".join([f"{message} {what} skipped.", *details]))
            return
        if self.skips:
            message += (
                f" stage.max_nonfinite_steps={self.max_steps}, and {self._consecutive} steps in a row were skipped."
            )
        else:
            details.append("Skip such steps instead: stage.on_nonfinite=skip")
        error = TrainingError(f"{message} The weights have not been changed.", "\n  ".join(details))
        metrics_log.error("%s", error)
        raise error

    def _dump(self, module: Any, directory: Path, dump: list[dict[str, Any]], report: Mapping[str, Any]) -> list[str]:
        """Write a dump, and return the lines of the message about it."""
        self._has_dump = True
        try:
            write_dump(module, directory, dump, report)
        except (OSError, RuntimeError) as error:  # PyTorch raises the latter if the disk is full.
            return [f"The batch and the state could not be written to {directory}: {error}"]
        return [
            f"The batch and the state before the step are in {directory}",
            f"Find the cause: {self.run['command']} {shlex.quote(to_override('replay', directory))}",
        ]

    # Checkpoints

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count, "consecutive": self._consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.count, self._consecutive = state["count"], state["consecutive"]


@torch.no_grad()
def _faulty_rows(module: Any, micro: MicroBatch) -> Any:
    """Return the rows of a batch whose own loss is not finite; all rows if that cannot be told."""
    # A loss may contain collective operations, and only some ranks may have a faulty batch.
    if world_size() > 1 or not isinstance(micro.batch, Batch):
        return micro.batch
    state = get_random_state()
    with module.trainer.precision_plugin.forward_context():
        losses = [module.training_loss(micro.batch.select([row]))[0] for row in range(micro.batch.row_count)]
    set_random_state(state)
    faulty = [row for row, loss in enumerate(losses) if not bool(loss.isfinite())]
    return micro.batch.select(faulty) if faulty else micro.batch


def _gradients(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.grad) for name, parameter in module.named_parameters() if parameter.grad is not None]


def _nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that have values that are not finite."""
    return [name for name, tensor in tensors if not bool(local_tensor(tensor).isfinite().all())]


def _describe_step(losses: Sequence[float | None], gradients: Sequence[list[str]], weights: Sequence[list[str]]) -> str:
    """Return what is not finite in an optimizer step. The arguments have one entry for each rank."""
    found = {rank: loss for rank, loss in enumerate(losses) if loss is not None}
    if found:
        where = f" on rank {listed(map(str, found))}" if len(losses) > 1 else ""
        text = f"the loss is {next(iter(found.values()))}{where}"
    elif names := dict.fromkeys(chain(*gradients)):
        text = f"the loss is finite, but the gradient of {listed(names)} is not"
    else:
        text = "the norm of the gradient is too large for float32"
    return text + _weights_text(list(dict.fromkeys(chain(*weights))))


def _weights_text(names: Sequence[str]) -> str:
    return f". Weights that were not finite before the step: {listed(names)}" if names else ""
