"""Dumps of training steps that are not finite: batches, random state and the state of training, for ``replay=``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.data import Batch, RecordDataModule
from rlhf.distributed import barrier, is_rank_zero
from rlhf.errors import ConfigError
from rlhf.files import atomic_write, remove, write_json

STATE, REPORT = "state.ckpt", "report.json"


def batches_file(rank: int) -> str:
    """Return the name of the file with the batches of a rank."""
    return f"batches_rank{rank}.pt"


def row_locations(module: Any, batch: Any) -> list[str]:
    """Return where the rows of a training batch are in the data; nothing if the data module does not know it."""
    data = getattr(module.trainer, "datamodule", None)
    return data.locations(batch) if isinstance(data, RecordDataModule) and isinstance(batch, Batch) else []


def write_dump(module: Any, directory: Path, items: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """Write what a replay needs. All ranks call this function.

    Args:
        module: The stage. Its weights, optimizer and random state are written as a checkpoint.
        directory: Directory of the dump.
        items: The batches of this rank, each with what belongs to it.
        report: Step and fault, and stage, command and configuration of the run.
    """
    locations = [row_locations(module, item["batch"]) for item in items]
    if is_rank_zero():
        remove(directory)  # It may hold a dump of an earlier run.
    barrier()
    content = [{**_packed(item), "locations": rows} for item, rows in zip(items, locations, strict=True)]
    atomic_write(directory / batches_file(module.global_rank), lambda file: torch.save(content, file))
    module.trainer.save_checkpoint(directory / STATE)
    if is_rank_zero():
        write_json(directory / REPORT, {**report, "rows": locations})
    barrier()


def read_report(directory: Path) -> dict[str, Any]:
    """Return the report of a dump.

    Raises:
        ConfigError: The directory contains no dump.
    """
    if not all((directory / name).exists() for name in (REPORT, STATE, batches_file(0))):
        raise ConfigError(
            f"replay={directory}: the directory contains no dump of a training step.",
            "Set replay=outputs/<run>/<stage>/nonfinite/step<n>",
        )
    return dict(json.loads((directory / REPORT).read_text(encoding="utf-8")))


def read_batches(directory: Path, types: Mapping[str, type]) -> list[dict[str, Any]]:
    """Return the batches of all ranks in a dump.

    Args:
        directory: Directory of the dump.
        types: The dataclasses that a dump may contain, by name.
    """
    paths = sorted(directory.glob(batches_file(0).replace("0", "*")))
    return [_unpacked(item, types) for path in paths for item in torch.load(path, weights_only=True)]


def _packed(value: Any) -> Any:
    """Return a value as tensors, numbers, texts, lists and dictionaries, which are read without pickle."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if is_dataclass(value) and not isinstance(value, type):
        content = {item.name: _packed(getattr(value, item.name)) for item in fields(value) if item.init}
        return {"type": type(value).__name__, "fields": content}
    if isinstance(value, Mapping):
        return {str(key): _packed(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(one) for one in value]
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)


def _unpacked(value: Any, types: Mapping[str, type]) -> Any:
    if isinstance(value, dict):
        content = {key: _unpacked(one, types) for key, one in value.items()}
        return types[content["type"]](**content["fields"]) if content.keys() == {"type", "fields"} else content
    return [_unpacked(one, types) for one in value] if isinstance(value, list) else value
