"""Every malformed value in ``mistakes.py`` is rejected with its whole message, before anything is loaded."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from contract.configs import STAGES, compose_config, composed_dict
from contract.mistakes import MISTAKES
from rlhf.config import check_values
from rlhf.errors import ConfigError
from rlhf.schema import accepts


@pytest.mark.parametrize(("stage", "key", "value", "message"), MISTAKES, ids=[f"{k}={v}" for _, k, v, _ in MISTAKES])
def test_a_malformed_value_is_rejected(stage: str, key: str, value: Any, message: str) -> None:
    cfg = OmegaConf.create(composed_dict(f"stage={stage}", "data=jsonl", "data.train=x.jsonl"))
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(ConfigError) as error:
        check_values(cfg)
    assert str(error.value) == message


def test_the_table_is_long() -> None:
    assert len(MISTAKES) >= 250


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_accepted(stage: str) -> None:
    check_values(compose_config(f"stage={stage}"))


def test_an_unknown_annotation_accepts_everything() -> None:
    assert accepts(OmegaConf | None, "text")
