"""Models that are described before their weights are read."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from harness import FakeSource, tiny_reward_model
from rlhf.errors import DataError
from rlhf.export import Export, save_result
from rlhf.models import LoRA, ModelSource, Pretrained, Transformer, WithAdapter, trunk_without_weights
from rlhf.stage import Result

CONFIG = GPT2Config(vocab_size=300, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)


@pytest.fixture
def gpt2() -> PreTrainedModel:
    """A language model with 24 learned positions."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(CONFIG)


def described(kind: str, folder: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> ModelSource:
    """Write a model to files of the given kind, and return their source."""
    path = folder / "base"
    lm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if kind == "folder":
        return Pretrained(str(path))
    model = lm
    if kind == "reward model":
        model = tiny_reward_model(lm)
    elif kind == "adapter":
        model = WithAdapter(Pretrained(str(path)), LoRA(r=2, alpha=4)).language_model(tokenizer)
    save_result(Result(model, tokenizer), folder / "x_final.pt", {})
    return Export(str(folder / "x_final.pt"))


@pytest.mark.parametrize("kind", ["folder", "policy", "reward model", "adapter"])
def test_files_describe_the_trunk_without_weights(
    kind: str, tmp_path: Path, gpt2: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The layers are those of the model, and no parameter takes memory."""
    trunk = trunk_without_weights(described(kind, tmp_path, gpt2, tokenizer))
    assert trunk is not None
    shapes = {name: parameter.shape for name, parameter in trunk.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in gpt2.base_model.named_parameters()}
    assert {parameter.device.type for parameter in trunk.parameters()} == {"meta"}
    assert trunk.config.max_position_embeddings == 24


def test_other_sources_are_not_described(gpt2: PreTrainedModel) -> None:
    assert trunk_without_weights(FakeSource(gpt2)) is None
    assert trunk_without_weights(Transformer()) is None


def test_an_adapter_without_its_base_is_named(
    tmp_path: Path, gpt2: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = described("adapter", tmp_path, gpt2, tokenizer)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"x_final\.pt contains an adapter, and its base model cannot be opened"):
        trunk_without_weights(source)
