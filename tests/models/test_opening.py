"""Model folders and exports that cannot be used: one message with the path, the reason and the fix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from security.hostile import SIZES, SPECIAL, Workshop
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CodeGenConfig,
    CTRLConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MptConfig,
    PreTrainedTokenizerFast,
)

from harness import TinyRun
from rlhf.errors import ConfigError, UserError
from rlhf.export import open_model_source
from rlhf.models import Pretrained


@pytest.fixture
def work(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Workshop:
    return Workshop(tmp_path / "model", tmp_path, tokenizer)


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def without(work: Workshop, *patterns: str) -> Path:
    folder = work.hf()
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()
    return folder


def empty(work: Workshop) -> Path:
    work.folder.mkdir()
    return work.folder


def encoder(work: Workshop) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModelForCausalLM.from_config(BertConfig(vocab_size=300, **sizes)).save_pretrained(work.folder)
    work.tokenizer.save_pretrained(work.folder)
    return work.folder


def output_of_a_stage(work: Workshop) -> Path:
    work.export(lambda content: None).rename(work.folder / "sft_final.pt")
    return work.folder


def checkpoints_of_a_stage(work: Workshop) -> Path:
    work.folder.mkdir()
    for name in ("0-step=1.ckpt", "last.ckpt"):
        (work.folder / name).touch()
    return work.folder


def saved(work: Workshop, content: Any) -> Path:
    torch.save(content, path := work.path("model.pt"))
    return path


def more_layers(work: Workshop) -> Path:
    """A folder whose weights have two layers and whose configuration has one."""
    config = LlamaConfig(vocab_size=300, **{**SIZES, "num_hidden_layers": 2}, **SPECIAL)
    AutoModelForCausalLM.from_config(config).save_pretrained(work.folder)
    work.tokenizer.save_pretrained(work.folder)
    file = work.folder / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    return work.folder


def set_weight(content: dict[str, Any], value: float) -> None:
    content["weights"]["model.norm.weight"][3] = value


CASES: dict[str, tuple[Callable[[Workshop], Path], str]] = {
    "no such folder": (lambda work: work.folder, r"could not load a tokenizer .*\(there is no such directory\)"),
    "no such model ID": (lambda work: Path("nosuch"), r"^nosuch: .*\(there is no such directory, and "),
    "empty folder": (empty, r"\(the directory is empty\)"),
    "no tokenizer": (
        lambda work: without(work, "*token*", "*.jinja"),
        r"\(it contains no tokenizer files, such as tokenizer\.json\)",
    ),
    "no weights": (lambda work: without(work, "*.safetensors"), r"no file named model\.safetensors"),
    "no configuration": (lambda work: without(work, "config.json"), r"\(it contains no config\.json\)"),
    "configuration is no JSON": (lambda work: work.hf({"config.json": "{x"}), r"\(config\.json is not valid JSON: "),
    "configuration is a list": (
        lambda work: work.hf({"config.json": "[]"}),
        r"config\.json must contain a JSON object",
    ),
    "unknown model type": (lambda work: work.hf(model_type="nosuch"), r"model type `nosuch`"),
    "negative size": (lambda work: work.hf(hidden_size=-5), r"The hidden size \(-5\) is not a multiple"),
    "text as a size": (lambda work: work.hf(num_hidden_layers="many"), r"'num_hidden_layers' expected int, got str"),
    "number of heads": (
        lambda work: work.hf(num_attention_heads=5),
        r"not a multiple of the number of attention heads",
    ),
    "weights are empty": (
        lambda work: work.hf({"model.safetensors": ""}),
        r"\(model\.safetensors is corrupt or incomplete: ",
    ),
    "weights of other shapes": (lambda work: work.hf(hidden_size=32), r"shapes of the weights differ from those in"),
    "weights of more layers": (
        more_layers,
        r"more layers than config\.json says, such as model\.layers\.1\..*\n  Restore the config\.json",
    ),
    "tokenizer without fields": (lambda work: work.hf({"tokenizer.json": "{}"}), r"a required field is missing"),
    "tokenizer settings are no JSON": (
        lambda work: work.hf({"tokenizer_config.json": "x"}),
        r"\(tokenizer_config\.json is not valid JSON: ",
    ),
    "encoder": (encoder, r"model_type=bert is an encoder, .*\n  Use a causal language model"),
    "not a causal language model": (
        lambda work: work.hf(model_type="t5"),
        r"\(transformers has no language model for its model_type\)",
    ),
    "quantized": (
        lambda work: work.hf(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"the model is quantized .*\n  Use the model without quantization\.",
    ),
    "output of a stage": (output_of_a_stage, r"is an output directory of a stage.*\n  Name the file .*sft_final\.pt"),
    "checkpoints of a stage": (
        checkpoints_of_a_stage,
        r"is an output directory of a stage.*\n  Name the file .*last\.ckpt",
    ),
    "export of something else": (lambda work: saved(work, {"a": 1}), r"not a valid rlhf export of format 1\."),
    "export of a list": (lambda work: saved(work, [1]), r"\(it contains a list\)"),
    "export of a tensor": (lambda work: saved(work, torch.zeros(3)), r"\(it contains a Tensor\)"),
    "export without tokenizer": (
        lambda work: work.export(lambda content: content.pop("tokenizer")),
        r"tokenizer is missing",
    ),
    "export without kind": (
        lambda work: work.export(lambda content: content.pop("kind")),
        r"kind is missing",
    ),
    "export of unknown kind": (
        lambda work: work.export(lambda content: content.update(kind="x")),
        r"kind must be one of language_model, scalar_model, got 'x'",
    ),
    "export with NaN": (
        lambda work: work.export(lambda content: set_weight(content, float("nan"))),
        r"the weight model\.norm\.weight contains NaN or infinite values\.\n  Use a checkpoint from before",
    ),
    "export with infinity": (
        lambda work: work.export(lambda content: set_weight(content, float("-inf"))),
        r"the weight model\.norm\.weight contains NaN or infinite values\.",
    ),
    "export with a list as configuration": (
        lambda work: work.export(lambda content: content.update(config="[]")),
        r"config must be a JSON object, got list",
    ),
}


def open_completely(path: Path) -> Any:
    source = open_model_source(str(path))
    return source.language_model(source.tokenizer(()))


@pytest.mark.parametrize("case", CASES)
def test_an_unusable_model_is_one_message(work: Workshop, case: str) -> None:
    build, message = CASES[case]
    path = build(work)
    with pytest.raises(UserError, match=message) as error:
        open_completely(path)
    assert str(path) in str(error.value)
    assert error.value.hint


def test_a_file_as_a_folder_names_the_right_key(work: Workshop) -> None:
    """``model.path`` of a result of a stage."""
    path = work.export(lambda content: None)
    with pytest.raises(ConfigError, match=r"hostile\.pt is a file, .*\n  Start .* with stage\.policy=.*hostile\.pt"):
        Pretrained(str(path)).tokenizer()


def test_a_folder_as_a_file_is_named(work: Workshop) -> None:
    work.path("model.pt").mkdir()
    with pytest.raises(ConfigError, match=r"model\.pt is a directory, but a \.pt file is needed\."):
        open_model_source(str(work.folder / "model.pt"))


def test_a_valid_export_and_folder_open(work: Workshop) -> None:
    """The changes above are what makes the cases fail. A checkpoint next to a model is not opened."""
    for path in (work.export(lambda content: None), work.hf({"other.ckpt": "x"})):
        assert open_completely(path).config.hidden_size == 16


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
GPT2_LIKE = {"vocab_size": 300, "n_positions": 8, "n_embd": 16, "n_layer": 1, **SPECIAL}
EIGHT_POSITIONS = {
    "learned": GPT2Config(n_head=2, **GPT2_LIKE),
    "gptj": GPTJConfig(n_head=2, rotary_dim=4, **GPT2_LIKE),
    "codegen": CodeGenConfig(n_head=4, rotary_dim=4, **GPT2_LIKE),
    "ctrl": CTRLConfig(n_head=2, dff=16, **GPT2_LIKE),
    "mpt": MptConfig(vocab_size=300, max_seq_len=8, d_model=16, n_layers=1, n_heads=2, **SPECIAL),
    "dynamic": LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        rope_parameters=DYNAMIC,
        **SPECIAL,
    ),
}


@pytest.mark.parametrize(("stage", "positions"), [("dpo", "learned"), *(("sft", name) for name in EIGHT_POSITIONS)])
def test_data_longer_than_the_positions_are_refused(tiny_run: TinyRun, stage: str, positions: str) -> None:
    """Otherwise, the first long sequence would be an index error, or change the positions of all later ones."""
    lm = AutoModelForCausalLM.from_config(EIGHT_POSITIONS[positions])
    short = TinyRun(tiny_run.folder, tiny_run.tokenizer, lm)
    with pytest.raises(ConfigError, match=r"^data\.max_length=\d+ allows sequences of \d+ tokens.*\n.*max_length=8$"):
        short.train(stage, trainer={"max_steps": 1})
