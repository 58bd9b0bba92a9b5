"""The PPO stage in Lightning's training loop, for both architectures."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from contract.configs import compose_config
from harness import EXACT, TinyRun, assert_same_weights, isolated_logprobs, weights_differ
from rlhf.errors import ConfigError
from rlhf.models import ScalarHead
from rlhf.rl import Minibatch, ModelInputs
from rlhf.rl.advantages import dr_grpo, gae, reinforce_pp, rloo
from rlhf.rl.models import OnPolicyModels


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def test_first_ratio_and_first_kl_are_exact(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first update, log-probs of update and rollout are equal to the last bit, and the KL is 0.

    The second minibatch follows an update, so its log-probs differ.
    """
    found: list[Tensor] = []
    update_outputs = OnPolicyModels.update_outputs

    def recording(self: OnPolicyModels, inputs: ModelInputs) -> Any:
        output, values = update_outputs(self, inputs)
        found.append(output.logprobs.detach())
        return output, values

    monkeypatch.setattr(OnPolicyModels, "update_outputs", recording)
    run = tiny_run.train("ppo")
    assert torch.equal(found[0], run.batches[0].old_logprobs)
    assert not torch.equal(found[1], run.batches[1].old_logprobs)
    assert run.recorder.rollouts[0]["objective/kl"] == 0.0
    lengths = run.batches[0].response_mask.sum(dim=1)
    assert lengths.min() < lengths.max(), "responses of equal length would hide the effects of padding"


def test_old_logprobs_and_values_match_the_plain_models(tiny_run: TinyRun) -> None:
    """Compared with each sequence of the first minibatch on its own, without padding, at temperature 0.7."""
    minibatch = tiny_run.train("ppo").batches[0]
    lm, reward_model = tiny_run.lm, tiny_run.reward_model.eval()
    for row in range(len(minibatch.input_ids)):
        length, response_mask = int(minibatch.attention_mask[row].sum()), minibatch.response_mask[row]
        ids = minibatch.input_ids[row, :length]
        logprobs = isolated_logprobs(lm, ids, temperature=0.7).gather(1, ids[1:, None])[:, 0]
        with torch.no_grad():
            values = reward_model.head(reward_model.trunk(ids[None], use_cache=False).last_hidden_state[0, :-1])
        selected = response_mask[1:length]
        torch.testing.assert_close(minibatch.old_logprobs[row][response_mask], logprobs[selected])
        torch.testing.assert_close(minibatch.old_values[row][response_mask], values[selected])


def test_only_policy_and_critic_are_trained(tiny_run: TinyRun) -> None:
    """Reference and reward model keep every bit, stay in eval mode, and are not stored in checkpoints."""
    module = tiny_run.train("ppo").module
    assert_same_weights(module.reference.model.lm, tiny_run.lm, **EXACT)
    assert_same_weights(module.reward.model.model, tiny_run.reward_model, **EXACT)
    assert weights_differ(module.policy.lm, tiny_run.lm)
    assert weights_differ(module.critic, tiny_run.reward_model)
    frozen = [*module.reference.model.modules(), *module.reward.model.model.modules()]
    assert not any(submodule.training for submodule in frozen)
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "critic", "scores", "kl", "_extra_state"}


def test_a_shared_critic_is_a_head_on_the_policy(tiny_run: TinyRun) -> None:
    """The head and the policy are trained; there is no second trunk."""
    module = tiny_run.train("ppo", critic="shared", value_coef=1.0).module
    assert isinstance(module.critic, ScalarHead)
    assert torch.equal(ScalarHead(32).layers[-1].bias, torch.zeros(1))  # a new head
    assert not torch.equal(module.critic.layers[-1].bias, torch.zeros(1))
    assert weights_differ(module.policy.lm, tiny_run.lm)


class Finder(lightning.Callback):
    """Sets another learning rate as Lightning's ``LearningRateFinder`` does."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        pl_module.learning_rate = 0.5
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.5


@pytest.mark.parametrize(("rate", "expected"), [(None, {0.5}), (0.25, {0.5, 0.25})])
def test_a_changed_learning_rate_is_that_of_the_critic_unless_it_is_set(
    tiny_run: TinyRun, rate: float | None, expected: set[float]
) -> None:
    run = tiny_run.train("ppo", callbacks=[Finder()], critic_learning_rate=rate, trainer={"max_steps": 1})
    assert {group["lr"] for group in run.trainer.optimizers[0].param_groups} == expected


def test_gradient_clip_val_limits_the_gradient_of_every_step(tiny_run: TinyRun) -> None:
    unclipped = tiny_run.train("ppo", trainer={"max_steps": 2}).recorder.grad_norms
    clipped = tiny_run.train("ppo", trainer={"max_steps": 2, "gradient_clip_val": 0.01}).recorder.grad_norms
    assert len(unclipped) == len(clipped) == 2
    assert min(unclipped) > 0.01
    assert clipped == pytest.approx([0.01, 0.01], rel=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm it divides by


@pytest.mark.parametrize("accumulate", [1, 2])
def test_max_steps_counts_optimizer_steps(tiny_run: TinyRun, accumulate: int) -> None:
    """Three steps need three minibatches, or six if each step accumulates over two."""
    flags = {"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": accumulate}
    run = tiny_run.train("ppo", trainer=flags)
    assert (run.trainer.global_step, len(run.recorder.grad_norms), len(run.batches)) == (3, 3, 3 * accumulate)


def test_accumulation_equals_a_larger_minibatch(tiny_run: TinyRun) -> None:
    """Four minibatches of 2 give the step of one minibatch of 8, although the responses differ in length.

    AdamW's eps is 1: the first step is then nearly proportional to the gradient, while the usual eps would amplify the
    rounding noise of tiny gradients. The tolerances are the defaults.
    """
    keys = {"ppo_epochs": 1, "eps": 1.0, "learning_rate": 10.0}
    large = tiny_run.train("ppo", minibatch_size=8, trainer={"max_steps": 1}, **keys)
    small = tiny_run.train("ppo", minibatch_size=2, trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **keys)
    counts = [int(minibatch.response_mask.sum()) for minibatch in small.batches]
    assert len(set(counts)) > 1
    assert sum(counts) == int(large.batches[0].response_mask.sum())
    assert weights_differ(large.module.policy.lm, tiny_run.lm)
    assert_same_weights(small.module.policy.lm, large.module.policy.lm)
    assert_same_weights(small.module.critic, large.module.critic)


def test_accumulation_over_two_iterations_is_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.accumulate_grad_batches=3 must divide .* iteration, 4"):
        tiny_run.train("ppo", trainer={"accumulate_grad_batches": 3})


def test_padding_of_a_minibatch_is_ignored(tiny_run: TinyRun) -> None:
    """Random tokens and NaN on padding and prompts change neither the loss nor any gradient."""
    run = tiny_run.train("ppo")
    module = run.module
    minibatch = next(minibatch for minibatch in run.batches if not minibatch.attention_mask.all())
    nan = torch.tensor(float("nan"))
    tensors = {
        name: torch.where(minibatch.response_mask, getattr(minibatch, name), nan)
        for name in ("old_logprobs", "old_values", "advantages", "returns")
    }
    noise = torch.randint(3, 300, minibatch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    input_ids = torch.where(minibatch.attention_mask, minibatch.input_ids, noise)
    assert not torch.equal(input_ids, minibatch.input_ids)

    def loss_and_gradients(batch: Minibatch) -> tuple[Tensor, ...]:
        loss, _ = module.training_loss(batch)
        parameters = [p for trained, _ in module.trainable_modules() for p in trained.parameters()]
        return loss, *torch.autograd.grad(loss, parameters, allow_unused=True)

    expected = loss_and_gradients(minibatch)
    found = loss_and_gradients(replace(minibatch, input_ids=input_ids, **tensors))
    assert expected[0].isfinite()
    used = [gradient for gradient in expected[1:] if gradient is not None]
    assert max(float(gradient.abs().max()) for gradient in used) > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("keys", [{}, {"advantage": rloo, "num_generations": 4}], ids=["gae", "rloo"])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_run: TinyRun, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Two epochs in one run equal one epoch, a checkpoint, and the second epoch in a new run.

    The random state is stored in the checkpoint, so the second epoch samples the same responses.
    """
    uninterrupted = tiny_run.train("ppo", trainer={"max_epochs": 2}, **keys)
    first = tiny_run.train("ppo", **keys)
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = tiny_run.train("ppo", trainer={"max_epochs": 2}, resume=tmp_path / "last.ckpt", **keys)
    assert resumed.trainer.global_step == uninterrupted.trainer.global_step == 2 * len(resumed.recorder.grad_norms)
    assert_same_weights(resumed.module, uninterrupted.module, **EXACT)


# Advantage estimators


def test_gae_is_the_default_advantage_estimator(tiny_run: TinyRun) -> None:
    keys = {"advantage": partial(gae), "gamma": 0.9, "gae_lambda": 0.5}
    default = tiny_run.train("ppo", gamma=0.9, gae_lambda=0.5)
    assert_same_weights(tiny_run.train("ppo", **keys).module, default.module, **EXACT)
    assert weights_differ(tiny_run.train("ppo").module, default.module)


def test_an_estimator_without_values_builds_no_critic(tiny_run: TinyRun) -> None:
    """RLOO in PPO: the policy is trained, and neither state dict nor metrics contain a critic."""
    run = tiny_run.train("ppo", advantage=rloo, num_generations=4)
    assert weights_differ(run.module.policy.lm, tiny_run.lm)
    assert {name.split(".")[0] for name in run.module.state_dict()} == {"policy", "scores", "kl", "_extra_state"}
    assert run.batches[0].old_values is None
    assert not {"loss/value_avg", "critic/explained_variance"} & {name for call in run.logger.calls for name in call}


def best_of_group(rewards: Tensor, response_mask: Tensor, group_size: int, bonus: float = 1.0) -> Tensor:
    """A custom estimator: ``bonus`` for the best response to each prompt, 0 for the others."""
    totals = torch.where(response_mask, rewards, 0.0).sum(dim=1).reshape(-1, group_size)
    best = totals == totals.max(dim=1, keepdim=True).values
    return torch.where(response_mask, bonus * best.float().reshape(-1, 1), 0.0)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_custom_estimators(tiny_run: TinyRun, stage: str) -> None:
    """An estimator receives what it declares, by name; its other keywords are settings."""
    run = tiny_run.train(stage, advantage=partial(best_of_group, bonus=3.0), num_generations=4)
    assert {value for batch in run.batches for value in batch.advantages.unique().tolist()} == {0.0, 3.0}


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_custom_estimators_are_selected_by_import_path(
    tiny_run: TinyRun, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``stage.advantage._target_=<module>.<function>`` with a setting of the function, as on the command line."""
    source = "import torch\n\ndef constant(response_mask, value):\n    return torch.where(response_mask, value, 0.0)\n"
    (tmp_path / "my_advantages.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ("stage.advantage._target_=my_advantages.constant", "+stage.advantage.value=2.0")
    cfg = compose_config(f"stage={stage}", "advantage=rloo", *overrides)
    run = tiny_run.train(stage, advantage=instantiate(cfg.stage.advantage))
    assert {value for batch in run.batches for value in batch.advantages.unique().tolist()} <= {0.0, 2.0}


@pytest.mark.parametrize(("whiten", "is_whitened"), [(None, False), (True, True)])
def test_advantages_of_groups_are_whitened_on_request_only(
    tiny_run: TinyRun, whiten: bool | None, is_whitened: bool
) -> None:
    run = tiny_run.train("ppo", advantage=dr_grpo, num_generations=4, whiten_advantages=whiten)
    advantages = torch.cat([batch.advantages[batch.response_mask] for batch in run.batches])
    assert (abs(float(advantages.mean())) < 1e-4) == is_whitened


def test_an_estimator_with_values_must_return_returns(tiny_run: TinyRun) -> None:
    def no_returns(rewards: Tensor, values: Tensor) -> Tensor:
        return rewards - values

    with pytest.raises(ConfigError, match="no_returns declares the argument 'values'"):
        tiny_run.train("ppo", advantage=no_returns)


def per_response(scores: Tensor) -> Tensor:
    """An estimator that returns [batch] instead of [batch, time]."""
    return scores


def short_returns(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """An estimator whose returns lack the last token."""
    return rewards - values, rewards[:, :-1]


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (per_response, r"per_response must return a tensor of advantages of shape \[8, \d+\], got one of shape \[8\]"),
        (short_returns, r"short_returns must return a tensor of returns of shape \[8, \d+\], got one of shape \[8, \d"),
    ],
)
def test_estimates_of_another_shape_are_refused(tiny_run: TinyRun, estimator: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^The advantage estimator {message}"):
        tiny_run.train("ppo", advantage=estimator)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"value_coef": 0.5}, r"stage\.value_coef=0\.5 has no effect: the advantage estimator rloo needs no critic"),
        ({"critic": "shared"}, r"stage\.critic=shared has no effect"),
        ({"critic_warmup": 2}, r"stage\.critic_warmup=2 has no effect"),
        ({"obs_dim": 32}, r"stage\.obs_dim=32 has no effect"),
        ({"gamma": 0.5}, r"stage\.gamma=0\.5 has no effect"),
        ({"gae_lambda": 0.5}, r"stage\.gae_lambda=0\.5 has no effect"),
        ({"num_generations": 1}, r"stage\.num_generations must be at least 2 .* rloo"),
    ],
)
def test_settings_without_effect_are_refused(tiny_run: TinyRun, keys: dict[str, Any], message: str) -> None:
    """RLOO uses neither a critic nor discounting, and compares at least two responses."""
    with pytest.raises(ConfigError, match=message):
        tiny_run.module("ppo", **{"advantage": rloo, "num_generations": 4, **keys})


def test_stage_gamma_is_used_unless_the_estimator_sets_its_own(tiny_run: TinyRun) -> None:
    """``stage.gamma`` reaches estimators that declare gamma; with ``stage.advantage.gamma`` it has no effect."""
    tiny_run.module("ppo", advantage=reinforce_pp, gamma=0.5)
    with pytest.raises(ConfigError, match=r"stage\.gamma=0\.5 has no effect"):
        tiny_run.module("ppo", advantage=partial(reinforce_pp, gamma=1.0), gamma=0.5)


# Settings


@pytest.mark.parametrize(("key", "found"), [("obs_dim", 32), ("action_dim", 300)])
def test_dimensions_are_checked_against_the_model(tiny_run: TinyRun, key: str, found: int) -> None:
    """The tiny model has width 32 and 300 tokens."""
    tiny_run.module("ppo", **{key: found}).configure_model()
    with pytest.raises(ConfigError, match=rf"stage\.{key} must be {found}, as in the model, got 77"):
        tiny_run.module("ppo", **{key: 77}).configure_model()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"critic": "both"}, r"stage\.critic must be separate or shared, got 'both'"),
        ({"critic_init": "policy"}, r"stage\.critic_init must be reward_model, sft, random, or null, got 'policy'"),
        ({"critic": "shared", "critic_init": "sft"}, r"stage\.critic_init=sft has no effect with stage\.critic=shared"),
        (
            {"critic": "shared", "critic_learning_rate": 1e-4},
            r"stage\.critic_learning_rate=0\.0001 has no effect with stage\.critic=shared",
        ),
        ({"critic_init": "reward_model", "reward_model": None}, "requires a reward model"),
        ({"value_clip_range": 0.0}, r"stage\.value_clip_range must be a number above 0 or null, got 0"),
    ],
)
def test_invalid_settings_are_refused(tiny_run: TinyRun, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run.module("ppo", **keys)
