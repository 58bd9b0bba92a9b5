"""What a stage leaves behind: the ``*_final.pt`` format, Hugging Face folders, and how to open them again."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.errors import UserError
from rlhf.models import Pretrained, ScalarHead, ScalarModel
from rlhf.stage import Result

FORMAT = 1
FINAL = {
    "sft": "sft_final.pt",
    "reward": "reward_model_final.pt",
    "ppo": "ppo_final.pt",
    "grpo": "grpo_final.pt",
    "dpo": "dpo_final.pt",
}
RL_STAGES = ("ppo", "grpo", "dpo")  # the first of these that ran makes the run's final model
RL_TRAINED = "final_rl_model.pt"
# The files that tokenizers of transformers write: the common ones first, then the vocabularies of single models.
_TOKENIZER_FILES = frozenset(
    """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    vocab.json vocab.txt merges.txt tekken.json
    bpe.codes byte_maps.json dict.txt emoji.json entity_vocab.json normalizer.json prophetnet.tokenizer
    target_vocab.json vocab-src.json vocab-tgt.json word_pronunciation.json word_shape.json
    """.split()
)
# SentencePiece and tiktoken models: tokenizer.model, spiece.model, sentencepiece.bpe.model, source.spm.
_TOKENIZER_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(model|spm)")
_WHOLE_FILE = "name a file as the stage wrote it, or run the stage again"


def load_model(
    name: str = "rl_trained", *, run: str = "rlhf", device: str | torch.device | None = None, outputs: str = "outputs"
) -> tuple[Any, PreTrainedTokenizerBase, torch.device]:
    """Open a trained model: (model, tokenizer, device), the model in eval mode on that device.

    Args:
        name: ``rl_trained`` (what PPO made; GRPO's or DPO's result if PPO did not run), a stage (``sft``, ``reward``,
            ``ppo``, ``grpo``, ``dpo``), or a path to a ``*_final.pt``, a checkpoint or a Hugging Face folder.
        run: which experiment, a folder of ``outputs``.
        device: null takes a GPU if there is one.
        outputs: the folder of all runs.

    Returns:
        A ``transformers`` causal language model, or for a reward model a ``ScalarModel``, whose call on tokens and
        mask, [batch, time] each, gives [batch] scores.

    Raises:
        UserError: there is no such file.
    """
    folder = Path(outputs) / run
    known = {"rl_trained": folder / RL_TRAINED, **{stage: folder / stage / file for stage, file in FINAL.items()}}
    path = known.get(name, Path(name))
    if not path.exists():
        hint = f"names: {', '.join(known)}" if name not in known else f"python train.py run={run} makes it"
        raise UserError(f"load_model({name!r}): there is no {path}", hint)
    source = open_model_source(str(path))
    tokenizer = source.tokenizer()
    scalar = isinstance(source, Export) and source.kind == "scalar_model"
    model = source.scalar_model(tokenizer) if scalar else source.language_model(tokenizer)
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return model.to(place).eval(), tokenizer, place


def save_result(result: Result, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write a stage's result as one file that ``torch.load(weights_only=True)`` opens.

    It is written beside its place and renamed, so that a crash leaves an older file whole.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in result.model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        torch.save({**describe(result, provenance), "weights": weights}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def describe(result: Result, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a result but its weights: text and numbers only."""
    model = result.model
    scalar = isinstance(model, ScalarModel)
    return {
        "format": FORMAT,
        "kind": "scalar_model" if scalar else "language_model",
        "config": model.config.to_json_string(use_diff=False),
        "head": dict(model.head.settings) if scalar else None,
        "tokenizer": _tokenizer_files(result.tokenizer),
        "provenance": json.dumps(provenance),
    }


def save_huggingface(source: str, folder: str) -> None:
    """Write a language model as a Hugging Face folder that plain ``transformers`` opens.

    Args:
        source: a ``*_final.pt``.
        folder: where to; made if it is not there.
    """
    export = Export(source)
    tokenizer = export.tokenizer()
    model = export.language_model(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Export:
    """A ``*_final.pt``, or a Lightning checkpoint of a run, as something to start from."""

    path: str

    @property
    def kind(self) -> str:
        return str(self._content()["kind"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Which stage made it from what: stage, parents, config, data, versions."""
        return dict(json.loads(self._content()["provenance"]))

    def tokenizer(self, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        """Open the tokenizer of the file.

        The file may come from anyone, so its tokenizer files are only written, into a temporary folder, if each of
        them has the plain name of a file that tokenizers of ``transformers`` write.

        Args:
            texts: Not used. The vocabulary is the one in the file.

        Raises:
            UserError: If a tokenizer file has any other name. Nothing is written in this case.
        """
        files = self._content()["tokenizer"]
        for name in files:
            _check_tokenizer_file(name, self.path)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                data = content.encode() if isinstance(content, str) else content.numpy().tobytes()
                Path(folder, name).write_bytes(data)
            return AutoTokenizer.from_pretrained(folder)

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        content = self._content("language_model")
        model = AutoModelForCausalLM.from_config(_config(content["config"]), dtype=torch.float32)
        _load_weights(model, content["weights"], self.path)
        return model

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        content = self._content("scalar_model")
        if (ours := self.tokenizer().get_vocab()) != tokenizer.get_vocab():
            raise UserError(
                f"{self.path}: its tokenizer ({len(ours)} tokens) is not the policy's ({len(tokenizer)} tokens), so it "
                "would read other words than were written",
                "stage.reward_model=<one trained from the same base model>",
            )
        trunk = AutoModel.from_config(_config(content["config"]), dtype=torch.float32)
        model = ScalarModel(trunk, ScalarHead(**content["head"]))
        _load_weights(model, content["weights"], self.path)
        return model

    def _content(self, kind: str | None = None) -> dict[str, Any]:
        content = _read(self.path)
        if kind is not None and content["kind"] != kind:
            raise UserError(f"{self.path} holds a {content['kind'].replace('_', ' ')}, not a {kind.replace('_', ' ')}")
        return content


def open_model_source(path: str) -> Any:
    """Something to start from: a ``*_final.pt`` or checkpoint of a run, or a Hugging Face folder or hub id."""
    if path.endswith((".pt", ".ckpt")):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file", "python train.py stage=<the stage that makes it>")
        return Export(path)
    return Pretrained(path)


def hash_file(path: str | Path) -> str | None:
    """SHA-256 of a file, to recognise data and parents by; None if it is no file."""
    if not Path(path).is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(path: str) -> dict[str, Any]:
    """The content of an export, or of a checkpoint in the form of one; weights stay on disk until they are read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken file shows itself in many ways
        raise UserError(f"{path}: not a whole file of this project ({str(error).splitlines()[0]})") from error
    if "state_dict" in content and "rlhf" in content:
        prefix = "model." if content["rlhf"]["kind"] == "scalar_model" else "policy.lm."
        weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
        content = {**content["rlhf"], "weights": weights}
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: not a file of this project, or of another version of it")
    return dict(content)


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Fill a model with exactly the weights of a file: one that is missing is never made up (trl#1379)."""
    wanted = model.state_dict()
    if missing := sorted(wanted.keys() - weights.keys(), key=lambda name: (not name.startswith("head."), name)):
        part = "the reward head is" if missing[0].startswith("head.") else "these weights are"
        raise UserError(f"{path}: {part} not in the file: {_names(missing)}", _WHOLE_FILE)
    misfits = [name for name in weights if name not in wanted or weights[name].shape != wanted[name].shape]
    if misfits:
        raise UserError(f"{path}: these weights do not fit the model it describes: {_names(misfits)}", _WHOLE_FILE)
    model.load_state_dict(weights)


def _names(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _config(text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:  # the way transformers reads it back, infinities included
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        return AutoConfig.from_pretrained(folder)


def _check_tokenizer_file(name: object, path: str) -> None:
    """Raise a ``UserError`` unless the name, which comes from the file, is the plain name of a tokenizer file."""
    if isinstance(name, str) and (name in _TOKENIZER_FILES or _TOKENIZER_MODEL.fullmatch(name)):
        return
    raise UserError(
        f"{path}: its tokenizer contains a file named {name!r}, but only plain names of tokenizer files are allowed, "
        "such as 'tokenizer.json' or 'tokenizer.model', without a directory part; nothing was written",
        "Use a file that a stage of this project wrote, or run the stage again: python train.py stage=<stage>.",
    )


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The files that ``save_pretrained`` writes, by name: text, or bytes as a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files: dict[str, Any] = {}
        for path in sorted(Path(folder).iterdir()):
            data = path.read_bytes()
            try:
                files[path.name] = data.decode()
            except UnicodeDecodeError:
                files[path.name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return files
