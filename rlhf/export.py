"""The ``*_final.pt`` format: write the result of a stage, and open it again."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ConfigError, DataError
from rlhf.files import atomic_write
from rlhf.models import Pretrained, ScalarHead, ScalarModel
from rlhf.stage import Result
from rlhf.tokenizer_files import pack_tokenizer, unpack_tokenizer

FORMAT = 1
RL_TRAINED = "final_rl_model.pt"  # in outputs/<run>/: what load_model("rl_trained") opens
FINAL_PATTERN = "*_final.pt"
_REPLACE_FILE = "Use a file that a stage of this project wrote, or run the stage again."


def load_model(
    name: str = "rl_trained", *, run: str = "rlhf", device: str | torch.device | None = None, outputs: str = "outputs"
) -> tuple[Any, PreTrainedTokenizerBase, torch.device]:
    """Open a trained model.

    Args:
        name: ``rl_trained`` (the result of PPO, or of GRPO or DPO if PPO was not run), the name of a stage (``sft``,
            ``reward``, ``ppo``, ``grpo``, ``dpo``) or of a pipeline variant, or the path of a ``*_final.pt``, a
            checkpoint or a Hugging Face folder.
        run: Name of the run, a directory in ``outputs``.
        device: Device of the model; None selects a GPU if there is one.
        outputs: Directory of all runs.

    Returns:
        The model in eval mode, its tokenizer, and its device. The model is a ``transformers`` causal language model, or
        for a reward model a ``ScalarModel``, which maps input_ids and attention_mask, [batch, time] each, to scores,
        [batch].

    Raises:
        ConfigError: There is no such model.
        DataError: The file is not a complete export.
    """
    source = open_model_source(str(_path_of(name, Path(outputs) / run, run)))
    tokenizer = source.tokenizer(())
    scalar = isinstance(source, Export) and source.kind == "scalar_model"
    model: Any = source.scalar_model(tokenizer) if scalar else source.language_model(tokenizer)
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return model.to(target).eval(), tokenizer, target


def _path_of(name: str, directory: Path, run: str) -> Path:
    """Return the path of the model that ``load_model`` is asked for."""
    if name == "rl_trained" and (directory / RL_TRAINED).is_file():
        return directory / RL_TRAINED
    if found := sorted((directory / name).glob(FINAL_PATTERN)):
        return found[0]
    if Path(name).exists():
        return Path(name)
    models = sorted(path.parent.name for path in directory.glob(f"*/{FINAL_PATTERN}"))
    raise ConfigError(
        f"load_model({name!r}): {directory} has no such model, and there is no file or folder of that name. "
        f"Models of run={run}: {', '.join(models) or 'none'}.",
        f"Train one: python train.py run={run}",
    )


def save_result(result: Result, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write the result of a stage as one file that ``torch.load(weights_only=True)`` opens.

    The file is written to a temporary name and renamed, so that a crash cannot corrupt an existing export.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in result.model.state_dict().items()}
    content = {**describe(result, provenance), "weights": weights}
    atomic_write(path, lambda file: torch.save(content, file))


def describe(result: Result, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything in an export except the weights: text and numbers only."""
    model: Any = result.model
    scalar = isinstance(model, ScalarModel)
    return {
        "format": FORMAT,
        "kind": "scalar_model" if scalar else "language_model",
        "config": model.config.to_json_string(use_diff=False),
        "head": dict(model.head.settings) if scalar else None,
        "tokenizer": pack_tokenizer(result.tokenizer),
        "provenance": json.dumps(provenance),
    }


def save_huggingface(source: str, directory: str) -> None:
    """Write a language model as a Hugging Face folder that ``transformers`` opens without this project.

    Args:
        source: A ``*_final.pt``.
        directory: Directory to write to; it is created if necessary.
    """
    export = Export(source)
    tokenizer = export.tokenizer()
    export.language_model(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@dataclass(frozen=True)
class Export:
    """A ``*_final.pt`` or a Lightning checkpoint of a stage, as a model source.

    Args:
        path: Path of the file.
    """

    path: str

    @property
    def kind(self) -> str:
        """``language_model`` or ``scalar_model``."""
        return str(self._content()["kind"])

    @property
    def provenance(self) -> dict[str, Any]:
        """How the file was made: stage, inputs, configuration, data and versions."""
        return dict(json.loads(self._content()["provenance"]))

    def tokenizer(self, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        """Open the tokenizer of the file; ``texts`` are not used.

        Raises:
            DataError: The file contains tokenizer files under unsafe names.
        """
        return unpack_tokenizer(self._content()["tokenizer"], self.path)

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Return a new copy of the causal language model in float32 on the CPU."""
        content = self._content("language_model")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(content["config"]), dtype=torch.float32)
        _load_weights(model, content["weights"], self.path)
        return model

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        """Return a new copy of the reward model in float32 on the CPU.

        Raises:
            DataError: The reward model was trained with another vocabulary than that of ``tokenizer``.
        """
        content = self._content("scalar_model")
        if (own := self.tokenizer().get_vocab()) != tokenizer.get_vocab():
            raise DataError(
                f"{self.path}: the tokenizer of the reward model ({len(own)} tokens) differs from that of the policy "
                f"({len(tokenizer)} tokens), so token ids would be misinterpreted.",
                "Train the reward model from the same base model: stage.reward_model=<path>",
            )
        trunk = AutoModel.from_config(_config(content["config"]), dtype=torch.float32)
        model = ScalarModel(trunk, ScalarHead(**content["head"]))
        _load_weights(model, content["weights"], self.path)
        return model

    def _content(self, kind: str | None = None) -> dict[str, Any]:
        content = _read(self.path)
        if kind is not None and content["kind"] != kind:
            raise DataError(
                f"{self.path} contains a {content['kind'].replace('_', ' ')}, but a {kind.replace('_', ' ')} is needed."
            )
        return content


def open_model_source(path: str) -> Export | Pretrained:
    """Return a model source for a ``*_final.pt``, a checkpoint, a Hugging Face folder or a hub id."""
    if path.endswith((".pt", ".ckpt")):
        if not Path(path).is_file():
            raise ConfigError(f"{path}: there is no such file.", "Make it first: python train.py stage=<stage>")
        return Export(path)
    return Pretrained(path)


def _read(path: str) -> dict[str, Any]:
    """Read an export, or a checkpoint in the form of an export; weights stay on disk until they are used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # An incomplete file raises one of many types.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a valid rlhf export; it is corrupt or incomplete ({reason}).") from error
    if "state_dict" in content and "rlhf" in content:
        prefix = "model." if content["rlhf"]["kind"] == "scalar_model" else "policy.lm."
        weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
        content = {**content["rlhf"], "weights": weights}
    if content.get("format") != FORMAT:
        raise DataError(f"{path}: not a valid rlhf export of format {FORMAT}.")
    return dict(content)


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Load exactly the weights of a file. A missing weight is an error and never initialized at random (trl#1379)."""
    expected = model.state_dict()
    if missing := sorted(expected.keys() - weights.keys(), key=lambda name: (not name.startswith("head."), name)):
        what = "the reward head is" if missing[0].startswith("head.") else "these weights are"
        raise DataError(f"{path}: {what} missing from the file: {_shortened(missing)}.", _REPLACE_FILE)
    misfits = [name for name in weights if name not in expected or weights[name].shape != expected[name].shape]
    if misfits:
        raise DataError(
            f"{path}: these weights do not fit the model configuration: {_shortened(misfits)}.", _REPLACE_FILE
        )
    model.load_state_dict(weights)


def _shortened(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _config(text: str) -> Any:
    """Parse a model configuration as ``transformers`` does, infinities included."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(text, encoding="utf-8")
        return AutoConfig.from_pretrained(directory)
