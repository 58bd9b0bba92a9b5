"""What the bounds on an update and the price of KL do to a run, for both architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch

from online import Setting, assert_same, changed
from rlhf.errors import UserError
from rlhf.ppo import PPOModule
from rlhf.rl import KLController, Minibatch, ScoreShaping, UpdateLimits
from rlhf.sampling import SamplingParams


def test_a_stop_on_kl_ends_the_learning_from_a_rollout(setting: Setting) -> None:
    """Two minibatches, two passes, any KL is too much: the first minibatch (KL 0) is learned from, the other three not.

    So one epoch is one step, and no moment of AdamW moves afterwards.
    """
    stopped, record = setting.train(limits=UpdateLimits(stop_kl_per_token=1e-12))
    once, _ = setting.train(trainer={"max_steps": 1})
    assert len(record.parts) == 4
    assert_same(stopped.policy, once.policy, rtol=0.0, atol=0.0)
    assert_same(stopped.critic, once.critic, rtol=0.0, atol=0.0)
    assert [updates["policy/skipped"] for updates in record.updates] == [0.0, 1.0, 1.0, 1.0]
    free, _ = setting.train()
    assert changed(free.policy, once.policy)


def test_a_new_rollout_is_learned_from_again(setting: Setting) -> None:
    """The stop holds for its rollout only: in the second epoch the first minibatch counts again."""
    _, record = setting.train(trainer={"max_epochs": 2}, limits=UpdateLimits(stop_kl_per_token=1e-12))
    assert [updates["policy/skipped"] for updates in record.updates] == [0.0, 1.0, 1.0, 1.0] * 2


def test_a_minibatch_whose_ratio_blew_up_is_skipped_alone(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second minibatch claims to have been 10 times less likely when sampled: skipped, the others learned from."""
    iteration = PPOModule.iteration

    def corrupt_padding(self: PPOModule, prompts: Any) -> Any:
        for number, part in enumerate(iteration(self, prompts)):
            part.old_logprobs = part.old_logprobs - 2.3 * (number == 1)
            yield part

    monkeypatch.setattr(PPOModule, "iteration", corrupt_padding)
    _, record = setting.train(limits=UpdateLimits(skip_ratio=5.0))
    assert [updates["policy/skipped"] for updates in record.updates] == [0.0, 1.0, 0.0, 0.0]


def test_while_the_critic_warms_up_the_policy_stays(setting: Setting) -> None:
    """One iteration of warm-up: the policy keeps every bit, a critic of its own and a shared head learn."""
    for critic in ("separate", "shared"):
        module, _ = setting.train(critic=critic, critic_warmup=1, weight_decay=0.1, value_coef=1.0)
        assert_same(module.policy.lm, setting.policy.model, rtol=0.0, atol=0.0)
        if critic == "separate":
            assert changed(module.critic, setting.judge.model)
        else:
            assert module.critic.layers[-1].bias.abs() > 0  # it starts at 0
        later, _ = setting.train(critic=critic, critic_warmup=1, trainer={"max_epochs": 2})
        assert changed(later.policy.lm, setting.policy.model)


@pytest.mark.parametrize("start", ["sft", "random"])
def test_the_critic_inits_from_what_was_asked_for(setting: Setting, start: str) -> None:
    """``sft``: the policy's body under a new head; ``fresh``: neither the policy's body nor the judge's."""
    torch.manual_seed(0)
    module = setting.module(critic_init=start)
    module.configure_model()
    body, policy, judge = module.critic.trunk, setting.policy.model.base_model, setting.judge.model.trunk
    assert changed(body, policy) == (start == "random")
    assert start == "sft" or changed(body, judge)
    assert changed(module.critic.head, setting.judge.model.head)


def test_a_price_in_the_loss_leaves_the_rewards_alone(setting: Setting) -> None:
    """In the reward, kl_coef 1 charges the second rollout; in the loss its rewards are the bare scores, summed."""
    for place, estimator in (("reward", "k1"), ("loss", "k3"), ("loss", "full")):
        kl = KLController(apply_to=place, advantage=estimator)
        _, record = setting.train(trainer={"max_epochs": 2}, kl=kl, kl_coef=1.0, scores=ScoreShaping())
        charged = record.numbers[1]["objective/non_score_reward"]
        assert record.numbers[1]["objective/kl"] != 0
        assert (charged == 0) == (place == "loss")
        assert ("loss/kl_avg" in record.updates[-1]) == (place == "loss")


def test_the_entropy_bonus_raises_entropy(setting: Setting) -> None:
    """With nothing else to gain (all advantages 0), the bonus alone moves the policy, towards more entropy."""
    without, record = setting.train(value_coef=0.0, ppo_epochs=1, minibatch_size=8, entropy_coef=0.0)
    with_it, _ = setting.train(value_coef=0.0, ppo_epochs=1, minibatch_size=8, entropy_coef=100.0)
    part: Minibatch = record.parts[0]

    def entropy(module: PPOModule) -> float:
        with torch.no_grad():
            return float(module.policy_output(part).entropy[part.response_mask].mean())

    assert entropy(with_it) > entropy(without)


def test_stop_tokens_end_answers_and_are_no_missing_eos(setting: Setting) -> None:
    """Answers end at "e", whose text is a token of its own; such an answer is finished, and EOS is then a token like
    others. A text that is no single token is refused.
    """
    sampling = SamplingParams(max_new_tokens=16, temperature=0.7, stop_tokens=["e", "t"])
    _, record = setting.train(sampling=sampling)
    vocabulary = setting.tokenizer.get_vocab()
    part = record.parts[0]
    answers = [tokens[answer].tolist() for tokens, answer in zip(part.input_ids, part.response_mask, strict=True)]
    stops = {vocabulary["e"], vocabulary["t"]}
    assert all(len(answer) == 16 or answer[-1] in stops for answer in answers)
    assert not any(stops & set(answer[:-1]) for answer in answers)
    assert sampling.stop_ids(setting.tokenizer) == [vocabulary["e"], vocabulary["t"]]
    with pytest.raises(UserError, match="'no token' is no single token"):
        setting.train(sampling=SamplingParams(max_new_tokens=8, stop_tokens=["no token"]))
    with pytest.raises(UserError, match="is no list of tokens"):
        SamplingParams(stop_tokens="e")


def test_a_resumed_run_goes_on_with_price_and_warm_up(setting: Setting, tmp_path: Path) -> None:
    """Two epochs in one go, against two halves: the price, the moments of the scores, the warm-up's count."""

    def keys() -> dict[str, Any]:
        kl = KLController(target_per_sequence=0.01, horizon=10)
        return {"kl": kl, "scores": ScoreShaping(), "critic_warmup": 1}

    whole, _ = setting.train(trainer={"max_epochs": 2}, **keys())
    setting.train(trainer={"max_epochs": 1}, **keys())
    setting.trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = setting.train(trainer={"max_epochs": 2}, resume=tmp_path / "last.ckpt", **keys())
    assert float(whole.kl.coef) != 0.05
    assert_same(resumed, whole, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clip_range_high": 0.0}, r"stage\.limits\.clip_range_high=0"),
        ({"dual_clip": 1.0}, r"stage\.limits\.dual_clip=1"),
        ({"skip_ratio": 0.5}, r"stage\.limits\.skip_ratio=0.5"),
        ({"stop_kl_per_token": 0.0}, r"stage\.limits\.stop_kl_per_token=0"),
    ],
)
def test_limits_that_leave_nothing_are_refused(keys: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UpdateLimits(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"average": "answer"}, r"stage\.average=answer"),
        ({"clip_range": 0.0}, r"stage\.clip_range=0"),
        ({"ppo_epochs": 0}, r"stage\.ppo_epochs=0"),
        ({"minibatch_size": 0}, r"stage\.minibatch_size=0"),
        ({"kl_coef": -0.1}, r"stage\.kl_coef=-0.1"),
        ({"critic_init": "policy"}, r"stage\.critic_init=policy"),
        ({"critic": "shared", "critic_init": "sft"}, r"stage\.critic_init .* stage\.critic=shared"),
        ({"critic_init": "reward_model", "reward_model": None}, "the reward is no model"),
        ({"value_clip_range": 0.0}, r"stage\.value_clip_range=0"),
    ],
)
def test_what_cannot_work_is_refused(setting: Setting, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        setting.module(**keys)
