"""Fixtures for all tests: a tokenizer and a model of each architecture, small enough for one slow core."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Set before any library reads them: no network, no files in the user's cache, and one thread, which is faster for tiny
# models and leaves the other cores to other tests.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rlhf-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

from harness import FakeSource, TinyRun, make_eos_likely, tiny_reward_model  # noqa: E402
from rlhf.models import (  # noqa: E402
    Mamba,
    ModelSource,
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
    # Chunks of 4, so that even short sequences span several chunks of the scan.
    "mamba": Mamba(hidden_size=32, num_layers=2, head_dim=16, state_size=8, chunk_size=4),
}


@pytest.fixture(scope="session", autouse=True)
def _no_external_callbacks() -> Iterator[None]:
    """Each Trainer would search the metadata of all installed packages for callbacks, which takes 10 ms."""
    from lightning.pytorch.trainer.connectors import callback_connector

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback_connector, "_load_external_callbacks", lambda _: [])
        yield


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, which every stage runs at its end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 300 tokens and a plain chat template."""
    tokenizer = train_tokenizer(SENTENCES, 300)
    tokenizer.chat_template = chat_template("{prompt}\nSummary:")
    return tokenizer


@pytest.fixture(autouse=True)
def _keep_template(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Restore the chat template that a test may have set on the shared tokenizer."""
    template = tokenizer.chat_template
    yield
    tokenizer.chat_template = template


@pytest.fixture(scope="session", params=sorted(SOURCES, reverse=True))
def architecture(request: pytest.FixtureRequest) -> str:
    """The architecture: ``transformer``, then ``mamba``."""
    return request.param


@pytest.fixture(scope="module")  # Not of the session: a module that overrides ``architecture`` would get a cached one.
def source(architecture: str) -> ModelSource:
    """The source of a tiny model of the architecture."""
    return SOURCES[architecture]


@pytest.fixture
def lm(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A new tiny language model in eval mode, with the same weights every time."""
    torch.manual_seed(0)
    return source.language_model(tokenizer).eval()


@pytest.fixture
def policy(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> FakeSource:
    """A source of a model that ends a response at about every fifth token, so that responses differ in length."""
    return FakeSource(make_eos_likely(lm, tokenizer.eos_token_id))


@pytest.fixture
def reward_model(lm: PreTrainedModel) -> FakeSource:
    """A source of a reward model with the trunk of ``lm`` and a random head."""
    return FakeSource(tiny_reward_model(lm))


@pytest.fixture
def tiny_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, policy: FakeSource) -> TinyRun:
    """Trains tiny runs of any stage, from a model whose responses have different lengths."""
    return TinyRun(tmp_path, tokenizer, policy.model)


@pytest.fixture
def recorded_steps(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """The configuration of each step of a pipeline that ran.

    A step only writes its log and the file that it exports, and its metric is its number.
    """
    from rlhf import pipeline

    found: list[DictConfig] = []

    def run_stage(
        cfg: DictConfig, on_start: Callable[[], None], overrides: list[str], later: list[DictConfig]
    ) -> float:
        found.append(cfg)
        on_start()
        output = Path(cfg.paths.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{cfg.stage_name}.log").touch()
        if cfg.stage_info.final:
            (output / cfg.stage_info.final).write_text(f"result of {output}")
        return float(len(found))

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    return found
