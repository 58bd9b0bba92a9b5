"""What every test may ask for: a tokenizer and a model of each architecture, small enough for one slow core."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# before any library reads them: no network, and nothing left behind in the user's cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rlhf-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

from rlhf.models import Mamba, ModelSource, Transformer, chat_template, train_tokenizer  # noqa: E402

SENTENCES = (
    "The mayor of Dunmore opened the new bridge on Monday.",
    "Children liked it best of all, and the weather stayed mild.",
    "It costs 90 euros; orders are taken from May.",
    "Summary: Nadia Falk, camera, Dunmore, May, 90 euros.",
)
SOURCES: dict[str, ModelSource] = {
    "transformer": Transformer(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128),
    # chunks of 4, so that even short texts cross the scan's chunks
    "mamba": Mamba(hidden_size=32, num_layers=2, head_dim=16, state_size=8, chunk_size=4),
}


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens with a plain template."""
    tokenizer = train_tokenizer(SENTENCES, 300)
    tokenizer.chat_template = chat_template("{prompt}\nSummary:")
    return tokenizer


@pytest.fixture(autouse=True)
def _keep_template(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """A test that sets a template on the shared tokenizer leaves no trace."""
    template = tokenizer.chat_template
    yield
    tokenizer.chat_template = template


@pytest.fixture(scope="session", params=sorted(SOURCES, reverse=True))
def architecture(request: pytest.FixtureRequest) -> str:
    """``transformer``, then ``mamba``."""
    return request.param


@pytest.fixture(scope="session")
def source(architecture: str) -> ModelSource:
    """Where a tiny model of the architecture comes from."""
    return SOURCES[architecture]


@pytest.fixture
def lm(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A new tiny language model, the same weights every time, in eval mode."""
    torch.manual_seed(0)
    return source.language_model(tokenizer).eval()
