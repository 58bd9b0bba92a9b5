"""The critic-free stage in Lightning's own loop, for both architectures."""

from functools import partial
from pathlib import Path

import pytest
import torch

from online import Setting, assert_same, changed
from rlhf.errors import UserError
from rlhf.grpo import GRPOModule
from rlhf.rl import KLController, ScoreShaping
from rlhf.rl.advantages import grpo, reinforce_pp, rloo


@pytest.fixture
def groups(setting: Setting) -> Setting:
    setting.stage = partial(GRPOModule, advantage=grpo)
    return setting


def test_answers_to_a_prompt_stand_together_and_are_compared(groups: Setting) -> None:
    """4 prompts a rollout, 2 answers each, one minibatch: the two have opposite advantages, the same on every token."""
    _, record = groups.train(num_generations=2, minibatch_size=8, ppo_epochs=1, kl_coef=0.0)
    part = record.parts[0]
    rows = {}
    for tokens, mask, answer, advantage in zip(
        part.input_ids, part.attention_mask, part.response_mask, part.advantages, strict=True
    ):
        prompt = tuple(tokens[mask & ~answer].tolist())
        rows.setdefault(prompt, []).append(advantage[answer])
        assert advantage[answer].unique().numel() == 1
    assert len(rows) == 4
    for one, other in rows.values():
        torch.testing.assert_close(one[0], -other[0])
    assert part.advantages.abs().max() > 0


def test_first_ratio_and_first_kl_are_exact(groups: Setting) -> None:
    _, record = groups.train(num_generations=2, minibatch_size=8, ppo_epochs=1)
    assert record.numbers[0]["objective/kl"] == 0.0
    assert record.updates[0]["policy/ratio"] == 1.0


@pytest.mark.parametrize("estimator", [grpo, rloo, reinforce_pp])
def test_every_estimator_learns_and_has_no_critic(setting: Setting, estimator: object) -> None:
    setting.stage = partial(GRPOModule, advantage=estimator)
    module, _ = setting.train(num_generations=2)
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "scores", "kl"}
    assert changed(module.policy.lm, setting.policy.model)


def test_accumulation_is_the_bigger_minibatch(groups: Setting) -> None:
    """4 minibatches of 2 answers make the step of 1 of 8, by token and by answer, with the KL in the loss."""
    keys = {"ppo_epochs": 1, "eps": 1.0, "learning_rate": 10.0, "num_generations": 2, "entropy_coef": 0.01}
    for average in ("token", "sequence"):
        own = {"average": average, **keys}
        big, _ = groups.train(
            minibatch_size=8,
            trainer={"max_steps": 1},
            scores=ScoreShaping(),
            kl=KLController(apply_to="loss", estimator="k3"),
            **own,
        )
        small, _ = groups.train(
            minibatch_size=2,
            trainer={"max_steps": 1, "accumulate_grad_batches": 4},
            scores=ScoreShaping(),
            kl=KLController(apply_to="loss", estimator="k3"),
            **own,
        )
        assert changed(big.policy.lm, groups.policy.model)
        assert_same(small.policy.lm, big.policy.lm)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(groups: Setting, tmp_path: Path) -> None:
    """One epoch, a checkpoint and another one, against two in one go: every weight, moment and the adapted price."""

    def keys() -> dict:
        return {
            "num_generations": 2,
            "kl": KLController(target_per_sequence=0.01, horizon=10),
            "scores": ScoreShaping(),
        }

    whole, _ = groups.train(trainer={"max_epochs": 2}, **keys())
    groups.train(trainer={"max_epochs": 1}, **keys())
    groups.trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = groups.train(trainer={"max_epochs": 2}, resume=tmp_path / "last.ckpt", **keys())
    assert float(whole.kl.coef) != 0.05
    assert_same(resumed, whole, rtol=0.0, atol=0.0)


def test_one_answer_is_refused_where_answers_are_compared(setting: Setting) -> None:
    """REINFORCE++ is content with one answer; GRPO and RLOO are not."""
    setting.stage = partial(GRPOModule, advantage=reinforce_pp)
    setting.module(num_generations=1)
    for estimator in (grpo, partial(rloo)):
        setting.stage = partial(GRPOModule, advantage=estimator)
        with pytest.raises(UserError, match=r"stage\.num_generations=1"):
            setting.module(num_generations=1)
