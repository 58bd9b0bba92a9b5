"""Open files and folders of models, which may come from anyone: errors become messages, and no code in them runs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from rlhf.errors import ConfigError, DataError, UserError
from rlhf.files import LAST
from rlhf.models.kernels import without_kernels
from rlhf.tokenizer.files import is_tokenizer_file

# Others either load code from the Hub or do not compute on the CPU in float32, where models are opened and probed.
Attention: TypeAlias = Literal["sdpa", "eager"]
MODEL_FOLDER = "Use a directory with model and tokenizer, written by save_pretrained, or a Hub ID."
REPLACE_FILE = "Use a file that a stage of this project wrote, or run the stage again."
_TOLERATED = (KeyboardInterrupt, SystemExit, GeneratorExit)


def read_archive(path: str | Path) -> dict[str, Any]:
    """Read a dictionary that ``torch.save`` wrote; tensors stay on disk until they are used.

    Raises:
        DataError: The file is not such a dictionary, or it contains anything but tensors, text, numbers and lists.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # An incomplete file raises one of many types.
        if "Weights only load failed" in str(error):
            reason = "it contains Python objects, which could run code. Nothing in it was run"
        elif "mmap can only be used" in str(error):
            reason = "it has the legacy format of torch.save, which is not read"
        else:
            reason = f"it is corrupt or incomplete: {_reason(error)}"
        raise DataError(f"{path}: not a valid rlhf export ({reason}).", REPLACE_FILE) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a valid rlhf export (it contains a {type(content).__name__}).", REPLACE_FILE)
    return content


@contextmanager
def opening(path: str, kind: str, fix: str = MODEL_FOLDER) -> Iterator[None]:
    """Turn whatever ``transformers``, ``tokenizers``, ``safetensors`` or ``torch`` raises into a ``DataError``.

    Args:
        path: What is opened: a file, a folder or a Hub ID.
        kind: What is expected there, such as ``tokenizer``.
        fix: The second line of the message.
    """
    try:
        with without_kernels():
            yield
    except (UserError, *_TOLERATED):
        raise
    except BaseException as error:  # The Rust code of tokenizers raises PanicException, which is not an Exception.
        reason = _damaged_file(Path(path)) or _explained(error, path, kind)
        raise DataError(f"{path}: could not load a {kind} from this path ({reason}).", fix) from error


def check_folder(path: str, kind: str) -> None:
    """Reject a path that cannot be a Hugging Face folder or a Hub ID, before ``transformers`` reads it.

    Raises:
        ConfigError: It is a file, or the output directory of a stage.
        DataError: There is no such directory, or files are missing in it.
    """
    folder = Path(path)
    if folder.is_file():
        fix = f"Start from the result of a stage with stage.policy={path}" if folder.suffix == ".pt" else MODEL_FOLDER
        raise ConfigError(f"{path} is a file, but a {kind} is opened from a directory or a Hub ID.", fix)
    if folder.is_dir():
        reason = _missing_files(folder, kind)
    else:
        is_path = "\\" in path or path.count("/") > 1 or path.startswith((".", "/", "~")) or not path.strip()
        reason = "there is no such directory" if is_path else None
    if reason:
        raise DataError(f"{path}: could not load a {kind} from this path ({reason}).", MODEL_FOLDER)


def _missing_files(folder: Path, kind: str) -> str | None:
    names = {path.name for path in folder.iterdir()}
    is_model = any(name.endswith(".json") for name in names)  # which may have a file of that name as well
    extensions = ("_final.pt",) if is_model else ("_final.pt", ".ckpt")
    if results := [name for name in names if name.endswith(extensions)]:
        result = min(results, key=lambda name: (name.endswith(".ckpt"), name != LAST, name))
        raise ConfigError(
            f"{folder} is an output directory of a stage, not a Hugging Face folder.",
            f"Name the file in it: {folder / result}",
        )
    if "adapter_config.json" in names:
        raise DataError(
            f"{folder} contains an adapter of peft, not a complete model.",
            "Merge it into its base model, for example with save_hf=merged, and use that folder.",
        )
    if not names:
        return "the directory is empty"
    if kind == "tokenizer":
        return None if any(map(is_tokenizer_file, names)) else "it contains no tokenizer files, such as tokenizer.json"
    return None if "config.json" in names else "it contains no config.json"


def check_config(config: PreTrainedConfig, path: str, weights: int | None) -> None:
    """Reject a model configuration that would load code or build an absurdly large model.

    Args:
        config: The configuration, as ``transformers`` parsed it.
        path: Where it was read, for messages.
        weights: Number of tensors in the file. Every layer has at least one. None: unknown.
    """
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    for part in parts:
        attention = getattr(part, "_attn_implementation", None)
        if attention is not None and attention not in get_args(Attention):
            raise DataError(
                f"{path}: attn_implementation in the model configuration must be one of "
                f"{', '.join(get_args(Attention))}, got {attention!r}.",
                "Remove attn_implementation from the configuration, and name one with model.attention=<name>.",
            )
        layers = getattr(part, "num_hidden_layers", None)
        if weights is not None and isinstance(layers, int) and layers > weights:
            raise DataError(
                f"{path}: the model configuration has {layers} layers, but there are only {weights} weights.",
                REPLACE_FILE,
            )
    if getattr(config, "quantization_config", None):
        raise DataError(
            f"{path}: the model is quantized (quantization_config), and quantized models cannot be trained.",
            "Use the model without quantization.",
        )
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if is_encoder and getattr(config, "is_decoder", None) is False:
        raise DataError(
            f"{path}: model_type={config.model_type} is an encoder, which sees the whole text, not a language model.",
            "Use a causal language model, such as model.path=Qwen/Qwen2.5-0.5B",
        )


def language_model_class(config: PreTrainedConfig) -> Any:
    """Return the auto class of transformers that opens a language model.

    It is ``AutoModelForImageTextToText`` for models of text and images that are not listed as causal language models.

    Args:
        config: The configuration of the model.
    """
    is_other = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if is_other else AutoModelForCausalLM


def count_weights(path: str) -> int | None:
    """Return the number of tensors in the safetensors files of a folder; None if there are none."""
    count = 0
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += len(tensors.keys())
    return count or None


def check_tensors(weights: Any, path: str) -> None:
    """Reject anything but ordinary tensors, whose numbers are all in the file.

    A few bytes can claim to be a tensor of any size, by a stride of 0 or without storage.
    """
    if not isinstance(weights, Mapping):
        raise DataError(f"{path}: weights must be tensors by name, got {type(weights).__name__}.", REPLACE_FILE)
    for name, weight in weights.items():
        is_plain = isinstance(name, str) and isinstance(weight, torch.Tensor) and weight.layout is torch.strided
        if not is_plain or weight.device.type != "cpu" or weight.is_quantized:
            raise DataError(f"{path}: the weight {name!r} must be a dense tensor.", REPLACE_FILE)
        if weight.numel() * weight.element_size() > weight.untyped_storage().nbytes():
            raise DataError(f"{path}: the weight {name!r} has fewer numbers than its shape says.", REPLACE_FILE)


def check_finite(weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Raise a ``DataError`` if a weight is NaN or infinite: a run that continued from it would be wasted."""
    for name, weight in weights.items():
        # The sum is NaN or infinite if any number is, and needs no memory.
        if weight.is_floating_point() and not weight.sum(dtype=torch.float64).isfinite():
            raise DataError(
                f"{path}: the weight {name} contains NaN or infinite values.",
                "Use a checkpoint from before training diverged, or train again with a smaller stage.learning_rate.",
            )


def _explained(error: BaseException, path: str, kind: str) -> str:
    if "Unrecognized configuration class" in str(error):
        return f"transformers has no {kind} for its model_type"
    if isinstance(error, KeyError):
        return f"a required field is missing: {error}"
    if "ignore_mismatched_sizes" in str(error):
        return "the shapes of the weights differ from those in config.json"
    reason = _reason(error).rstrip(".")
    return reason if Path(path).exists() else f"there is no such directory, and {reason[:1].lower()}{reason[1:]}"


def _reason(error: BaseException) -> str:
    """Return the line of a message that says most: that of the original error where transformers wraps one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    wraps = lines[0].startswith(("Validation error for", "Class validation error")) and len(lines) > 1
    return lines[1].split(": ", 1)[-1] if wraps else lines[0]


def _damaged_file(folder: Path) -> str | None:
    """Return what is wrong with the first file of a folder that cannot be read at all."""
    for file in sorted(folder.glob("*.json")):
        try:
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                return f"{file.name} must contain a JSON object"
        except ValueError as error:
            return f"{file.name} is not valid JSON: {_reason(error)}"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{file.name} is corrupt or incomplete: {_reason(error)}"
    return None
