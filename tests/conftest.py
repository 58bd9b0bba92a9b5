"""What every test may ask for: a tokenizer and a model of each architecture, small enough for one slow core."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

# before any library reads them: no network, and nothing left behind in the user's cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rlhf-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

from helpers import Fixed  # noqa: E402
from online import Setting  # noqa: E402
from rlhf.models import (  # noqa: E402
    Mamba,
    ModelSource,
    ScalarHead,
    ScalarModel,
    Transformer,
    chat_template,
    train_tokenizer,
)

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


@pytest.fixture
def policy(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Fixed:
    """A model that ends an answer at about every fifth token, so that answers have different lengths."""
    with torch.no_grad():
        embedding = lm.get_output_embeddings().weight
        embedding += 0.1  # now hidden states share a direction; all logits move alike, so nothing else changes
        tokens = torch.arange(3, len(tokenizer))[None, :64]
        common = lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0].mean(dim=0)
        # the logit of EOS is then about 3 above those of the other 300; at temperature 0.7: e^4.3 / (e^4.3 + 300) = 0.2
        embedding[tokenizer.eos_token_id] += 3 * common / common.square().sum()
    return Fixed(lm)


@pytest.fixture
def judge(lm: PreTrainedModel) -> Fixed:
    torch.manual_seed(1)
    return Fixed(ScalarModel(deepcopy(lm.base_model), ScalarHead(32)))


@pytest.fixture
def setting(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, policy: Fixed, judge: Fixed) -> Setting:
    return Setting(tmp_path, tokenizer, policy, judge)
