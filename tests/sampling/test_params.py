"""Validation of sampling settings, and stop tokens."""

from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harness import one_architecture
from rlhf.errors import ConfigError
from rlhf.sampling import SamplingParams


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": 1e-38},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop_tokens": []},
        {"stop_tokens": "e"},
    ],
)
def test_invalid_settings_are_refused(setting: dict[str, Any]) -> None:
    """The message names the key and its value."""
    ((key, value),) = setting.items()
    with pytest.raises(ConfigError, match=rf"^{key} must be") as raised:
        SamplingParams(**setting)
    assert repr(value) in str(raised.value)


def test_stop_ids_are_the_ids_of_the_stop_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The EOS tokens of the model are not added to them."""
    vocabulary = tokenizer.get_vocab()
    lm.generation_config.eos_token_id = [2, 9]
    assert SamplingParams(stop_tokens=["e", "t"]).stop_ids(tokenizer, lm) == [vocabulary["e"], vocabulary["t"]]


def test_eos_is_the_default_stop_token(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The models of ``source`` have random weights, and no other EOS token."""
    assert SamplingParams().stop_ids(tokenizer, lm) == [tokenizer.eos_token_id]


@one_architecture
@pytest.mark.parametrize(
    ("eos_token_id", "expected"),
    [
        (None, [2]),
        (2, [2]),
        (9, [2, 9]),
        ([2, 9], [2, 9]),
        ([9, 7, 9], [2, 9, 7]),
        ([2, 300, -1], [2]),
        (["9", [9]], [2]),
    ],
)
def test_the_eos_tokens_of_the_model_are_stop_tokens(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, eos_token_id: Any, expected: list[int]
) -> None:
    """The tokenizer has EOS 2 and the ids below 300; an export may contain anything."""
    lm.generation_config.eos_token_id = eos_token_id
    assert SamplingParams().stop_ids(tokenizer, lm) == expected


def test_stop_token_must_be_in_the_vocabulary(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="stop_tokens contains 'no token'"):
        SamplingParams(stop_tokens=["no token"]).stop_ids(tokenizer, lm)


def test_a_tiny_temperature_is_refused_with_the_values_that_are_allowed() -> None:
    """Logits that are divided by 1e-38 exceed float32. Greedy decoding is a temperature of 0, as integer or float."""
    with pytest.raises(ConfigError, match=r"^temperature must be 0 or a number of at least 1e-06, got 1e-38\."):
        SamplingParams(temperature=1e-38)
    assert [SamplingParams(temperature=value).temperature for value in (0, 0.0, 1e-6)] == [0, 0, 1e-6]
