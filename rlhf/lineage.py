"""What files of a run were made from: whether a run can be resumed, and which outputs still belong together."""

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError, DataError
from rlhf.export import Export
from rlhf.files import sha256_of_file
from rlhf.models import ModelSource
from rlhf.overrides import leaves, to_override, to_value
from rlhf.run_names import command_in_run
from rlhf.settings import LENGTH, added_or_removed, relative, run_directory, settings
from rlhf.stages import StageInfo, stages

log = logging.getLogger(__name__)
SHOWN = 12  # digits of a SHA-256 in messages
ABSENT: Any = object()  # the value of a key that a configuration does not have


def model_digest(path: str | Path) -> str | None:
    """Return the SHA-256 of the weights in a result of a stage or in a Hugging Face folder, or else of the whole file.

    A result that is written again with equal weights has the same digest. If there is no file, the result is None.
    """
    if path and Path(path).is_dir():
        files = {file.name: sha256_of_file(file) for file in sorted(Path(path).glob("*.safetensors"))}
        return hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else None
    if not Path(path).is_file():
        return None
    try:
        return Export(str(path)).digest()
    except DataError:
        return sha256_of_file(path)


def check_resumable(
    path: str,
    recorded: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    force: bool = False,
    is_finished: bool = False,
) -> None:
    """Refuse to continue from a checkpoint or result that was made from other inputs, data or settings.

    Args:
        path: The checkpoint or the result.
        recorded: Its provenance.
        provenance: That of this run, see ``rlhf.artifacts.describe_provenance``.
        force: Accept other settings and reward functions, with a warning. Inputs and data of another SHA-256 are never
            accepted.
        is_finished: Whether nothing is left to do.

    Raises:
        ConfigError: Something has changed. The message names every key.
    """
    made = "made" if is_finished else "trained"
    for key, old, new in _replaced(_digests(recorded), _digests(provenance)):
        raise ConfigError(
            f"resume: {key} is not what {path} was {made} with: its SHA-256 was {old} and is {new}.",
            "Restore the previous file, or start over: overwrite=true",
        )
    proceed = "keep the result as it is" if is_finished else "continue with the new {}"
    for key, old, new in _replaced(_code_digests(recorded), _code_digests(provenance)):
        difference = f"{key} is not what {path} was {made} with: the SHA-256 of the file was {old} and is {new}."
        if not force:
            fix = f"Restore the previous file, start over (overwrite=true), or {proceed.format('one')}: resume=force"
            raise ConfigError(f"resume: {difference}", fix)
        log.warning("resume=force: %s", difference)
    changed = changed_settings(recorded, provenance)
    if changed and not force:
        differences = ", ".join(_difference(key, *values) for key, values in changed.items())
        restored = _restored(changed, run_directory(provenance))
        raise ConfigError(
            f"resume: {path} was {made} with other settings: {differences}.",
            f"Restore them ({restored}), start over (overwrite=true), or {proceed.format('ones')}: resume=force",
        )
    effect = (
        ", which has no effect because the stage is finished. To apply it, start over: overwrite=true"
        if is_finished
        else " from now on."
    )
    for key, values in changed.items():
        log.warning("resume=force: %s%s", _difference(key, *values), effect)


def changed_settings(recorded: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that affect training and that differ: key -> value before and now, as in ``settings``.

    Inputs and data files are compared by their content instead, and the length of training may change. Where one of
    the two has no SHA-256, such as a model or a dataset on the Hub, they are compared by their path.
    """
    by_content = {f"stage.{name}" for name in provenance.get("inputs", {})}  # or by ``_changed_paths``
    by_content |= _digests(recorded).keys() & _digests(provenance).keys()
    before, now = settings(recorded), settings(provenance)
    keys = before.keys() & now.keys() | added_or_removed(recorded, provenance)
    pairs = {key: (before.get(key, ABSENT), now.get(key, ABSENT)) for key in sorted(keys - by_content)}
    changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in LENGTH}
    paths = {key: pair for key, pair in _changed_paths(recorded, provenance).items() if pair not in changed.values()}
    return changed | paths  # Without the path of the base model, which ``model.path`` reports.


def code_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the Python files of a resolved configuration that training calls functions of, by key.

    They are those that are set as ``file.py:function``. Modules that these import are not known.
    """
    values = {key: str(value).rpartition(":")[0] for key, value in leaves(config["stage"], "stage")}
    return {key: path for key, path in values.items() if path.endswith(".py") and Path(path).is_file()}


def _absolute(value: Any, directory: str) -> Any:
    """Undo ``relative`` for a value or a list of values, in the directory of another run."""
    if isinstance(value, list):
        return [_absolute(one, directory) for one in value]
    return Path(directory) / value if isinstance(value, Path) else value


def _difference(key: str, before: Any, now: Any) -> str:
    was, is_now = ("not set" if value is ABSENT else to_value(value) for value in (before, now))
    return f"{key} was {was} and is {is_now}"


def _restored(changed: Mapping[str, tuple[Any, Any]], run: str) -> str:
    """Return the overrides that restore changed settings in the directory of a run, and which ones to leave out."""
    typed = [
        to_override(f"+{key}" if now is ABSENT else key, _absolute(before, run))
        for key, (before, now) in changed.items()
        if before is not ABSENT
    ]
    added = [key for key, (before, _) in changed.items() if before is ABSENT]
    return ", ".join(filter(None, [shlex.join(typed), f"without {' and '.join(added)}" if added else ""]))


def _changed_paths(recorded: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the inputs that come from another path, and of which no SHA-256 tells whether they have changed."""
    before, now = _input_paths(recorded), _input_paths(provenance)
    keys = before.keys() & now.keys() - (_digests(recorded).keys() & _digests(provenance).keys())
    return {key: (before[key], now[key]) for key in sorted(keys) if before[key] != now[key]}


def _input_paths(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the path or paths of each input by configuration key, as in ``settings``; None for random weights."""
    directory = run_directory(provenance)
    found: dict[str, Any] = {}
    for name, files in provenance.get("inputs", {}).items():
        matches = [re.search(r"\bpath=(['\"])(.*?)\1", str(file["source"])) for file in files]
        paths = [relative(match[2], directory) if match else None for match in matches]
        found[f"stage.{name}"] = paths[0] if len(paths) == 1 else paths
    return found


def _digests(provenance: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the SHA-256 of the files of each input and of the data, by configuration key.

    What has no SHA-256, such as a model on the Hub, is left out.
    """
    entries = {f"stage.{name}": files for name, files in provenance.get("inputs", {}).items()}
    entries |= {f"data.{name}": [file] for name, file in provenance.get("data", {}).items()}
    digests = {key: [file["sha256"] for file in files] for key, files in entries.items()}
    return {key: found for key, found in digests.items() if found and all(found)}


def _code_digests(provenance: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the SHA-256 of the Python files of the configuration, by key and path."""
    return {f"{key}={file['path']}": [file["sha256"]] for key, file in provenance.get("code", {}).items()}


def _replaced(before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """Yield the keys whose files differ, with their earlier and their current SHA-256 as messages show them."""
    for key, digests in before.items():
        if key in now and now[key] != digests:
            old, new = (", ".join(digest[:SHOWN] for digest in found) for found in (digests, now[key]))
            yield key, old, new


# Outputs of a run


def outdated_stages(run_directory: Path) -> dict[str, str]:
    """Return the stages of a run that were trained from an earlier version of one of its results.

    Returns:
        Stage -> the stage that has made the input and was trained again since.
    """
    digest = cache(model_digest)
    found = {info.name: _replaced_input(info, run_directory, digest) for info in stages().values() if info.final}
    return {name: made_by for name, made_by in found.items() if made_by is not None}


def _replaced_input(info: StageInfo, run_directory: Path, digest: Callable[[Path], str | None]) -> str | None:
    path = run_directory / info.name / str(info.final)
    if not path.is_file():
        return None
    try:
        recorded = Export(str(path)).provenance.get("inputs", {})
    except DataError:
        return None
    for keyword, made_by in info.inputs.items():
        if made_by not in stages():
            continue
        source = run_directory / made_by / str(stages()[made_by].final)
        of_run = [entry for entry in recorded.get(keyword, []) if str(source) in str(entry["source"])]
        if of_run and source.is_file() and digest(source) != of_run[0]["sha256"]:
            return made_by
    return None


def warn_about_outdated(run_directory: Path, changed: StageInfo) -> None:
    """Log a warning if results of a run were trained from an earlier result of the stage that has just been trained."""
    outdated = [name for name, made_by in outdated_stages(run_directory).items() if made_by == changed.name]
    if outdated:
        log.warning(
            "The result of %s was trained from an earlier result of stage=%s. To train again: %s",
            " and of ".join(f"stage={name}" for name in outdated),
            changed.name,
            "; ".join(command_in_run(run_directory, f"stage={name}", "overwrite=true") for name in outdated),
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
