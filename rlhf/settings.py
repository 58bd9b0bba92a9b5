"""The settings of a run that its weights depend on, by their full keys."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.overrides import leaves

# What the weights depend on. Of the Trainer's flags, most do not affect training.
COMPARED = ("seed", "stage", "data", "model", "adapter")
WITHOUT_EFFECT = ("data.cache_dir", "data.test")  # on the weights
LENGTH = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")  # Changing one extends a run.
TRAINER_KEYS = (
    *(key.removeprefix("trainer.") for key in LENGTH),
    *("precision", "limit_train_batches", "overfit_batches", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "use_distributed_sampler"),
)


def settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that affect training by their full keys.

    Paths in the directory of the run are relative to it, and of type ``Path``.

    Args:
        provenance: How a file was made, see ``rlhf.artifacts.describe_provenance``.
    """
    config = provenance.get("config", {})
    directory = run_directory(provenance)
    flat = dict(leaves(_nodes(config)))
    if "adapter" in config:
        flat["adapter"] = "none" if config["adapter"] is None else "lora"
    return {key: relative(value, directory) for key, value in flat.items() if key not in WITHOUT_EFFECT}


def added_or_removed(recorded: Mapping[str, Any], provenance: Mapping[str, Any]) -> set[str]:
    """Return the settings that only one of two runs has, in mappings whose keys are names that the user chooses.

    An example is a component of ``reward=weighted_sum``. Any other key that one of them lacks is that of another
    version of this project.
    """
    runs = (recorded, provenance)
    before, now = map(settings, runs)
    mappings = set.intersection(*(set(_mappings(_nodes(run.get("config", {})))) for run in runs))
    found = (key for key in before.keys() ^ now.keys() if before.get(key) is not None or now.get(key) is not None)
    return {key for key in found if any(key.startswith(f"{mapping}.") for mapping in mappings)}


def run_directory(provenance: Mapping[str, Any]) -> str:
    """Return the directory of the run that made a file."""
    return str(provenance.get("config", {}).get("paths", {}).get("run", ""))


def relative(value: Any, directory: str) -> Any:
    """Return a path in a directory relative to it, as ``Path``, and any other value unchanged."""
    is_path = isinstance(value, str) and directory and Path(value).is_relative_to(directory)
    return Path(value).relative_to(directory) if is_path else value


def _nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nodes of a resolved configuration that affect training, by the keys under which they are typed.

    ``stage.reward`` refers to ``reward``, and only the keys of the latter can be set.
    """
    nodes = {name: config[name] for name in COMPARED if config.get(name) is not None}
    nodes["trainer"] = {key: value for key, value in config.get("trainer", {}).items() if key in TRAINER_KEYS}
    stage = nodes.get("stage", {})
    referred = {name: value for name, value in stage.items() if isinstance(value, dict) and name in config}
    return {**nodes, "stage": {name: value for name, value in stage.items() if name not in referred}, **referred}


def _mappings(nodes: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the full keys of the mappings below some nodes that do not configure a class or function."""
    for name, value in nodes.items():
        if isinstance(value, dict):
            inner = f"{path}.{name}" if path else name
            if path and "_target_" not in value:
                yield inner
            yield from _mappings(value, inner)
