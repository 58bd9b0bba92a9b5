"""Fixtures of the tests on the emulated device."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from accelerator.device import emulated_device
from accelerator.runs import DeviceRuns
from harness import make_eos_likely
from rlhf.models import Mamba, Transformer


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The emulated device, which PyTorch and Lightning see during the test."""
    with emulated_device() as device:
        yield device


@pytest.fixture(scope="session")
def models(tokenizer: PreTrainedTokenizerFast) -> dict[str, PreTrainedModel]:
    """A tiny model of each kind, whose responses differ in length.

    The one named ``pretrained`` has dropout and an output layer that is tied to the embedding.
    """
    gpt2 = {"vocab_size": 300, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
    special_tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    transformer = Transformer(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128)
    mamba = Mamba(hidden_size=32, num_layers=2, head_dim=16, state_size=8, chunk_size=4)
    build: dict[str, Callable[[], PreTrainedModel]] = {
        "transformer": partial(transformer.language_model, tokenizer),
        "mamba": partial(mamba.language_model, tokenizer),
        "pretrained": partial(AutoModelForCausalLM.from_config, GPT2Config(**gpt2, **special_tokens)),
    }
    models = {}
    for name, source in build.items():
        torch.manual_seed(0)
        models[name] = make_eos_likely(source().eval(), tokenizer.eos_token_id)
    return models


@pytest.fixture
def runs(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    models: dict[str, PreTrainedModel],
) -> DeviceRuns:
    """Runs of the transformer, or of the model that a test is parametrized with (``indirect=["runs"]``)."""
    name = getattr(request, "param", "transformer")
    return DeviceRuns(tmp_path, tokenizer, models[name], from_folder=name == "pretrained")
