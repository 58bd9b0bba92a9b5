"""What PPO and GRPO share: update limits, KL penalty, entropy bonus, stop tokens and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import EXACT, TinyRun, assert_same_weights, weights_differ
from rlhf.errors import ConfigError
from rlhf.ppo import PPOModule
from rlhf.rl import KLController, Minibatch, ScoreShaping, UpdateLimits
from rlhf.sampling import LocalSampler, SamplingParams


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def skipped(run: Any) -> list[float]:
    """Return whether each optimizer step was skipped, 1.0 or 0.0."""
    return [update["policy/skipped"] for update in run.recorder.updates]


def test_stop_kl_ends_training_on_a_rollout(tiny_run: TinyRun) -> None:
    """Two minibatches, two passes; the limit is below any KL but 0.

    The first minibatch has KL 0 and is trained on, the other three are skipped. So the epoch equals a single step, and
    AdamW's moments do not move after it.
    """
    stopped = tiny_run.train("ppo", limits=UpdateLimits(stop_kl_per_token=1e-12))
    one_step = tiny_run.train("ppo", trainer={"max_steps": 1})
    assert len(stopped.batches) == 4
    assert_same_weights(stopped.module.policy, one_step.module.policy, **EXACT)
    assert_same_weights(stopped.module.critic, one_step.module.critic, **EXACT)
    assert skipped(stopped) == [0.0, 1.0, 1.0, 1.0]
    assert stopped.curve("grad_norm") == one_step.curve("grad_norm"), "skipped steps have no gradient to average"
    unlimited = tiny_run.train("ppo")
    assert weights_differ(unlimited.module.policy, one_step.module.policy)


def test_stop_kl_applies_to_one_rollout_only(tiny_run: TinyRun) -> None:
    """In the second epoch, which has a new rollout, the first minibatch is trained on again."""
    run = tiny_run.train("ppo", trainer={"max_epochs": 2}, limits=UpdateLimits(stop_kl_per_token=1e-12))
    assert skipped(run) == [0.0, 1.0, 1.0, 1.0] * 2


def test_skip_ratio_skips_single_minibatches(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the second minibatch claim to have been 10 times less likely when they were sampled."""
    iteration = PPOModule.iteration

    def shifted_iteration(self: PPOModule, prompts: Any) -> Any:
        for number, minibatch in enumerate(iteration(self, prompts)):
            minibatch.old_logprobs = minibatch.old_logprobs - 2.3 * (number == 1)
            yield minibatch

    monkeypatch.setattr(PPOModule, "iteration", shifted_iteration)
    run = tiny_run.train("ppo", limits=UpdateLimits(skip_ratio=5.0))
    assert skipped(run) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_critic_warmup_trains_the_critic_only(tiny_run: TinyRun, critic: str) -> None:
    """One iteration of warm-up: the policy keeps every bit, the critic changes. The second iteration trains both."""
    run = tiny_run.train("ppo", critic=critic, critic_warmup=1, weight_decay=0.1, value_coef=1.0)
    assert_same_weights(run.module.policy.lm, tiny_run.lm, **EXACT)
    if critic == "separate":
        assert weights_differ(run.module.critic, tiny_run.reward_model)
    else:
        assert run.module.critic.layers[-1].bias.abs() > 0  # The bias starts at 0.
    later = tiny_run.train("ppo", critic=critic, critic_warmup=1, trainer={"max_epochs": 2})
    assert weights_differ(later.module.policy.lm, tiny_run.lm)


def test_the_coefficient_stays_constant_during_critic_warmup(tiny_run: TinyRun) -> None:
    """The KL of the untrained policy is 0, clip(0 / 6 - 1, -0.2, 0.2) = -0.2, and 8 of 100 responses are one iteration.

    Two iterations of warm-up use the initial 0.1, and so does the third, in the rewards. It ends with 0.1 x (1 - 0.2 x
    0.08) = 0.0984.
    """
    kl = KLController(target_per_sequence=6.0, horizon=100)
    run = tiny_run.train("ppo", kl=kl, kl_coef=0.1, critic_warmup=2, trainer={"max_epochs": 3})
    assert run.curve("kl_coef") == [0.1, 0.1, 0.1]
    assert run.module.kl.coef == pytest.approx(0.0984, rel=1e-12)


@pytest.mark.parametrize("init", ["sft", "random"])
def test_critic_init(tiny_run: TinyRun, init: str) -> None:
    """``sft`` starts from the trunk of the policy with a new head, ``random`` from neither policy nor reward model."""
    torch.manual_seed(0)
    module = tiny_run.module("ppo", critic_init=init)
    module.configure_model()
    reward_model = tiny_run.reward_model
    assert weights_differ(module.critic.trunk, tiny_run.lm.base_model) == (init == "random")
    assert init == "sft" or weights_differ(module.critic.trunk, reward_model.trunk)
    assert weights_differ(module.critic.head, reward_model.head)


@pytest.mark.parametrize(("apply_to", "estimator"), [("reward", "k1"), ("loss", "k3"), ("loss", "full")])
def test_the_kl_penalty_is_in_the_rewards_or_in_the_loss(tiny_run: TinyRun, apply_to: str, estimator: str) -> None:
    """From the second rollout on the KL is not 0. In the loss, the rewards consist of the scores only."""
    kl = KLController(apply_to=apply_to, estimator=estimator)
    run = tiny_run.train("ppo", trainer={"max_epochs": 2}, kl=kl, kl_coef=1.0)
    second = run.recorder.rollouts[1]
    assert second["objective/kl"] != 0
    assert (second["objective/non_score_reward"] == 0) == (apply_to == "loss")
    assert ("loss/kl_avg" in run.recorder.updates[-1]) == (apply_to == "loss")


def test_the_entropy_bonus_raises_entropy(tiny_run: TinyRun) -> None:
    keys = {"value_coef": 0.0, "ppo_epochs": 1, "minibatch_size": 8}
    without = tiny_run.train("ppo", entropy_coef=0.0, **keys)
    with_bonus = tiny_run.train("ppo", entropy_coef=100.0, **keys)
    minibatch: Minibatch = without.batches[0]

    def entropy(module: PPOModule) -> float:
        with torch.no_grad():
            output, _ = module.models.update_outputs(minibatch.inputs)
        return float(output.entropy[minibatch.response_mask].mean())

    assert entropy(with_bonus.module) > entropy(without.module)


def test_stop_tokens_end_responses(tiny_run: TinyRun) -> None:
    """Responses end at "e" or "t", each a single token; EOS is then an ordinary token."""
    sampling = SamplingParams(max_new_tokens=16, temperature=0.7, stop_tokens=["e", "t"])
    minibatch = tiny_run.train("ppo", sampling=sampling).batches[0]
    vocabulary = tiny_run.tokenizer.get_vocab()
    stop_ids = {vocabulary["e"], vocabulary["t"]}
    responses = [row[mask].tolist() for row, mask in zip(minibatch.input_ids, minibatch.response_mask, strict=True)]
    assert all(len(response) == 16 or response[-1] in stop_ids for response in responses)
    assert not any(stop_ids & set(response[:-1]) for response in responses)


def test_unknown_stop_tokens_are_refused_before_training(tiny_run: TinyRun) -> None:
    sampling = SamplingParams(max_new_tokens=8, stop_tokens=["no token"])
    with pytest.raises(ConfigError, match="'no token'"):
        tiny_run.module("ppo", sampling=sampling).configure_model()


def test_a_resumed_run_restores_coefficient_moments_and_warmup(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Three epochs in one run equal two epochs, a checkpoint, and the third epoch in a new run."""

    def keys() -> dict[str, Any]:
        kl = KLController(target_per_sequence=0.01, horizon=10)
        return {"kl": kl, "scores": ScoreShaping(), "critic_warmup": 1}

    uninterrupted = tiny_run.train("ppo", trainer={"max_epochs": 3}, **keys())
    first = tiny_run.train("ppo", trainer={"max_epochs": 2}, **keys())
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = tiny_run.train("ppo", trainer={"max_epochs": 3}, resume=tmp_path / "last.ckpt", **keys())
    assert float(uninterrupted.module.kl.coef) != 0.1
    assert_same_weights(resumed.module, uninterrupted.module, **EXACT)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dual_clip": 1.0}, r"stage\.limits\.dual_clip must be a number above 1 or null, got 1"),
        ({"skip_ratio": 0.5}, r"stage\.limits\.skip_ratio must be a number above 1 or null, got 0\.5"),
        ({"stop_kl_per_token": 0.0}, r"stage\.limits\.stop_kl_per_token must be a number above 0 or null, got 0"),
    ],
)
def test_invalid_limits_are_refused(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpdateLimits(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"loss_reduction": "sum"},
            r"stage\.loss_reduction must be token_mean, sequence_mean, or sequence_sum, got 'sum'",
        ),
        ({"clip_range": 0.0}, r"stage\.clip_range must be a number above 0, got 0"),
        ({"clip_range_high": 0.0}, r"stage\.clip_range_high must be a number above 0 or null, got 0"),
        ({"ppo_epochs": 0}, r"stage\.ppo_epochs must be an integer of at least 1, got 0"),
        ({"minibatch_size": 0}, r"stage\.minibatch_size must be an integer of at least 1, got 0"),
        ({"num_generations": 0}, r"stage\.num_generations must be an integer of at least 1, got 0"),
        ({"kl_coef": -0.1}, r"stage\.kl_coef must be a number of at least 0, got -0\.1"),
        ({"sampling": SamplingParams(temperature=0.0)}, r"stage\.sampling\.temperature must be above 0"),
    ],
)
def test_invalid_settings_are_refused(tiny_run: TinyRun, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run.module("ppo", **keys)


class RecordingSampler(LocalSampler):
    """Records the calls of the sampler protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def sync(self, *args: Any) -> None:
        self.calls.append("sync")
        super().sync(*args)

    def sample(self, *args: Any) -> Any:
        self.calls.append("sample")
        return super().sample(*args)


def test_the_sampler_is_synchronized_before_each_rollout(tiny_run: TinyRun) -> None:
    sampler = RecordingSampler()
    with_sampler = tiny_run.train("ppo", trainer={"max_epochs": 2}, sampler=sampler)
    assert sampler.calls == ["sync", "sample"] * 2
    default = tiny_run.train("ppo", trainer={"max_epochs": 2})
    assert_same_weights(with_sampler.module, default.module, **EXACT)
