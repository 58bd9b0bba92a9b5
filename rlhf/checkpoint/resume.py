"""How a stage starts: from the beginning, from a checkpoint of an earlier run, or not at all because it is finished."""

import logging
import zipfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf.errors import ConfigError, DataError
from rlhf.export import Export
from rlhf.export.content import parse_json
from rlhf.files import LAST, LOCK, LOGGED, METADATA, PREVIOUS, is_locked, remove
from rlhf.lineage import check_resumable
from rlhf.models.opening import read_archive
from rlhf.settings import LENGTH, settings
from rlhf.stages import stages

log = logging.getLogger(__name__)


def check_start(cfg: DictConfig, output: Path) -> None:
    """Reject a run that would replace an earlier one without being asked to.

    Raises:
        ConfigError: The stage has a result or a checkpoint, and neither ``resume`` nor ``overwrite`` is set; or both
            are.
    """
    if cfg.resume and cfg.overwrite:
        raise ConfigError("resume continues a run, and overwrite=true starts over.", "Remove one of the two.")
    replaces = not (cfg.resume or cfg.overwrite or cfg.check == "only" or cfg.trainer.fast_dev_run)
    if replaces and (earlier := earlier_files(cfg, output)):
        raise ConfigError(
            f"stage={cfg.stage_name} has been run before: {earlier[0]} exists.",
            "Set resume=true to continue that run, overwrite=true to start over, or run=<name> for another run.",
        )


def earlier_files(cfg: DictConfig, output: Path) -> list[Path]:
    """Return the result and the checkpoints that an earlier run of a training stage has left in its directory."""
    final = stages()[cfg.stage_name].final
    names = [] if final is None else [final, f"checkpoints/{LAST}", f"checkpoints/{PREVIOUS}"]
    return [output / name for name in names if (output / name).exists()]


def remove_earlier(cfg: DictConfig, output: Path, later: Sequence[DictConfig] = ()) -> None:
    """Delete what an earlier run of the stage has left, so that it cannot be mistaken for that of this run.

    This is called before the run has written a checkpoint. Files of the earlier run that it starts from stay.

    Args:
        cfg: The configuration of the stage.
        output: Its directory.
        later: The configurations of the later steps of a pipeline. If the pipeline is interrupted, ``resume=true``
            must not take what they have left for results of the same pipeline.
    """
    kept, made = _chosen_inputs(cfg), [output.resolve()]
    _remove_results(cfg, output, kept)
    for config in later:
        directory = Path(config.paths.output)
        # The pipeline makes the inputs of this step that are in the directories of the steps before it.
        kept |= {path for path in _chosen_inputs(config) if not any(map(path.is_relative_to, made))}
        made.append(directory.resolve())
    for config in later:
        directory = Path(config.paths.output)
        if directory != output and not is_locked(directory / LOCK):  # The step itself reports who has locked it.
            _remove_results(config, directory, kept)
            for name in (*LOGGED, f"{config.stage_name}.log"):
                remove(directory / name)


def _remove_results(cfg: DictConfig, directory: Path, kept: Container[Path]) -> None:
    """Delete the result, the checkpoints and the exported files of a stage, except those that are kept."""
    checkpoints = (directory / "checkpoints").glob("*.ckpt")
    for path in (*earlier_files(cfg, directory), *checkpoints, directory / "metrics.json", directory / "hf"):
        if path.resolve() not in kept:
            remove(path)


def _chosen_inputs(cfg: DictConfig) -> set[Path]:
    """Return the paths of the models that a configuration names as inputs."""
    values = [cfg.model.get("path"), *(cfg.stage[key] for key in stages()[cfg.stage_name].inputs)]
    chosen = [path for value in values if value for path in ([value] if isinstance(value, str) else value)]
    return {Path(path).resolve() for path in chosen}


def finished_result(cfg: DictConfig, output: Path, provenance: Mapping[str, Any]) -> Export | None:
    """Return the result of a stage that ``resume=true`` finds finished; None if there is something left to train.

    A finished run is extended by another ``trainer.max_epochs``, ``trainer.max_steps`` or ``trainer.max_time``.

    Raises:
        ConfigError: The result was made from other inputs, data or settings.
    """
    path = output / str(stages()[cfg.stage_name].final)
    if not cfg.resume or not path.is_file():
        return None
    result = Export(str(path))
    recorded, current = settings(result.provenance), settings(provenance)
    if any(recorded.get(key) != current.get(key) for key in LENGTH):
        return None
    check_resumable(result.path, result.provenance, provenance, force=cfg.resume == "force", is_finished=True)
    return result


def resume_checkpoint(cfg: DictConfig, output: Path, provenance: Mapping[str, Any]) -> str | None:
    """Return the checkpoint that ``resume=true`` continues from, the newest intact one; None without ``resume``.

    Raises:
        ConfigError: There is no checkpoint, or it was made from other inputs, data or settings.
        DataError: Every checkpoint is corrupt.
    """
    if not cfg.resume:
        return None
    directory = output / "checkpoints"
    paths = [directory / name for name in (LAST, PREVIOUS) if (directory / name).exists()]
    if not paths:
        raise ConfigError(
            f"resume=true requires a checkpoint, but there is no {directory / LAST}.", "Set resume=false."
        )
    damages = {path: damage(path) for path in paths}
    for path, reason in damages.items():
        if reason is None:
            check_resumable(str(path), _provenance(path), provenance, force=cfg.resume == "force")
            return str(path)
        log.warning("%s is corrupt: %s.", path, reason)
    raise DataError(
        f"resume=true: {' and '.join(map(str, damages))} cannot be read: {next(iter(damages.values()))}.",
        "Start over: overwrite=true",
    )


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is intact.

    PyTorch writes a zip archive with a CRC-32 of each record, and all of them are verified. Of a checkpoint directory
    (``trainer=fsdp``), the shards are not.
    """
    file = path / METADATA if path.is_dir() else path
    try:
        with zipfile.ZipFile(file) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        return str(error)
    return None if record is None else f"the checksum of its record {record} is wrong"


def _provenance(path: Path) -> dict[str, Any]:
    """Return the provenance in a checkpoint; empty if it has none."""
    file = path / METADATA if path.is_dir() else path
    header = read_archive(file).get("rlhf")
    return parse_json(header["provenance"], str(path), "provenance") if isinstance(header, dict) else {}
