"""The strategy of ``trainer=fsdp``: FSDP2 through Lightning, with checkpoints that are never incomplete."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from rlhf.checkpoint.shards import ShardReader, load_shards
from rlhf.errors import ConfigError
from rlhf.files import LAST, METADATA, PART, PREVIOUS, remove
from rlhf.models import base_weights, full_state_dict

OLD = ".old"  # suffix of a directory that is being replaced


class FSDP2Strategy(ModelParallelStrategy):
    """Shards the models of a stage over all devices; see ``rlhf.models.sharding``.

    Lightning's own class has three differences: a checkpoint directory may be left incomplete, a checkpoint of another
    strategy is loaded with the moments of other parameters, and extra state, such as running moments of scores, is not
    restored from a file.

    Args:
        save_distributed_checkpoint: true: a checkpoint is a directory, to which every rank writes its shards. false: a
            checkpoint is one file, and rank 0 gathers all weights and moments in its memory to write it. A run on any
            number of devices continues from either. Without ``trainer=fsdp``, a run continues from a file only.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Writing

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return dict(super().lightning_module_state_dict())
        assert self.model is not None
        return full_state_dict(self.model)  # Tied weights are written once.

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint and not path.is_dir():
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # A file takes the place of a directory in the same way: Lightning would delete the directory first.
        part = path.with_name(path.name + PART)
        if self.is_global_zero:
            remove(part)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            replace_checkpoint(path, part)
        self.barrier()

    # Loading

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        return self._load_directory(path) if path.is_dir() else self._load_file(path)

    def _load_directory(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        left_out = base_weights(self.model)
        state = {name: value for name, value in get_model_state_dict(self.model).items() if name not in left_out}
        load_shards({"state_dict": state}, path)
        set_model_state_dict(self.model, state, options=StateDictOptions(strict=not left_out))
        stored = ShardReader(path).read_metadata().state_dict_metadata
        for index, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{index}"
            state_of_optimizer: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer)
            moments: dict[str, Any] = state_of_optimizer["state"]
            for name in list(moments):
                if not any(f"{key}.state.{name}.{kind}" in stored for kind in moments[name]):
                    del moments[name]
            load_shards({key: state_of_optimizer}, path)
            self._set_moments(optimizer, state_of_optimizer, full=False)
        metadata = torch.load(path / METADATA, map_location="cpu", weights_only=True)
        return {**metadata, "state_dict": state}

    def _load_file(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        options = StateDictOptions(full_state_dict=True, strict=not base_weights(self.model))
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self._set_moments(optimizer, self._with_names(optimizer, state), full=True)
        return checkpoint

    def _set_moments(self, optimizer: Optimizer, state: dict[str, Any], *, full: bool) -> None:
        """Load an optimizer state, which lacks the parameters that have not been trained yet, such as a policy while
        only its critic is trained.
        """
        assert self.model is not None
        trained = set(state["state"])
        options = StateDictOptions(full_state_dict=full, strict=False)
        set_optimizer_state_dict(self.model, optimizer, state, options=options)
        for name, parameter in self.model.named_parameters():
            if name not in trained:
                optimizer.state.pop(parameter, None)  # PyTorch has added moments of 0, as if a step had been made.

    def _with_names(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer with the names of its parameters instead of their numbers.

        A sharded run numbers them in the order of the model, and any other run in the order of the optimizer's groups.
        Within each group, the order is the same.
        """
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        name_of: dict[int, str] = {}
        groups = []
        for saved, current in zip(state["param_groups"], optimizer.param_groups, strict=True):
            own = [names[parameter] for parameter in current["params"]]
            name_of.update(zip(saved["params"], own, strict=True))
            groups.append({**saved, "params": own})
        moments = {name_of[number]: values for number, values in state["state"].items()}
        return {"state": moments, "param_groups": groups}


def without_sharding(cfg: DictConfig) -> DictConfig:
    """Return the configuration of a stage with ``trainer.strategy=ddp`` instead of ``trainer=fsdp``.

    Evaluation holds one whole model at a time on each device.
    """
    strategy = cfg.trainer.strategy
    if not OmegaConf.is_dict(strategy) or strategy._target_ != f"{__name__}.{FSDP2Strategy.__name__}":
        return cfg
    cfg = cfg.copy()
    cfg.trainer.strategy = "ddp"
    return cfg


def check_loadable(checkpoint: str | None, strategy: object) -> None:
    """Refuse to continue from a checkpoint directory without a strategy that can read it.

    Raises:
        ConfigError: A checkpoint directory needs ``trainer=fsdp``.
    """
    if checkpoint is not None and Path(checkpoint).is_dir() and not isinstance(strategy, FSDP2Strategy):
        raise ConfigError(
            f"resume=true: {checkpoint} is a directory with the shards of a run with trainer=fsdp, and no other "
            "trainer can read it.",
            "Set trainer=fsdp. One device is enough: trainer=fsdp trainer.devices=1",
        )


def replace_checkpoint(path: Path, part: Path) -> None:
    """Rename a complete checkpoint to ``path``, and ``last.ckpt`` that was there to ``previous.ckpt``."""
    if path.exists():
        old = path.with_name(PREVIOUS if path.name == LAST else path.name + OLD)
        remove(old)
        os.replace(path, old)
    os.replace(part, path)
    remove(path.with_name(path.name + OLD))
