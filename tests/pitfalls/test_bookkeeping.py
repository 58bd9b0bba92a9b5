"""Pitfalls 22 to 29 of the table in README.md beside this file: checkpoints, counters, random state, memory, tests."""

import ast
import random
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pitfalls.runs import STAGES, Run, Runs, texts
from rlhf.errors import UserError
from rlhf.export import open_model_source, save_result
from rlhf.models import backbone


def test_22_the_reward_head_is_saved_and_never_made_up(runs: Runs, tmp_path: Path) -> None:
    """A trained head of two layers is PPO's judge and critic, bit for bit; without its last matrix nothing starts."""
    reward = runs.fit("reward", num_layers=2, hidden_dim=7, learning_rate=1e-2)
    path = tmp_path / "reward.pt"
    save_result(reward.module.result(), path, {})
    trained = {name: weight.clone() for name, weight in reward.module.model.state_dict().items()}
    assert "head.layers.2.weight" in trained
    run = runs.fit("ppo", reward_model=open_model_source(str(path)), learning_rate=0.0, trainer={"max_steps": 1})
    for model in (run.module.reward.model.model, run.module.critic):
        torch.testing.assert_close(dict(model.state_dict()), trained, rtol=0.0, atol=0.0)

    content = torch.load(path, weights_only=True)
    del content["weights"]["head.layers.2.weight"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"the reward head is not in the file: head\.layers\.2\.weight"):
        runs.fit("ppo", reward_model=open_model_source(str(path)))


def test_23_global_step_counts_optimizer_steps(runs: Runs) -> None:
    """PPO with 2 answers a minibatch, two passes and accumulation over 2: 8 minibatches are 4 steps.

    The linear schedule, which ends at 0, has gone down a quarter with each of them; policy and critic share the count.
    """
    keys = {"minibatch_size": 2, "ppo_epochs": 2, "schedule": "linear", "learning_rate": 1e-3}
    run = runs.fit("ppo", trainer={"accumulate_grad_batches": 2}, **keys)
    assert (len(run.batches), len(run.kept.norms), run.trainer.global_step) == (8, 4, 4)
    assert run.trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == pytest.approx([0.0] * 4, abs=1e-12)
    assert run.curve("lr") == pytest.approx([1e-3 * (1 + 0.75 + 0.5 + 0.25) / 4])  # the mean of its four steps


@pytest.mark.parametrize("stage", STAGES)
def test_24_resume_goes_on_in_the_middle_of_an_epoch(runs: Runs, stage: str, tmp_path: Path) -> None:
    """4 batches of 2 rows an epoch: 8 steps in one go, and the last 3 again from the checkpoint of step 5.

    They have the same rows, sampled answers included, in the same order, and the weights agree bit for bit.
    """
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    keys: dict[str, Any] = {"data": {"batch_size": 2}, "schedule": "linear"}
    trainer = {"max_epochs": 2, "enable_checkpointing": True}
    whole = runs.fit(stage, trainer=trainer, callbacks=[every], **keys)
    rest = runs.fit(stage, trainer=trainer, resume=tmp_path / "step=5.ckpt", **keys)
    order, again = ([texts(batch).input_ids.tolist() for batch in run.batches] for run in (whole, rest))
    assert len(order) == 8
    assert again == order[5:]
    assert order[:4] != order[4:], "the second epoch has an order of its own"
    torch.testing.assert_close(rest.weights(), whole.weights(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("stage", "learned"), [("dpo", {"policy"}), ("ppo", {"policy", "critic", "iterations", "kl", "scores"})]
)
def test_25_frozen_weights_are_not_in_checkpoints(runs: Runs, stage: str, learned: set[str], tmp_path: Path) -> None:
    """The learned weights and AdamW's two moments of each: three numbers a parameter, and a few for counters."""
    run = runs.fit(stage)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in content["state_dict"]} == learned
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors(content)}
    expected = 3 * 4 * sum(weight.numel() for weight in run.module.parameters())  # bytes
    assert expected <= sum(held.values()) < 1.1 * expected
    assert (tmp_path / "last.ckpt").stat().st_size < 1.5 * expected


def tensors(content: Any) -> list[Tensor]:
    return [part for part in tree_leaves(content) if isinstance(part, Tensor)]


@pytest.mark.parametrize("stage", STAGES)
def test_26_clipping_bounds_the_unscaled_gradient(runs: Runs, stage: str) -> None:
    """fp16 with a gradient scaler, here on the CPU: the loss is scaled by 2^8, and no step sees a norm above 0.01.

    Clipped while scaled, 0.01 would be 4e-5 once it is unscaled. Lightning gives a CPU bfloat16 where
    ``trainer.precision=16-mixed`` is asked for, so its plugin for fp16 is named here.
    """

    def fit(**trainer: Any) -> Run:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return runs.fit(stage, trainer={"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], **trainer})

    free, clipped = fit(), fit(gradient_clip_val=0.01)
    assert free.kept.norms[0] > 0.01
    assert clipped.kept.norms == pytest.approx([0.01], rel=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm it divides by
    assert clipped.curve("grad_norm") == free.curve("grad_norm") == pytest.approx(free.kept.norms)


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


@pytest.mark.parametrize("stage", STAGES)
def test_27_constructors_leave_the_random_state_alone(runs: Runs, stage: str) -> None:
    """Modules, datamodules and the tokens they make draw nothing from the global generators and reseed none."""
    lightning.seed_everything(5, verbose=False)
    before = random_states()
    run = runs.build(stage, data={"val_fraction": 0.25})
    if stage != "ppo":  # whose prompts leave room for answers, so that they ask the Trainer
        run.data.setup("fit")
        list(run.data.train_dataloader())
    assert random_states() == before


@pytest.mark.parametrize("stage", STAGES)
def test_27_the_logged_gradient_norm_is_that_of_the_step(runs: Runs, stage: str) -> None:
    """Not of a gradient that has been zeroed already."""
    run = runs.fit(stage, trainer={"max_epochs": 3})
    assert len(run.kept.norms) == 3
    assert min(run.kept.norms) > 0
    assert run.curve("grad_norm") == pytest.approx(run.kept.norms)


class Logits(TorchDispatchMode):
    """Notes how many distributions over the vocabulary any tensor holds while it is on.

    Args:
        vocabulary: tokens; no other last dimension of the model may be as long.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for part in tensors(result):
            if part.is_floating_point() and part.shape[-1:] == (self.vocabulary,):
                weight = part.shape[0] == WIDTH and part.ndim == 2  # the output embedding, transposed
                self.most = max(self.most, 0 if weight else part.numel() // self.vocabulary)
        return result


WIDTH = 32


def test_28_logits_of_a_rollout_are_never_held_at_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of 5 tokens: sampling holds the logits of one token an answer, looking back those of 5 tokens.

    The rollout has 8 rows of up to 50 tokens, of which more than 20 are answers. Learning needs those of the answers,
    for the gradient, and of nothing else.
    """
    monkeypatch.setattr(backbone, "PIECE", 5)
    most: dict[str, int] = {}

    def watched(name: str, method: Any) -> Any:
        def run(*args: Any) -> Any:
            with Logits(300) as logits:
                result = method(*args)
            most[name] = logits.most
            return result

        return run

    run = runs.build("ppo")
    for name in ("answer", "evaluate_rollout", "judge", "training_step"):
        setattr(run.module, name, watched(name, getattr(run.module, name)))
    run.trainer.fit(run.module, run.data)
    answers = int(run.batches[0].response_mask.sum())
    assert answers > 20
    assert run.batches[0].input_ids.numel() > 2 * answers
    assert most == {"answer": 8, "evaluate_rollout": 5, "judge": 0, "training_step": most["training_step"]}
    assert most["training_step"] <= answers


LARGEST = 1e-2
TOLERANCES = ("rel", "abs", "rtol", "atol")


def tolerances(tree: ast.AST) -> list[tuple[int, ast.expr]]:
    """Line and value of every tolerance that is given to a comparison of numbers."""
    found = []
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            second = call.args[1:] if name == "approx" else call.args[2:] if name in ("isclose", "allclose") else []
            given = [word.value for word in call.keywords if word.arg in TOLERANCES]
            found += [(value.lineno, value) for value in (*second, *given)]
    return found


def too_large(value: ast.expr) -> bool:
    """A number above 1 %, or one that only running the test would tell."""
    try:
        return abs(float(ast.literal_eval(value))) > LARGEST
    except (ValueError, TypeError):
        return True


def explained(source: str, tree: ast.AST, number: int) -> bool:
    """A comment on the line or the one before, or a docstring of the test that speaks of tolerance."""
    if any("#" in line for line in source.splitlines()[max(number - 2, 0) : number]):
        return True
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    around = [test for test in tests if test.lineno <= number <= (test.end_lineno or 0)]
    return any("olerance" in (ast.get_docstring(test) or "") for test in around)


def test_29_no_tolerance_is_large_without_a_reason(repo: Path) -> None:
    """Above 1 %, or computed, it has a word of explanation."""
    seen, unexplained = 0, []
    for path in sorted((repo / "tests").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        for number, value in tolerances(tree):
            seen += 1
            if too_large(value) and not explained(source, tree, number):
                unexplained.append(f"{path.relative_to(repo)}:{number}: {ast.unparse(value)}")
    assert unexplained == []
    assert seen > 20, "the walk finds nothing"


def test_29_every_test_can_fail(repo: Path) -> None:
    """It asserts, expects an error, or calls something that is named for that."""
    idle = []
    for path in sorted((repo / "tests").rglob("test_*.py")):
        for test in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                called = {ast.unparse(node.func) for node in ast.walk(test) if isinstance(node, ast.Call)}
                checks = any(word in name for name in called for word in ("assert_", "check_", "raises"))
                if not checks and not any(isinstance(node, ast.Assert) for node in ast.walk(test)):
                    idle.append(f"{path.relative_to(repo)}::{test.name}")
    assert idle == []
