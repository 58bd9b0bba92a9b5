"""Models of text and images that transformers does not list as causal language models: they are opened and exported."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast, Qwen3VLConfig

from rlhf import load_model
from rlhf.export import open_model_source, save_result
from rlhf.export.huggingface import save_huggingface
from rlhf.models import LoRA, Pretrained, ScalarHead, ScalarModel, WithAdapter
from rlhf.stage import Result

IDS = torch.tensor([[5, 260, 17, 3, 99, 41, 8]])


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """A folder with a Qwen3-VL of random weights."""
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    images = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen3VLConfig(text_config={**text, **heads}, vision_config={**images, "deepstack_visual_indexes": [0]})
    AutoModelForImageTextToText.from_config(config).save_pretrained(path := str(tmp_path / "base"))
    tokenizer.save_pretrained(path)
    return path


def export(model: PreTrainedModel | ScalarModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> str:
    save_result(Result(model, tokenizer), path, {"stage": "sft", "inputs": {}})
    return str(path)


@torch.no_grad()
def test_a_language_model_is_exported_with_its_image_encoder(
    folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    path = export(Pretrained(folder).language_model(tokenizer), tokenizer, tmp_path / "sft_final.pt")
    save_huggingface(path, hf := str(tmp_path / "hf"))
    for opened in (load_model(path, device="cpu")[0], AutoModelForImageTextToText.from_pretrained(hf)):
        assert type(opened) is type(plain)
        torch.testing.assert_close(opened.state_dict(), plain.state_dict(), rtol=0, atol=0)
        assert torch.equal(opened(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_a_reward_model_is_exported(folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    reward_model = ScalarModel(Pretrained(folder).language_model(tokenizer).base_model, ScalarHead(16)).eval()
    opened, _, _ = load_model(export(reward_model, tokenizer, tmp_path / "reward_model_final.pt"), device="cpu")
    mask = torch.ones_like(IDS, dtype=torch.bool)
    assert torch.equal(opened(IDS, mask), reward_model(IDS, mask))


@pytest.mark.filterwarnings("error:Could not find a config file")
def test_an_adapter_is_exported_without_a_warning(
    folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """peft warns if it finds no configuration of the base model, which is a file of this project here."""
    base = export(Pretrained(folder).language_model(tokenizer), tokenizer, tmp_path / "sft_final.pt")
    adapted = WithAdapter(open_model_source(base), LoRA(r=2)).language_model(tokenizer)
    path = export(adapted, tokenizer, tmp_path / "dpo_final.pt")
    save_huggingface(path, hf := str(tmp_path / "hf"))
    assert Path(hf, "adapter_config.json").is_file()
