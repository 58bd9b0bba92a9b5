"""The GRPO stage in Lightning's training loop, for both architectures."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import EXACT, TinyRun, assert_same_weights, weights_differ
from rlhf.errors import ConfigError
from rlhf.rl import KLController, ScoreShaping
from rlhf.rl.advantages import gae, grpo, reinforce_pp, rloo


@pytest.fixture(autouse=True)
def _groups_of_two(tiny_run: TinyRun) -> None:
    tiny_run.stage_keys["grpo"]["num_generations"] = 2


def test_responses_to_a_prompt_form_a_group(tiny_run: TinyRun) -> None:
    """Four prompts with two responses each: the two have opposite advantages, equal on all of their tokens."""
    minibatch = tiny_run.train("grpo", minibatch_size=8, ppo_epochs=1, kl_coef=0.0).batches[0]
    groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for input_ids, attention_mask, response_mask, advantages in zip(
        minibatch.input_ids,
        minibatch.attention_mask,
        minibatch.response_mask,
        minibatch.advantages,
        strict=True,
    ):
        prompt = tuple(input_ids[attention_mask & ~response_mask].tolist())
        groups.setdefault(prompt, []).append(advantages[response_mask])
        assert advantages[response_mask].unique().numel() == 1
    assert len(groups) == 4
    for first, second in groups.values():
        torch.testing.assert_close(first[0], -second[0])
    assert minibatch.advantages.abs().max() > 0


def test_first_ratio_and_first_kl_are_exact(tiny_run: TinyRun) -> None:
    recorder = tiny_run.train("grpo", minibatch_size=8, ppo_epochs=1).recorder
    assert recorder.rollouts[0]["objective/kl"] == 0.0
    assert recorder.updates[0]["policy/ratio"] == 1.0


@pytest.mark.parametrize("estimator", [grpo, rloo, reinforce_pp])
def test_every_estimator_trains_without_a_critic(tiny_run: TinyRun, estimator: Any) -> None:
    module = tiny_run.train("grpo", advantage=estimator).module
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "scores", "kl", "_extra_state"}
    assert weights_differ(module.policy.lm, tiny_run.lm)


@pytest.mark.parametrize("loss_reduction", ["token_mean", "sequence_mean"])
def test_accumulation_equals_a_larger_minibatch(tiny_run: TinyRun, loss_reduction: str) -> None:
    """Four minibatches of 2 responses give the step of one of 8, with the KL penalty in the loss."""

    def train(minibatch_size: int, accumulate: int) -> Any:
        return tiny_run.train(
            "grpo",
            minibatch_size=minibatch_size,
            trainer={"max_steps": 1, "accumulate_grad_batches": accumulate},
            kl=KLController(apply_to="loss", estimator="k3"),
            loss_reduction=loss_reduction,
            ppo_epochs=1,
            eps=1.0,
            learning_rate=10.0,
            entropy_coef=0.01,
        ).module.policy.lm

    large, small = train(8, 1), train(2, 4)
    assert weights_differ(large, tiny_run.lm)
    assert_same_weights(small, large)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Two epochs in one run equal one epoch, a checkpoint, and the second epoch in a new run."""

    def keys() -> dict[str, Any]:
        return {"kl": KLController(target_per_sequence=0.01, horizon=10), "scores": ScoreShaping()}

    uninterrupted = tiny_run.train("grpo", trainer={"max_epochs": 2}, **keys())
    first = tiny_run.train("grpo", **keys())
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = tiny_run.train("grpo", trainer={"max_epochs": 2}, resume=tmp_path / "last.ckpt", **keys())
    assert float(uninterrupted.module.kl.coef) != 0.1
    assert_same_weights(resumed.module, uninterrupted.module, **EXACT)


def test_one_response_per_prompt_is_refused_where_responses_are_compared(tiny_run: TinyRun) -> None:
    """REINFORCE++ accepts a single response per prompt; GRPO and RLOO do not."""
    tiny_run.module("grpo", advantage=reinforce_pp, num_generations=1)
    for estimator in (grpo, partial(rloo)):
        with pytest.raises(ConfigError, match=r"stage\.num_generations must be at least 2 .* got 1"):
            tiny_run.module("grpo", advantage=estimator, num_generations=1)


def test_estimators_that_need_a_critic_are_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="gae requires a critic"):
        tiny_run.module("grpo", advantage=partial(gae))
