"""Settings in a report: configuration, overrides, data with their hashes, versions, and commands to repeat a run."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlhf.overrides import leaves
from rlhf.report.records import RunRecord, StageRecord
from rlhf.report.tables import Table, code, text

# Settings that name directories or the run itself, so they differ between runs that are otherwise equal.
OWN = ("paths", "run", "hydra", "resume", "overwrite", "replay", "published")
NOT_RECORDED = "not recorded"
OWN_KEYS = ("default_root_dir", "save_dir", "dirpath", "output", "filename")


@dataclass(frozen=True)
class StageConfig:
    """The stored configuration of a stage as text."""

    name: str
    text: str


def configurations(run: RunRecord) -> list[StageConfig]:
    """Return the stored configuration of every stage."""
    return [
        StageConfig(record.name, yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True, width=110))
        for record in run.stages
        if record.config
    ]


def commands(run: RunRecord) -> list[str]:
    """Return the commands that repeat a run: that of its pipeline, and those of stages that were run on their own."""
    found = [] if run.overrides is None else [command(run.overrides)]
    for record in run.stages:
        own = record.overrides or []
        if any(override.startswith("stage=") for override in own):
            found.append(command(own))
        elif run.overrides is None:
            name = record.config.get("run", run.name)
            found.append(command([f"stage={record.stage}", f"run={name}", *own]))
    return list(dict.fromkeys(found))


def command(overrides: Sequence[str]) -> str:
    """Return a command line with overrides, without ``resume``, which the last start of an interrupted run has."""
    return shlex.join(["python", "train.py", *(one for one in overrides if not one.startswith(("resume=", "replay=")))])


def data_table(run: RunRecord) -> Table:
    """Return the data files and the inputs of all stages with their SHA-256. Stages that share one share its row."""
    users: dict[tuple[str, str, str], list[str]] = {}
    for record in run.stages:
        for used in _used(record):
            users.setdefault(used, []).append(record.name)
    rows = [
        [text(", ".join(dict.fromkeys(names))), text(what), code(where), code(digest)]
        for (what, where, digest), names in users.items()
    ]
    return Table(["stage", "what", "where", "SHA-256"], rows, "data")


def _used(record: StageRecord) -> Iterator[tuple[str, str, str]]:
    """Yield what a stage was trained with: its role, its location and its SHA-256."""
    data, inputs = record.provenance.get("data"), record.provenance.get("inputs")
    for split, entry in data.items() if isinstance(data, dict) else ():
        if isinstance(entry, dict):
            yield str(split), str(entry.get("path")), str(entry.get("sha256") or NOT_RECORDED)
    for name, entries in inputs.items() if isinstance(inputs, dict) else ():
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict):
                yield f"input {name}", _source(entry), str(entry.get("sha256") or NOT_RECORDED)


def version_table(run: RunRecord) -> Table:
    """Return the versions that every stage was trained with."""
    versions = {record.name: record.provenance.get("versions") for record in run.stages}
    known = {name: found for name, found in versions.items() if isinstance(found, dict)}
    packages = list(dict.fromkeys(str(package) for found in known.values() for package in found))
    rows = [[text(name), *(code(found.get(package, "")) for package in packages)] for name, found in known.items()]
    return Table(["stage", *packages], rows, "versions")


def differing_settings(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the settings that are not the same everywhere: key -> name -> value as text.

    Args:
        configs: Configuration of the same stage by the name of its run. A key that a configuration lacks has no value.
    """
    flat = {name: _compared(config) for name, config in configs.items()}
    keys = sorted({key for settings in flat.values() for key in settings})
    found = {key: {name: settings[key] for name, settings in flat.items() if key in settings} for key in keys}
    return {key: values for key, values in found.items() if len(set(values.values())) > 1 or len(values) < len(configs)}


def _compared(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the values that may be the same in several runs, as text by their full keys."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in leaves(config)
        if key.partition(".")[0] not in OWN and not set(key.split(".")) & set(OWN_KEYS)
    }


def _source(entry: dict[str, Any]) -> str:
    """Return the source of an input; of a description such as ``Export(path='x', ...)`` only the path."""
    source = str(entry.get("source", ""))
    _, found, rest = source.partition("path='")
    return rest.partition("'")[0] if found else source
