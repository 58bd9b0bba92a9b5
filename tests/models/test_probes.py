"""Results of checks that models of the same architecture share."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from rlhf.models import ModelSource
from rlhf.models.probes import once_per_architecture


@pytest.fixture(scope="session")
def architecture() -> str:
    """Any architecture has a configuration and modules."""
    return "transformer"


@pytest.fixture
def models(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """Two models of the same architecture with different weights."""
    return [source.language_model(tokenizer) for _ in range(2)]


@pytest.fixture
def checked() -> list[Any]:
    """The models that have been checked."""
    return []


@pytest.fixture
def check(checked: list[Any]) -> Any:
    return once_per_architecture(lambda model: checked.append(model) or len(checked))


def test_models_of_the_same_architecture_share_the_result(check: Any, checked: list[Any], models: list[Any]) -> None:
    assert [check(model) for model in (*models, *models)] == [1, 1, 1, 1]
    assert checked == models[:1]


def with_another_module(model: Any) -> None:
    model.model.layers[1].mlp = nn.Identity()


def with_another_setting(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


def with_eager_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def in_bfloat16(model: Any) -> None:
    model.to(torch.bfloat16)


def with_a_hook(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)


def with_a_replaced_method(model: Any) -> None:
    model.model.layers[1].forward = model.model.layers[0].forward


@pytest.mark.parametrize(
    "change",
    [with_another_module, with_another_setting, with_eager_attention, in_bfloat16, with_a_hook, with_a_replaced_method],
)
def test_a_model_that_may_compute_something_else_is_checked(check: Any, models: list[Any], change: Any) -> None:
    change(models[1])
    assert [check(model) for model in (*models, *models)] == [1, 2, 1, 2]
