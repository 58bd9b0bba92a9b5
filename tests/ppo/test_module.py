"""The PPO stage in Lightning's own loop, for both architectures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from online import Setting, assert_same, changed
from rlhf.errors import UserError
from rlhf.models import ScalarHead
from rlhf.ppo import PPOModule
from rlhf.rl import Minibatch, ScoreShaping
from rlhf.sampling import SamplingParams


def test_first_ratio_and_first_kl_are_exact(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been learned yet: log-probs of the update equal those of the rollout bit for bit, and the KL is 0.

    The second minibatch comes after a step, so there they differ.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    look = PPOModule.policy_output

    def noting(self: PPOModule, part: Minibatch) -> Any:
        scores = look(self, part)
        seen.append((scores.logprobs.detach(), part.old_logprobs))
        return scores

    monkeypatch.setattr(PPOModule, "policy_output", noting)
    _, record = setting.train(kl_coef=0.1)
    assert torch.equal(*seen[0])
    assert not torch.equal(*seen[1])
    assert record.numbers[0]["objective/kl"] == 0.0
    lengths = record.parts[0].response_mask.sum(dim=1)
    assert lengths.min() < lengths.max(), "answers of one length would not show what padding does"


def test_old_logprobs_and_values_are_those_of_the_models_alone(setting: Setting) -> None:
    """Each answer of the first minibatch through the bare model, without padding or neighbours: log softmax of the
    logits over the temperature, 0.7, at which it was sampled, and the judge's number before each token.
    """
    _, record = setting.train()
    part = record.parts[0]
    lm, judge = setting.policy.model, setting.judge.model
    for row in range(len(part.input_ids)):
        length, answer = int(part.attention_mask[row].sum()), part.response_mask[row]
        ids = part.input_ids[row : row + 1, :length]
        with torch.no_grad():
            logprobs = (lm(ids).logits[0, :-1] / 0.7).log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
            values = judge.head(judge.trunk(input_ids=ids, use_cache=False).last_hidden_state[0, :-1])
        chosen = answer[1:length]
        torch.testing.assert_close(part.old_logprobs[row][answer], logprobs[chosen])
        torch.testing.assert_close(part.old_values[row][answer], values[chosen])


def test_only_policy_and_critic_learn(setting: Setting) -> None:
    """The reference and the reward model keep every bit, stay in eval mode and out of the optimizer and checkpoint."""
    module, _ = setting.train()
    assert_same(module.reference.model.lm, setting.policy.model, rtol=0.0, atol=0.0)
    assert_same(module.reward.model.model, setting.judge.model, rtol=0.0, atol=0.0)
    assert changed(module.policy.lm, setting.policy.model)
    assert changed(module.critic, setting.judge.model)
    frozen = [*module.reference.model.modules(), *module.reward.model.model.modules()]
    assert not any(part.training for part in frozen)
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "critic", "scores", "kl", "iterations"}


def test_shared_critic_is_a_head_that_learns(setting: Setting) -> None:
    """The head and the policy under it both take part; there is no second body."""
    module, _ = setting.train(critic="shared", value_coef=1.0)
    assert isinstance(module.critic, ScalarHead)
    fresh = ScalarHead(32)  # its bias starts at 0
    assert torch.equal(fresh.layers[-1].bias, torch.zeros(1))
    assert not torch.equal(module.critic.layers[-1].bias, torch.zeros(1))
    assert changed(module.policy.lm, setting.policy.model)


def test_gradient_clip_val_bounds_the_gradient_of_every_step(setting: Setting) -> None:
    """Without clipping the norm is above 0.01; with 0.01 no step sees more, and all of it is used."""
    _, free = setting.train(trainer={"max_steps": 2})
    _, clipped = setting.train(trainer={"max_steps": 2, "gradient_clip_val": 0.01})
    assert len(free.norms) == len(clipped.norms) == 2
    assert min(free.norms) > 0.01
    assert clipped.norms == pytest.approx([0.01, 0.01], rel=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm it divides by


def test_max_steps_counts_optimizer_steps(setting: Setting) -> None:
    """8 answers in minibatches of 4, two passes: 4 minibatches an iteration, 2 steps with accumulation over 2."""
    _, record = setting.train(trainer={"max_steps": 3, "max_epochs": -1})
    assert (setting.trainer.global_step, len(record.norms), len(record.parts)) == (3, 3, 3)
    _, record = setting.train(trainer={"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": 2})
    assert (setting.trainer.global_step, len(record.norms), len(record.parts)) == (3, 3, 6)


def test_accumulation_is_the_bigger_minibatch(setting: Setting) -> None:
    """4 minibatches of 2 answers make the step that 1 of 8 makes, although the answers have different lengths.

    AdamW's eps is 1: the first step is then close to lr x gradient, where the usual eps would turn the rounding noise
    of tiny gradients into whole steps. Tolerances are the defaults.
    """
    keys = {"ppo_epochs": 1, "eps": 1.0, "learning_rate": 10.0, "scores": ScoreShaping(clip=None)}
    big, seen = setting.train(minibatch_size=8, trainer={"max_steps": 1}, **keys)
    keys["scores"] = ScoreShaping(clip=None)
    small, parts = setting.train(minibatch_size=2, trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **keys)
    counts = [int(part.response_mask.sum()) for part in parts.parts]
    assert len(set(counts)) > 1
    assert sum(counts) == int(seen.parts[0].response_mask.sum())
    assert changed(big.policy.lm, setting.policy.model)
    assert_same(small.policy.lm, big.policy.lm)
    assert_same(small.critic, big.critic)


def test_accumulation_across_iterations_is_refused(setting: Setting) -> None:
    """4 minibatches an iteration cannot be shared out in steps of 3."""
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=3 does not divide the 4 minibatches"):
        setting.train(trainer={"accumulate_grad_batches": 3})


def test_padding_of_a_minibatch_is_never_seen(setting: Setting) -> None:
    """Random tokens and NaN on every slot that is no answer token change neither the loss nor any gradient."""
    module, record = setting.train()
    part = next(part for part in record.parts if not part.attention_mask.all())
    nan = torch.tensor(float("nan"))
    garbage = {
        name: torch.where(part.response_mask, getattr(part, name), nan)
        for name in ("old_logprobs", "old_values", "advantages", "returns")
    }
    noise = torch.randint(3, 300, part.input_ids.shape, generator=torch.Generator().manual_seed(0))
    corrupt_padding = replace(part, tokens=torch.where(part.attention_mask, part.input_ids, noise), **garbage)
    assert not torch.equal(corrupt_padding.input_ids, part.input_ids)

    def loss_and_gradients(batch: Minibatch) -> tuple[Tensor, ...]:
        loss = module.training_step(batch, 0)
        learned = [p for trained, _ in module.trainable_modules() for p in trained.parameters()]
        return loss, *torch.autograd.grad(loss, learned, allow_unused=True)

    expected, got = loss_and_gradients(part), loss_and_gradients(corrupt_padding)
    assert expected[0].isfinite()
    used = [gradient for gradient in expected[1:] if gradient is not None]
    assert max(float(gradient.abs().max()) for gradient in used) > 0
    torch.testing.assert_close(got, expected)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(setting: Setting, tmp_path: Path) -> None:
    """Two epochs in one go, against one epoch, a checkpoint, and the second epoch in a new module and trainer.

    The random state travels with the checkpoint, so the second epoch samples the same answers; weights agree exactly.
    """
    whole, _ = setting.train(trainer={"max_epochs": 2})
    setting.train(trainer={"max_epochs": 1})
    setting.trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, record = setting.train(trainer={"max_epochs": 2}, resume=tmp_path / "last.ckpt")
    assert (setting.trainer.global_step, len(record.norms)) == (8, 4)
    assert_same(resumed, whole, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("key", "there"), [("obs_dim", 32), ("action_dim", 300)])
def test_dimensions_are_checked_against_the_model(setting: Setting, key: str, there: int) -> None:
    """The width of the tiny model is 32 and its vocabulary 300: these may be said, 77 may not."""
    setting.module(**{key: there}).configure_model()
    with pytest.raises(UserError, match=rf"stage\.{key}=77, but the model has {there}"):
        setting.module(**{key: 77}).configure_model()


def test_what_cannot_work_is_refused(setting: Setting) -> None:
    """Greedy sampling, an unknown critic, and a learning rate for a critic that has none of its own."""
    with pytest.raises(UserError, match=r"stage\.sampling\.temperature=0"):
        setting.module(sampling=SamplingParams(temperature=0.0))
    with pytest.raises(UserError, match=r"stage\.critic=both"):
        setting.module(critic="both")
    with pytest.raises(UserError, match=r"stage\.critic_learning_rate .* stage\.critic=shared"):
        setting.module(critic="shared", critic_learning_rate=1e-4)
