"""Adapters on two ranks, with DDP and with FSDP2, train what one process trains."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.test_ddp import LIMIT, largest_difference, settings
from distributed.test_fsdp import strategy
from harness import TinyRun, make_eos_likely, tiny_reward_model
from ranks import DDP, in_ranks
from rlhf.export import Export, save_result
from rlhf.models import LoRA, SharedBase, WithAdapter, base_weights, full_state_dict
from rlhf.stage import Result

STAGES = ("reward", "ppo")
STRATEGIES = ("ddp", "fsdp")
EPS = 1e-2  # The first gradients of A are 0, because B is 0. AdamW would turn rounding errors in them into full steps.


def train(rank: int, tiny_run: TinyRun, ranks: int) -> dict[str, Any]:
    """Train stages with adapters under each strategy, export them, and describe what comes out."""
    results = {}
    for name in STRATEGIES if ranks > 1 else ("one",):
        for stage in STAGES:
            keys = {**settings(stage, ranks), "eps": EPS}
            devices = {"one": {}, "ddp": DDP, "fsdp": strategy(ranks)}[name]
            flags = {**keys.pop("trainer"), **devices, "default_root_dir": tiny_run.folder}
            run = tiny_run.train(stage, trainer=flags, **sources(stage, tiny_run.folder), **keys)
            path = tiny_run.folder / f"{name}_{stage}.pt"
            save_result(run.module.result(), path, {})
            left_out = base_weights(run.module)
            weights = {name: value for name, value in full_state_dict(run.module).items() if name not in left_out}
            results[name, stage] = weights, str(path), shares_base(run.module)
    return results


def sources(stage: str, folder: Path) -> dict[str, Any]:
    """Return the inputs of a stage: models with adapters on the base models in ``folder``."""
    lora, shared = LoRA(r=2, alpha=4), SharedBase()
    inputs = {"policy": "base.pt", **({"reward_model": "reward.pt"} if stage == "ppo" else {})}
    return {name: WithAdapter(Export(str(folder / file)), lora, shared) for name, file in inputs.items()}


def shares_base(module: Any) -> bool:
    """Return whether the policy and the reference model hold the same frozen parameters."""
    if not hasattr(module, "reference"):
        return False
    frozen = {parameter for parameter in module.policy.parameters() if not parameter.requires_grad}
    return frozen == set(module.reference.model.parameters())


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, source: Any) -> list[dict[Any, Any]]:
    """The results of ``train``: of one process, of rank 0 and of rank 1."""
    torch.manual_seed(0)
    lm = make_eos_likely(source.language_model(tokenizer).eval(), tokenizer.eos_token_id)
    runs = [TinyRun(Path(tmp_path_factory.mktemp("runs")), tokenizer, lm) for _ in range(2)]
    for run in runs:
        save_result(Result(lm, tokenizer), run.folder / "base.pt", {})
        save_result(Result(tiny_reward_model(lm), tokenizer), run.folder / "reward.pt", {})
    return [train(0, runs[0], 1), *in_ranks(train, runs[1], 2)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_the_adapter_of_one_process(results: Any, strategy: str, stage: str) -> None:
    one, first = results[0]["one", stage][0], results[1][strategy, stage][0]
    assert any(".lora_B." in name for name in one)
    assert largest_difference(one, first) <= LIMIT


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_export_of_two_ranks_is_that_of_one_process(results: Any, strategy: str, stage: str) -> None:
    """It contains the adapter and the head only."""
    one, two = (
        torch.load(path, weights_only=True) for path in (results[0]["one", stage][1], results[1][strategy, stage][1])
    )
    assert not any("base_layer" in name for name in two["weights"])
    assert largest_difference(one["weights"], two["weights"]) <= LIMIT
    assert one["adapter"]["base"]["digest"] == two["adapter"]["base"]["digest"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_base_is_shared_unless_it_is_sharded(results: Any, strategy: str) -> None:
    """With FSDP2, each model has a separate copy."""
    assert results[0]["one", "ppo"][2]
    assert results[1][strategy, "ppo"][2] == (strategy == "ddp")
