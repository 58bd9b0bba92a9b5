"""The contents of a possibly untrusted ``*_final.pt``: plain data, validated before use."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from rlhf.errors import DataError
from rlhf.models.opening import REPLACE_FILE, check_config, check_tensors, opening, read_archive
from rlhf.process.time_limit import time_limit

FORMAT = 1
BUILD_SECONDS = 300  # of processor time; without memory for the weights, large models take a few seconds
KINDS = {"language_model": "policy.lm.", "scalar_model": "model."}  # and the prefix of their weights in checkpoints
KIND_NAMES = {"language_model": "language model", "scalar_model": "reward model"}
_REQUIRED: dict[str, type] = {"kind": str, "config": str, "tokenizer": Mapping, "weights": Mapping, "provenance": str}


def read_export(path: str, kind: str | None = None) -> dict[str, Any]:
    """Read an export, or a checkpoint in the form of an export; weights stay on disk until they are used.

    Args:
        path: The file.
        kind: The kind of model that is needed; None: any.

    Raises:
        DataError: The file is neither, it is incomplete, or it contains another kind of model.
    """
    content = read_archive(path)
    if isinstance(content.get("rlhf"), Mapping) and isinstance(content.get("state_dict"), Mapping):
        prefix = KINDS.get(str(content["rlhf"].get("kind")), "")
        states = ((str(name), weight) for name, weight in content["state_dict"].items())
        weights = {name.removeprefix(prefix): weight for name, weight in states if name.startswith(prefix)}
        content = {**content["rlhf"], "weights": weights}
    elif "pytorch-lightning_version" in content:
        raise DataError(
            f"{path}: a Lightning checkpoint that does not describe its model.",
            "Train with rlhf.callbacks.ExportHeader among the callbacks, or write a file after training: "
            "rlhf.export.save_result(module.result(), Path('model_final.pt'), {})",
        )
    if content.get("format") != FORMAT:
        raise DataError(f"{path}: not a valid rlhf export of format {FORMAT}.", REPLACE_FILE)
    for name, required in _REQUIRED.items():
        if not isinstance(content.get(name), required):
            found = type(content.get(name)).__name__
            what = f"must be {required.__name__}, got {found}" if name in content else "is missing"
            raise DataError(f"{path}: not a valid rlhf export: {name} {what}.", REPLACE_FILE)
    if content["kind"] not in KINDS:
        raise DataError(f"{path}: kind must be one of {', '.join(KINDS)}, got {content['kind']!r}.", REPLACE_FILE)
    if kind is not None and content["kind"] != kind:
        raise DataError(
            f"{path} contains a {KIND_NAMES[content['kind']]}, but a {KIND_NAMES[kind]} is needed.",
            "stage.reward_model needs the result of stage=reward, and stage.policy that of another stage.",
        )
    check_tensors(content["weights"], path)
    return content


def parse_json(text: str, path: str, name: str) -> dict[str, Any]:
    """Parse a field of an export that must be a JSON object."""
    try:
        content = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {name} is not valid JSON ({error}).", REPLACE_FILE) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: {name} must be a JSON object, got {type(content).__name__}.", REPLACE_FILE)
    return content


def parse_config(content: Mapping[str, Any], path: str) -> PreTrainedConfig:
    """Parse the model configuration of an export as ``transformers`` does, infinities included."""
    parse_json(content["config"], path, "config")
    with tempfile.TemporaryDirectory() as directory, opening(path, "model configuration", REPLACE_FILE):
        Path(directory, "config.json").write_text(content["config"], encoding="utf-8")
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    check_config(config, path, None if content.get("adapter") else len(content["weights"]))
    return config


def parse_generation_config(content: Mapping[str, Any], path: str) -> GenerationConfig | None:
    """Parse the generation settings of an export; None if it has none."""
    if not content.get("generation_config"):
        return None
    settings = parse_json(content["generation_config"], path, "generation_config")
    with opening(path, "generation configuration", REPLACE_FILE):
        return GenerationConfig.from_dict(settings)


def build_limit(path: str) -> AbstractContextManager[None]:
    """Limit the time in which a model is built: sizes and patterns in a file may be chosen to take forever."""
    error = DataError(f"{path}: building the model takes more than {BUILD_SECONDS} seconds.", REPLACE_FILE)
    return time_limit(BUILD_SECONDS, error)
