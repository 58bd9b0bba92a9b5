"""Out of memory: the message names what was running and the keys to change."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import STAGES, FakeSource, Run, TinyRun, quick_trainer
from rlhf.data import PromptDataModule
from rlhf.errors import TrainingError
from rlhf.evaluate import EvaluateModule
from rlhf.rl import UpdateLimits
from rlhf.sampling import LocalSampler, SamplingParams
from rlhf.stage.memory import is_out_of_memory
from rlhf.stage.out_of_memory import report_out_of_memory


@pytest.fixture(scope="session")
def architecture() -> str:
    """Memory runs out in the same way in every architecture."""
    return "transformer"


TRAINING = "rlhf.stage.nonfinite.NonfiniteGuard.start_batch"
SAMPLING = "rlhf.sampling.sampler.LocalSampler._decoding"
EVALUATE = "rlhf.rl.collector.Collector._evaluate"
SHORTER = r"stage\.sampling\.max_new_tokens=4 data\.max_length=48"
KEEPS = "which keeps the size of updates"
HALVE = "or stage.on_out_of_memory=halve, which splits batches when it is necessary"
CHECKPOINTS = "Otherwise set stage.gradient_checkpointing=true or"


def exhausted(*arguments: Any, **keys: Any) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 64 TB")


def exhaust(run: Run, stage: str, place: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Train until memory runs out in a function, and return the message without the original error."""
    monkeypatch.setattr(place, exhausted)
    with pytest.raises(TrainingError) as raised, report_out_of_memory(stage, run.module, run.datamodule):
        run.fit()
    assert "can't allocate memory" in str(raised.value)
    assert raised.value.exit_code == 1
    return re.sub(r" \(.*\)\.", ".", str(raised.value))


@pytest.mark.parametrize(
    ("stage", "keys", "place", "expected"),
    [
        # 8 rows are halved, and twice as many of them are accumulated.
        (
            "sft",
            {},
            TRAINING,
            rf"computing a training step\.\n  Set data\.batch_size=4 trainer\.accumulate_grad_batches=2, {KEEPS}, "
            rf"{HALVE}\.\n  {CHECKPOINTS} data\.max_length=48\.",
        ),
        # A limit of 3 batches of 8 rows is one of 6 batches of 4 rows.
        (
            "sft",
            {"trainer": {"limit_train_batches": 3, "accumulate_grad_batches": 2}, "gradient_checkpointing": True},
            TRAINING,
            r"Set data\.batch_size=4 trainer\.accumulate_grad_batches=4 trainer\.limit_train_batches=6, .*\n"
            r"  Otherwise set data\.max_length=48\.",
        ),
        ("sft", {"trainer": {"overfit_batches": 1}}, TRAINING, r"trainer\.overfit_batches=2, which"),
        ("sft", {"data": {"batch_size": 1}}, TRAINING, r"step\.\n  Set stage\.gradient_checkpointing=true or data"),
        (
            "ppo",
            {},
            TRAINING,
            rf"(?s)Set stage\.minibatch_size=2 trainer\.accumulate_grad_batches=2, {KEEPS}, .* {SHORTER}",
        ),
        ("ppo", {"minibatch_size": 64}, TRAINING, r"Set stage\.minibatch_size=4 trainer\.accumulate_grad_batches=2,"),
        # 3 + 3 + 2 responses cannot be halved with the same updates.
        ("ppo", {"minibatch_size": 3}, TRAINING, rf"Set stage\.minibatch_size=1, {HALVE}\.\n"),
        # Splitting would change the KL baseline, or the means that the limits compare.
        ("kto", {}, TRAINING, rf"Set data\.batch_size=4 trainer\.accumulate_grad_batches=2\.\n  {CHECKPOINTS}"),
        (
            "ppo",
            {"limits": UpdateLimits(skip_ratio=10.0)},
            TRAINING,
            rf"Set stage\.minibatch_size=2 trainer\.accumulate_grad_batches=2\.\n  {CHECKPOINTS}",
        ),
        # 2 prompts with 4 responses each.
        ("grpo", {}, SAMPLING, rf"sampling responses\.\n  Set stage\.rollout_batch_size=4\. Otherwise set {SHORTER}\."),
        ("grpo", {"rollout_batch_size": 6}, SAMPLING, r"Set stage\.rollout_batch_size=3\."),
        ("grpo", {"sampler": LocalSampler(batch_size=2)}, SAMPLING, r"Set stage\.sampler\.batch_size=1\."),
        (
            "grpo",
            {"trainer": {"limit_train_batches": 4}},
            EVALUATE,
            r"evaluating a rollout\.\n  Set stage\.minibatch_size=2 trainer\.accumulate_grad_batches=2 "
            rf"trainer\.limit_train_batches=8, {KEEPS}\.\n  Otherwise set {SHORTER}\.",
        ),
        (
            "grpo",
            {},
            "rlhf.reward_functions.model.ModelReward.member_scores",
            rf"scoring responses\.\n  Set reward\.batch_size=4 or {SHORTER}\.",
        ),
        (
            "dpo",
            {"samples": 4, "max_new_tokens": 10},
            SAMPLING,
            r"computing a table of samples\.\n  Set stage\.samples=2, stage\.sampler\.batch_size=2 or "
            r"stage\.max_new_tokens=5\.",
        ),
        (
            "dpo",
            {"samples": 1},
            "rlhf.dpo.base.rewards_and_kl",
            r"Set stage\.samples=0 or stage\.max_new_tokens=32\.",
        ),
        (
            "dpo",
            {"precompute_ref_logprobs": True},
            "rlhf.dpo.reference.ReferenceModule.compute_ref_logprobs",
            r"computing reference log-probs\.\n  Set data\.eval_batch_size=4\.",
        ),
    ],
)
def test_the_message_names_what_was_running_and_the_keys(
    tiny_run: TinyRun,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    keys: dict[str, Any],
    place: str,
    expected: str,
) -> None:
    message = exhaust(tiny_run.build(stage, **keys), stage, place, monkeypatch)
    assert message.startswith(f"stage={stage} has run out of memory while ")
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("keys", "place", "expected"),
    [
        ({}, SAMPLING, r"Set stage\.rollout_batch_size=16\."),
        ({}, EVALUATE, rf"Set stage\.minibatch_size=2 trainer\.accumulate_grad_batches=2, {KEEPS}\."),
        # Rollouts of training have 8 responses, which one minibatch of 16 still holds.
        ({"minibatch_size": 64}, EVALUATE, rf"rollout\.\n  Set stage\.minibatch_size=16, {KEEPS}\."),
    ],
)
def test_validation_of_a_policy_has_rollouts_of_another_size(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], place: str, expected: str
) -> None:
    """8 validation prompts with 4 responses each; the check before training fails in ``validation_step``."""
    val = tiny_run.write("val", STAGES["grpo"].records)
    run = tiny_run.build("grpo", data={"val": val}, trainer={"num_sanity_val_steps": 1}, **keys)
    assert re.search(expected, message := exhaust(run, "grpo", place, monkeypatch)), message


def test_batches_that_are_split_already_have_single_rows(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run.build("sft", on_out_of_memory="halve")
    message = exhaust(run, "sft", "rlhf.sft.module.cross_entropy_loss", monkeypatch)
    assert message.endswith("\n  Set stage.gradient_checkpointing=true or data.max_length=48.")


def test_halved_minibatches_train_as_long(tiny_run: TinyRun) -> None:
    """16 prompts in rollouts of 8, 2 passes: a limit of 4 of the 8 minibatches of 4 is one iteration with 4 steps.

    The message suggests minibatches of 2, two per step, and a limit of 8.
    """
    train = tiny_run.write("train", STAGES["ppo"].records * 2)
    whole = tiny_run.train("ppo", data={"train": train}, trainer={"limit_train_batches": 4})
    trainer = {"limit_train_batches": 8, "accumulate_grad_batches": 2}
    halved = tiny_run.train("ppo", data={"train": train}, minibatch_size=2, trainer=trainer)
    for run in (whole, halved):
        assert (run.module.iterations, run.trainer.global_step) == (1, 4)


def test_stages_without_training_steps_name_keys_that_they_read(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``stage=evaluate`` computes log-probs after all batches have been collected."""
    monkeypatch.setattr("rlhf.evaluate.module.EvaluateModule.logprobs", exhausted)
    folder, source = tiny_run.folder, FakeSource(tiny_run.lm)
    params = SamplingParams(max_new_tokens=8)
    module = EvaluateModule(models={"sft": source}, output=str(folder), sampling=params, tokenizer=tiny_run.tokenizer)
    test = tiny_run.write("test", STAGES["ppo"].records)
    data = PromptDataModule(test=test, max_length=96, eval_batch_size=8, tokenizer=tiny_run.tokenizer)
    expected = rf"(?s)validation or test metrics.*\n  Set data\.eval_batch_size=4\. Otherwise set {SHORTER}\."
    with pytest.raises(TrainingError, match=expected), report_out_of_memory("evaluate", module, data):
        quick_trainer(default_root_dir=folder).test(module, data, verbose=False)


def test_memory_of_evaluation(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run.build("sft", data={"val": tiny_run.write("val", STAGES["sft"].records)})

    def validation_step(self: Any, *arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(STAGES["sft"].module, "validation_step", validation_step)
    with (
        pytest.raises(TrainingError, match=r"(?s)validation or test metrics .*data\.eval_batch_size=4"),
        report_out_of_memory("sft", run.module, run.datamodule),
    ):
        run.fit()


def test_other_errors_pass() -> None:
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"), report_out_of_memory("sft", SimpleNamespace(), None):
        raise RuntimeError("shapes differ")


def test_real_allocations_that_fail_are_recognized() -> None:
    """One exabyte, which no machine has."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
