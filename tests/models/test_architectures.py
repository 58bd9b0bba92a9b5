"""Every architecture of docs/architectures.md is supported, or rejected with one message, as the page says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from models.architectures import ARCHITECTURES, Architecture, check_supported, table

from rlhf.errors import ConfigError
from rlhf.models import Adapter, LoRA, Policy
from rlhf.models.adapters import BaseModel, add_adapter
from rlhf.speed import speed

SUPPORTED = [architecture for architecture in ARCHITECTURES if not architecture.refused]
WITH_ENCODER = [architecture for architecture in SUPPORTED if architecture.name.endswith("(with an image encoder)")]
REFUSED = [architecture for architecture in ARCHITECTURES if architecture.refused]

# Recurrent architectures and the setting that gives their projections a bias.
BIASES = {
    **dict.fromkeys(["Falcon-Mamba", "Mamba", "Mamba-2", "Nemotron-H"], "use_bias"),
    **dict.fromkeys(["Bamba", "Falcon-H1", "Granite 4", "Jamba"], "mamba_proj_bias"),
    "LFM2": "conv_bias",
    "Zamba2": "add_bias_linear",
}


def skip_if_unknown(architecture: Architecture) -> None:
    if not hasattr(transformers, architecture.config):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.config}")


def test_the_table_has_at_least_45_architectures() -> None:
    assert len(SUPPORTED) >= 45
    assert len({architecture.name for architecture in ARCHITECTURES}) == len(ARCHITECTURES)


def test_the_page_is_up_to_date(repo: Path) -> None:
    """``python docs/generate_architectures.py`` writes it."""
    assert (repo / "docs" / "architectures.md").read_text(encoding="utf-8") == table()


@pytest.mark.parametrize("architecture", SUPPORTED, ids=lambda architecture: architecture.name)
def test_sampled_tokens_are_scored_as_sampled_and_padding_changes_nothing(architecture: Architecture) -> None:
    skip_if_unknown(architecture)
    lm = architecture.build()
    assert type(lm).__name__ == architecture.model
    check_supported(lm)


@pytest.mark.parametrize(("name", "lean"), [*((name, False) for name in BIASES), ("Mamba-2", True)])
def test_padding_does_not_reach_recurrent_layers_with_a_bias(name: str, lean: bool) -> None:
    """The sampler pads prompts on the left, where such a layer of transformers computes a part of its bias."""
    architecture = next(one for one in SUPPORTED if one.name.startswith(f"{name} ") or one.name == name)
    skip_if_unknown(architecture)
    lm = replace(architecture, settings={**architecture.settings, BIASES[name]: True}).build()
    torch.manual_seed(1)
    for key, parameter in lm.named_parameters():
        if key.endswith("proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    with speed(lean_decoding=lean):
        check_supported(lm)


def test_a_decoder_with_cross_attention_needs_no_encoder() -> None:
    architecture = next(one for one in SUPPORTED if one.name == "GPT-2")
    check_supported(replace(architecture, settings={**architecture.settings, "add_cross_attention": True}).build())


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda architecture: architecture.name)
def test_other_architectures_are_rejected_with_one_message(architecture: Architecture) -> None:
    skip_if_unknown(architecture)
    lm = architecture.build()
    assert type(lm).__name__ == architecture.model
    with pytest.raises(ConfigError) as error:
        Policy(lm)
    message = str(error.value)
    assert message.startswith(f"The architecture {architecture.model} is not supported. {architecture.refused}")
    assert "docs/architectures.md" in message
    assert lm.training is False


@pytest.mark.parametrize("architecture", SUPPORTED, ids=lambda architecture: architecture.name)
def test_encoders_of_images_are_frozen_and_no_other_modules(architecture: Architecture) -> None:
    skip_if_unknown(architecture)
    lm = architecture.build()
    Policy(lm)
    frozen = {name.split(".")[1] for name, parameter in lm.named_parameters() if not parameter.requires_grad}
    encoders = {"vision_tower", "multi_modal_projector", "embed_vision", "visual"}
    assert frozen <= encoders
    assert bool(frozen) == (architecture in WITH_ENCODER)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["o_proj", "out_proj"]], ids=str)
@pytest.mark.parametrize("architecture", WITH_ENCODER, ids=lambda architecture: architecture.name)
def test_an_adapter_leaves_encoders_of_images_as_they_are(architecture: Architecture, targets: str | list[str]) -> None:
    """DDP rejects parameters without a gradient."""
    skip_if_unknown(architecture)
    lm = architecture.build()
    add_adapter(lm, Adapter(LoRA(target_modules=targets), BaseModel("base", None, "")))
    Policy(lm)
    lm(input_ids=torch.tensor([[5, 26, 17, 3, 99, 41, 8]])).logits.logsumexp(dim=-1).sum().backward()
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in lm.named_parameters() if "lora_" in name}
    assert trained == {name for name, parameter in lm.named_parameters() if parameter.grad is not None}
    assert trained
