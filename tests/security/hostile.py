"""Builders of hostile files. Each gets a folder to write to and the canary: a folder in which nothing may appear."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlhf.export import save_result
from rlhf.models import ScalarHead, ScalarModel
from rlhf.stage import Result

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary / 'ran'}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@dataclass
class Workshop:
    """What the builders need."""

    folder: Path
    canary: Path
    tokenizer: PreTrainedTokenizerFast

    def bomb(self) -> Bomb:
        return Bomb(self.canary)

    def path(self, name: str) -> Path:
        self.folder.mkdir(exist_ok=True)
        return self.folder / name

    # Files of this project

    def export(self, change: Callable[[dict[str, Any]], object], *, scalar: bool = False) -> Path:
        """Return a valid export with one change."""
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **SIZES, **SPECIAL))
        path = self.path("hostile.pt")
        model = ScalarModel(lm.base_model, ScalarHead(16)) if scalar else lm
        save_result(Result(model, self.tokenizer), path, {"stage": "sft", "inputs": {}})
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        return path

    def configured(self, **changes: Any) -> Path:
        """Return an export whose model configuration has other values."""
        return self.export(
            lambda content: content.update(config=json.dumps({**json.loads(content["config"]), **changes}))
        )

    def tokenizer_file(self, name: str, text: Any = "changed") -> Path:
        """Return an export with another tokenizer file."""
        return self.export(lambda content: content["tokenizer"].update({name: text}))

    # Folders of Hugging Face

    def hf(self, files: dict[str, Any] | None = None, **config: Any) -> Path:
        """Return a valid folder with changed or further files; values of a dictionary are merged into a JSON file."""
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **SIZES, **SPECIAL))
        lm.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        for name, content in {"config.json": config, **(files or {})}.items():
            file = self.folder / name
            if isinstance(content, dict):
                content = json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **content})
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)
        return self.folder

    def evil_module(self, name: str) -> dict[str, str]:
        """Return a Python file that writes to the canary when it is imported."""
        return {name: f"import pathlib\npathlib.Path({str(self.canary / 'imported')!r}).touch()\nclass Evil: ...\n"}

    def remote_code(self, kind: str, **config: Any) -> Path:
        """Return a folder whose configuration refers to its own Python file."""
        if kind == "AutoTokenizer":
            changed = {"tokenizer_config.json": {"auto_map": {kind: ["evil.Evil", "evil.Evil"]}, **config}}
            return self.hf({**self.evil_module("evil.py"), **changed})
        return self.hf(self.evil_module("evil.py"), auto_map={kind: "evil.Evil"}, **config)

    def binary(self) -> Path:
        """Return a folder whose weights are a pickle instead of safetensors."""
        folder = self.hf()
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": self.bomb()}, folder / "pytorch_model.bin")
        return folder


# Pickles


def whole_file(work: Workshop, name: str = "hostile.pt") -> Path:
    torch.save(work.bomb(), path := work.path(name))
    return path


def within_an_export(work: Workshop) -> Path:
    return work.export(lambda content: content.update(provenance=work.bomb()))


def among_the_weights(work: Workshop) -> Path:
    return work.export(lambda content: content["weights"].update(x=work.bomb()))


def plain_pickle(work: Workshop, name: str = "hostile.pt") -> Path:
    (path := work.path(name)).write_bytes(pickle.dumps(work.bomb()))
    return path


def legacy_format(work: Workshop, name: str = "hostile.pt") -> Path:
    torch.save({"format": 1, "x": work.bomb()}, path := work.path(name), _use_new_zipfile_serialization=False)
    return path


# Tensors whose shape promises more than the file contains


def fake_tensor(work: Workshop, weight: torch.Tensor) -> Path:
    """Return an export with a large hidden size and an embedding that claims to have it."""

    def change(content: dict[str, Any]) -> None:
        content["config"] = json.dumps({**json.loads(content["config"]), "hidden_size": weight.shape[1]})
        content["weights"]["model.embed_tokens.weight"] = weight

    return work.export(change)


def recursive_adapter(work: Workshop) -> Path:
    """Return an export with an adapter whose base model is the file itself."""
    lora = {"r": 1, "alpha": 1, "dropout": 0.0, "target_modules": "all-linear"}
    base = {"path": str(work.folder / "hostile.pt"), "revision": None, "digest": "0"}
    return work.export(lambda content: content.update(adapter={"lora": lora, "base": base}))
