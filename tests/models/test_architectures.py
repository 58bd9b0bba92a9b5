"""Every architecture of docs/architectures.md is supported, or rejected with one message, as the page says."""

from pathlib import Path

import pytest
import transformers
from models.architectures import ARCHITECTURES, Architecture, check_supported, table

from rlhf.errors import ConfigError
from rlhf.models import Policy

SUPPORTED = [architecture for architecture in ARCHITECTURES if not architecture.refused]
REFUSED = [architecture for architecture in ARCHITECTURES if architecture.refused]


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
