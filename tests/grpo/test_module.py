"""The GRPO stage in Lightning's training loop, for both architectures."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.configs import compose_config
from harness import EXACT, TinyRun, assert_same_weights, weights_differ
from rlhf.errors import ConfigError
from rlhf.reward_functions import RewardFunction
from rlhf.rl import KLController, ScoreShaping
from rlhf.rl.advantages import gae, grpo, reinforce_pp, rloo


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


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


@pytest.mark.parametrize("loss_reduction", ["token_mean", "sequence_mean", "sequence_sum"])
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


# What each method prescribes: KL penalty, loss reduction, and whether scores are shaped.
PUBLISHED = {
    "grpo": ("loss", "k3", "sequence_mean", False),
    "dr_grpo": ("loss", "k3", "sequence_sum", False),
    "rloo": ("reward", "k1", "sequence_sum", False),
    "reinforce_pp": ("reward", "k1", "token_mean", True),
    "reinforce_pp_baseline": ("loss", "k2", "token_mean", True),
}


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_method_is_configured_as_published(name: str, stage: str) -> None:
    cfg = compose_config(f"stage={stage}", f"advantage={name}").stage
    is_shaped = {cfg.scores.subtract_mean, cfg.scores.scale_by_std, cfg.scores.clip is not None}
    found = (cfg.kl.apply_to, cfg.kl.estimator, cfg.loss_reduction, *is_shaped)
    assert found == PUBLISHED[name]
    assert cfg.advantage._target_ == f"rlhf.rl.advantages.{name}"


def test_the_coefficients_of_grpo_and_dr_grpo_are_published_and_overrides_win() -> None:
    assert compose_config("stage=grpo").stage.kl_coef == 0.2
    assert compose_config("stage=grpo", "advantage=dr_grpo").stage.kl_coef == 0.0
    overrides = (
        "stage.kl_coef=0.2",
        "stage.kl.apply_to=reward",
        "stage.scores.clip=3",
        "stage.loss_reduction=token_mean",
    )
    changed = compose_config("stage=grpo", *overrides).stage
    assert (changed.kl_coef, changed.kl.apply_to, changed.scores.clip) == (0.2, "reward", 3)
    assert changed.loss_reduction == "token_mean"


def test_equal_scores_train_nothing_but_the_kl(tiny_run: TinyRun) -> None:
    """Where all responses to a prompt have the same score, the advantages are 0, also when the policy has moved."""

    class Equal(RewardFunction):
        def forward(self, batch: Any) -> torch.Tensor:
            return torch.ones(len(batch.input_ids))

    keys = {"reward": Equal(), "entropy_coef": 1.0, "learning_rate": 1e-2, "trainer": {"max_epochs": 2}}
    run = tiny_run.train("grpo", kl=None, scores=None, **keys)
    assert run.curve("objective/kl")[1] != 0
    assert all(batch.advantages.eq(0).all() for batch in run.batches)
    assert run.module.kl.in_loss


def test_sequence_sum_gives_a_token_the_same_weight_in_every_response(tiny_run: TinyRun) -> None:
    """Before the first update the ratio is 1, so the loss is -sum(A) / (8 responses x 8 new tokens)."""
    run = tiny_run.train("grpo", minibatch_size=8, ppo_epochs=1, loss_reduction="sequence_sum", advantage=rloo)
    batch = run.batches[0]
    assert len(set(batch.response_mask.sum(dim=1).tolist())) > 1
    expected = -float(batch.advantages[batch.response_mask].sum()) / (8 * 8)
    assert run.curve("loss/policy_avg")[0] == pytest.approx(expected, rel=1e-5)


def test_one_response_per_prompt_is_refused_where_responses_are_compared(tiny_run: TinyRun) -> None:
    """REINFORCE++ accepts a single response per prompt; GRPO and RLOO do not."""
    tiny_run.module("grpo", advantage=reinforce_pp, num_generations=1)
    for estimator in (grpo, partial(rloo)):
        with pytest.raises(ConfigError, match=r"stage\.num_generations must be at least 2 .* got 1"):
            tiny_run.module("grpo", advantage=estimator, num_generations=1)


def test_estimators_that_need_a_critic_are_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="gae requires a critic"):
        tiny_run.module("grpo", advantage=partial(gae))
