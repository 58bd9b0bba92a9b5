"""Pitfalls 22 to 29 of the table in README.md: checkpoints, counters, random state, memory, tests."""

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

from harness import EXACT, NO_UPDATE, Run, TinyRun, sequences
from pitfalls.settings import STAGES
from rlhf.errors import UserError
from rlhf.export import open_model_source, save_result
from rlhf.models import logits


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def test_22_the_reward_head_is_saved_and_never_initialized_at_random(tiny_run: TinyRun, tmp_path: Path) -> None:
    """PPO's reward model and critic have the trained two-layer head, bit for bit; a file without it is rejected."""
    reward = tiny_run.train("reward", num_layers=2, hidden_dim=7, learning_rate=1e-2)
    path = tmp_path / "reward.pt"
    save_result(reward.module.result(), path, {})
    trained = {name: weight.clone() for name, weight in reward.module.model.state_dict().items()}
    assert "head.layers.2.weight" in trained
    run = tiny_run.train(
        "ppo", reward_model=open_model_source(str(path)), learning_rate=NO_UPDATE, trainer={"max_steps": 1}
    )
    for model in (run.module.reward.model.model, run.module.critic):
        torch.testing.assert_close(dict(model.state_dict()), trained, **EXACT)

    content = torch.load(path, weights_only=True)
    del content["weights"]["head.layers.2.weight"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"the reward head is missing from the file: head\.layers\.2\.weight"):
        tiny_run.train("ppo", reward_model=open_model_source(str(path)))


def test_23_global_step_counts_optimizer_steps(tiny_run: TinyRun) -> None:
    """PPO with minibatches of 2, two passes and accumulation over 2: 8 minibatches are 4 steps.

    The linear schedule decreases by a quarter with each step and ends at 0. Policy and critic share the count.
    """
    keys = {"minibatch_size": 2, "ppo_epochs": 2, "schedule": "linear", "learning_rate": 1e-3}
    run = tiny_run.train("ppo", trainer={"accumulate_grad_batches": 2}, **keys)
    assert (len(run.batches), len(run.recorder.grad_norms), run.trainer.global_step) == (8, 4, 4)
    assert run.trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == pytest.approx([0.0] * 4, abs=1e-12)
    assert run.curve("lr") == pytest.approx([1e-3 * (1 + 0.75 + 0.5 + 0.25) / 4])  # the mean over the four steps


@pytest.mark.parametrize("stage", STAGES)
def test_24_resuming_continues_in_the_middle_of_an_epoch(tiny_run: TinyRun, stage: str, tmp_path: Path) -> None:
    """With 4 batches of 2 rows per epoch, 8 steps without interruption equal 5 steps, a checkpoint and 3 more.

    The last 3 batches have the same rows in the same order, sampled responses included, and the weights are equal.
    """
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    keys: dict[str, Any] = {"data": {"batch_size": 2}, "schedule": "linear"}
    trainer = {"max_epochs": 2, "enable_checkpointing": True}
    whole = tiny_run.train(stage, trainer=trainer, callbacks=[checkpoint], **keys)
    rest = tiny_run.train(stage, trainer=trainer, resume=tmp_path / "step=5.ckpt", **keys)
    order, again = ([sequences(batch).input_ids.tolist() for batch in run.batches] for run in (whole, rest))
    assert len(order) == 8
    assert again == order[5:]
    assert order[:4] != order[4:], "every epoch is shuffled differently"
    torch.testing.assert_close(rest.weights, whole.weights, **EXACT)


@pytest.mark.parametrize(
    ("stage", "trained"), [("dpo", {"policy"}), ("ppo", {"policy", "critic", "_extra_state", "kl", "scores"})]
)
def test_25_frozen_weights_are_not_in_checkpoints(
    tiny_run: TinyRun, stage: str, trained: set[str], tmp_path: Path
) -> None:
    """A checkpoint holds the trained weights, two AdamW moments per weight, and a few counters."""
    run = tiny_run.train(stage)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in content["state_dict"]} == trained
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(content)}
    expected = 3 * 4 * sum(weight.numel() for weight in run.module.parameters())  # bytes
    assert expected <= sum(sizes.values()) < 1.1 * expected
    assert (tmp_path / "last.ckpt").stat().st_size < 1.5 * expected


def tensors(content: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("stage", STAGES)
def test_26_clipping_bounds_the_unscaled_gradient(tiny_run: TinyRun, stage: str) -> None:
    """With fp16 and a loss scale of 2^8, every step uses a gradient of norm 0.01.

    Clipping the scaled gradient would leave a norm of 0.01 / 2^8 = 4e-5 after unscaling. On a CPU Lightning replaces
    ``trainer.precision=16-mixed`` by bfloat16, so the test passes the plugin for fp16 itself.
    """

    def fit(**trainer: Any) -> Run:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return tiny_run.train(stage, trainer={"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], **trainer})

    free, clipped = fit(), fit(gradient_clip_val=0.01)
    assert free.recorder.grad_norms[0] > 0.01
    assert clipped.recorder.grad_norms == pytest.approx(
        [0.01], rel=1e-3
    )  # clip_grad_norm_ adds 1e-6 to the norm it divides by
    assert clipped.curve("grad_norm") == free.curve("grad_norm") == pytest.approx(free.recorder.grad_norms)


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


@pytest.mark.parametrize("stage", STAGES)
def test_27_constructors_do_not_change_the_random_state(tiny_run: TinyRun, stage: str) -> None:
    """Building modules and datamodules and encoding the data neither draw from global generators nor reseed them."""
    lightning.seed_everything(5, verbose=False)
    before = random_states()
    run = tiny_run.build(stage, data={"val_fraction": 0.25})
    if stage != "ppo":  # The budget of prompts depends on the module that the Trainer knows.
        run.datamodule.setup("fit")
        list(run.datamodule.train_dataloader())
    assert random_states() == before


@pytest.mark.parametrize("stage", STAGES)
def test_27_the_logged_gradient_norm_is_the_norm_that_the_step_used(tiny_run: TinyRun, stage: str) -> None:
    """It is not the norm of a gradient that has already been set to zero."""
    run = tiny_run.train(stage, trainer={"max_epochs": 3})
    assert len(run.recorder.grad_norms) == 3
    assert min(run.recorder.grad_norms) > 0
    assert run.curve("grad_norm") == pytest.approx(run.recorder.grad_norms)


class LogitCounter(TorchDispatchMode):
    """Records the largest number of distributions over the vocabulary that any tensor holds.

    Args:
        vocabulary: Vocabulary size, which no other last dimension of the model may equal.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tensors(result):
            if tensor.is_floating_point() and tensor.shape[-1:] == (self.vocabulary,):
                is_weight = tensor.shape[0] == WIDTH and tensor.ndim == 2  # the output embedding, transposed
                self.largest = max(self.largest, 0 if is_weight else tensor.numel() // self.vocabulary)
        return result


WIDTH = 32


def test_28_logits_of_a_whole_rollout_are_never_in_memory(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of 5 tokens, sampling holds the logits of one token per response, all other passes those of 5 tokens.

    The rollout has 8 rows of up to 50 tokens, of which more than 20 are response tokens. In training, the backward pass
    computes the logits of each chunk again.
    """
    monkeypatch.setattr(logits, "LOGIT_CHUNK_BYTES", 5 * 4 * 300)
    largest: dict[str, int] = {}

    def watched(name: str, method: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with LogitCounter(300) as counter:
                result = method(*args, **kwargs)
            largest[name] = counter.largest
            return result

        return run

    run = tiny_run.build("ppo")
    run.module.configure_model()
    for name in ("sample", "evaluate_rollout", "score"):
        setattr(run.module.collector, name, watched(name, getattr(run.module.collector, name)))
    run.module.training_step = watched("training_step", run.module.training_step)
    run.module.backward = watched("backward", run.module.backward)
    run.trainer.fit(run.module, run.datamodule)
    response_tokens = int(run.batches[0].response_mask.sum())
    assert response_tokens > 20
    assert run.batches[0].input_ids.numel() > 2 * response_tokens
    assert largest == {"sample": 8, "evaluate_rollout": 5, "score": 0, "training_step": 5, "backward": 5}


MAX_TOLERANCE = 1e-2
TOLERANCES = ("rel", "abs", "rtol", "atol")


def tolerances(tree: ast.AST) -> list[tuple[int, ast.expr]]:
    """Return line and value of every tolerance of a numeric comparison."""
    found = []
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            second = call.args[1:] if name == "approx" else call.args[2:] if name in ("isclose", "allclose") else []
            given = [word.value for word in call.keywords if word.arg in TOLERANCES]
            found += [(value.lineno, value) for value in (*second, *given)]
    return found


def too_large(value: ast.expr) -> bool:
    """Return True for a number above 1 % and for a value that only running the test would show."""
    try:
        return abs(float(ast.literal_eval(value))) > MAX_TOLERANCE
    except (ValueError, TypeError):
        return True


def explained(source: str, tree: ast.AST, number: int) -> bool:
    """Return True if the line or the previous one has a comment, or the test's docstring mentions the tolerance."""
    if any("#" in line for line in source.splitlines()[max(number - 2, 0) : number]):
        return True
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    around = [test for test in tests if test.lineno <= number <= (test.end_lineno or 0)]
    return any("olerance" in (ast.get_docstring(test) or "") for test in around)


def test_29_large_tolerances_are_explained(repo: Path) -> None:
    """A tolerance above 1 %, or a computed one, has an explanation."""
    count, unexplained = 0, []
    for path in sorted((repo / "tests").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        for number, value in tolerances(tree):
            count += 1
            if too_large(value) and not explained(source, tree, number):
                unexplained.append(f"{path.relative_to(repo)}:{number}: {ast.unparse(value)}")
    assert unexplained == []
    assert count > 20, "the search found nothing"


def test_29_every_test_can_fail(repo: Path) -> None:
    """Every test asserts, expects an error, or calls a function whose name says that it asserts."""
    idle: list[str] = []
    for path in sorted((repo / "tests").rglob("test_*.py")):
        for test in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                called = {ast.unparse(node.func) for node in ast.walk(test) if isinstance(node, ast.Call)}
                checks = any(word in name for name in called for word in ("assert_", "check_", "raises"))
                if not checks and not any(isinstance(node, ast.Assert) for node in ast.walk(test)):
                    idle.append(f"{path.relative_to(repo)}::{test.name}")
    assert idle == []
