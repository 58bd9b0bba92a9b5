"""What files of a run were made from: whether a checkpoint can be resumed, and which outputs still belong together."""

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlhf.errors import ConfigError, DataError
from rlhf.export import Export
from rlhf.files import sha256_of_file
from rlhf.models import ModelSource
from rlhf.stages import StageInfo, policy_stages, stages

log = logging.getLogger(__name__)
SHOWN = 12  # digits of a SHA-256 in messages


def model_digest(path: str | Path) -> str | None:
    """Return the SHA-256 of the weights in a result of a stage, or else of the whole file; None if there is no file.

    A result that is written again with equal weights has the same digest.
    """
    if not Path(path).is_file():
        return None
    try:
        return Export(str(path)).digest()
    except DataError:
        return sha256_of_file(path)


def check_resumable(checkpoint: str, provenance: Mapping[str, Any]) -> None:
    """Reject a checkpoint whose run had other inputs or other data than this one.

    Args:
        checkpoint: The checkpoint to resume from.
        provenance: That of this run, see ``rlhf.artifacts.describe_provenance``.

    Raises:
        ConfigError: The content of an input or of a data file has changed.
    """
    recorded = _recorded_digests(checkpoint)
    for key, present in _digests(provenance).items():
        if key in recorded and recorded[key] != present:
            before, now = (", ".join(digest[:SHOWN] for digest in digests) for digests in (recorded[key], present))
            raise ConfigError(
                f"resume=true: {key} is not what {checkpoint} was trained with: its SHA-256 was {before} and is {now}.",
                "Restore the previous file, or start over: resume=false",
            )


def _recorded_digests(checkpoint: str) -> dict[str, list[str]]:
    path = Path(checkpoint)
    content = torch.load(path / "meta.pt" if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True)
    return _digests(json.loads(content["rlhf"]["provenance"])) if "rlhf" in content else {}


def _digests(provenance: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the SHA-256 of the files of each input and of the data, by configuration key.

    What has no SHA-256, such as a model on the Hub, is left out.
    """
    entries = {f"stage.{name}": files for name, files in provenance.get("inputs", {}).items()}
    entries |= {f"data.{name}": [file] for name, file in provenance.get("data", {}).items()}
    digests = {key: [file["sha256"] for file in files] for key, files in entries.items()}
    return {key: found for key, found in digests.items() if found and all(found)}


# Outputs of a run


def outdated_stages(run_directory: Path) -> list[StageInfo]:
    """Return the stages of a run whose policy was trained from an earlier version of the run's own input."""
    digest = cache(model_digest)
    return [info for info in policy_stages() if _is_outdated(info, run_directory, digest)]


def _is_outdated(info: StageInfo, run_directory: Path, digest: Callable[[Path], str | None]) -> bool:
    made_by = stages().get(info.inputs.get("policy", ""))
    path = run_directory / info.name / str(info.final)
    if made_by is None or not path.is_file():
        return False
    parent = run_directory / made_by.name / str(made_by.final)
    try:
        entries = Export(str(path)).provenance.get("inputs", {}).get("policy", [])
    except DataError:
        return False
    of_run = [entry for entry in entries if str(parent) in str(entry["source"])]
    return bool(of_run) and parent.is_file() and digest(parent) != of_run[0]["sha256"]


def warn_about_outdated(run_directory: Path, changed: StageInfo) -> None:
    """Log a warning if results of a run were trained from an earlier result of the stage that has just been trained."""
    outdated = [info for info in outdated_stages(run_directory) if changed.name in info.inputs.values()]
    if outdated:
        log.warning(
            "The result of %s was trained from an earlier result of stage=%s. To train again: %s",
            " and of ".join(f"stage={info.name}" for info in outdated),
            changed.name,
            "; ".join(f"python train.py stage={info.name} run={run_directory.name}" for info in outdated),
        )


def warn_about_parents(policies: Mapping[str, ModelSource]) -> None:
    """Log a warning if policies that are compared were trained from different models."""
    parents = {name: parent for name, source in policies.items() if (parent := _parent(source)) is not None}
    if len(set(parents.values())) < 2:
        return
    own = {model_digest(getattr(source, "path", "")): name for name, source in policies.items()}
    roots = {name: _root(name, parents, own) for name in parents}
    groups = [[name for name in roots if roots[name] == root] for root in dict.fromkeys(roots.values())]
    if len(groups) > 1:
        log.warning(
            "The policies were trained from different models, so their comparison also measures the difference between "
            "these: %s.",
            "; ".join(", ".join(group) for group in groups),
        )


def _parent(source: Any) -> str | None:
    """Return what identifies the model that a policy was trained from: itself, if that is a base model."""
    if not isinstance(source, Export):
        return None
    provenance = source.provenance
    if provenance.get("stage") == "sft":
        return model_digest(source.path)
    entries = provenance.get("inputs", {}).get("policy", [])
    return (entries[0]["sha256"] or str(entries[0]["source"])) if entries else None


def _root(name: str, parents: Mapping[str, str], own: Mapping[str | None, str]) -> str:
    """Follow the parents of a policy through the other policies."""
    seen: set[str] = set()
    while name not in seen and own.get(parents.get(name)) not in (None, name):
        seen.add(name)
        name = own[parents[name]]
    return parents.get(name, name)
