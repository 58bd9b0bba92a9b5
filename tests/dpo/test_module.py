"""The DPO stage in Lightning's training loop, for both architectures."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from harness import (
    EXACT,
    PAIRS,
    FakeSource,
    TinyRun,
    assert_same_weights,
    isolated_logprobs,
    one_architecture,
    quick_trainer,
)
from rlhf.dpo import DPOModule, KTOModule
from rlhf.dpo.objective import (
    conservative_loss,
    hinge_loss,
    ipo_loss,
    odds_ratio_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from rlhf.errors import ConfigError
from rlhf.sampling import LocalSampler

NO_REFERENCE = {"reference_free": True, "length_normalized": True}
SMOOTHING = {"label_smoothing": 0.1}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": sigmoid_loss},
    "ipo": {"loss": ipo_loss, "beta": 5.0},
    "hinge": {"loss": hinge_loss},
    "conservative": {"loss": partial(conservative_loss, **SMOOTHING)},
    "robust": {"loss": partial(robust_loss, **SMOOTHING)},
    "simpo": {"loss": partial(simpo_loss, target_margin=0.5), "beta": 2.0, **NO_REFERENCE},
    "orpo": {"loss": odds_ratio_loss, "sft_coef": 1.0, **NO_REFERENCE},
}


def token_logprobs(lm: PreTrainedModel, row: Any) -> Tensor:
    """Log-probs of the response tokens of one sequence by the plain model: [response tokens], in nats."""
    ids = torch.tensor(row.input_ids)
    return isolated_logprobs(lm, ids)[range(row.start - 1, len(ids) - 1), ids[row.start :]]


@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "at each step"])
def test_first_loss_is_ln_2(tiny_run: TinyRun, precompute: bool) -> None:
    """The policy equals the reference model until the first step: every margin is 0, and -ln sigmoid(0) = ln 2."""
    run = tiny_run.train("dpo", precompute_ref_logprobs=precompute)
    first, second, *_ = run.curve("train/loss")
    assert first == pytest.approx(math.log(2))
    assert second != pytest.approx(math.log(2))
    assert (run.module.reference is None) == precompute


@one_architecture
@pytest.mark.parametrize(
    ("name", "first"),
    [("ipo", 0.01), ("hinge", 1.0), ("conservative", math.log(2)), ("robust", math.log(2))],
)
def test_first_loss_of_the_other_losses(tiny_run: TinyRun, name: str, first: float) -> None:
    """All log-ratios are 0. IPO's beta is 5: (0 - 1 / (2 x 5))^2 = 0.01. The second step has the same pairs."""
    # The learning rate is small because IPO's target is only 0.1 nats here.
    keys = {"learning_rate": 1e-5, "data": {"batch_size": 8}, "trainer": {"max_epochs": 2}}
    losses = tiny_run.train("dpo", **LOSSES[name], **keys).curve("train/loss")
    assert losses[0] == pytest.approx(first, rel=1e-5)
    assert losses[1] < losses[0]


def test_first_loss_without_a_reference_agrees_with_the_plain_model(tiny_run: TinyRun) -> None:
    """SimPO, ORPO and DPO with each switch on all 8 pairs, from the logits of single sequences.

    With mean log-prob per token m and sum s: SimPO is ln(1 + e^-(2 (m+ - m-) - 0.5)). ORPO is 0.1 ln(1 + o- / o+) + nll
    with odds o = e^m / (1 - e^m) and nll over the tokens of the 8 chosen responses. DPO, beta 0.1, reads s or m.
    """
    rows = tiny_run.datamodule("dpo").encoded("train")
    chosen, rejected = ([token_logprobs(tiny_run.lm, row.responses[side]) for row in rows] for side in (0, 1))
    sums = torch.stack([a.sum() - b.sum() for a, b in zip(chosen, rejected, strict=True)])
    means = torch.stack([a.mean() - b.mean() for a, b in zip(chosen, rejected, strict=True)])
    odds = [(a.mean().exp() / (1 - a.mean().exp())) for a in (*chosen, *rejected)]
    ratio = torch.tensor([bad / good for good, bad in zip(odds[:8], odds[8:], strict=True)])
    nll = -float(torch.cat(chosen).mean())
    expected = {
        "simpo": (-(2 * means - 0.5)).exp().log1p().mean(),
        "orpo": 0.1 * ratio.log1p().mean() + nll,
        "reference-free": (-0.1 * sums).exp().log1p().mean(),
        "length-normalized": (-0.1 * means).exp().log1p().mean(),
    }
    keys = {
        "simpo": LOSSES["simpo"],
        "orpo": LOSSES["orpo"],
        "reference-free": {"reference_free": True},
        "length-normalized": NO_REFERENCE,
    }
    for name, value in expected.items():
        run = tiny_run.train("dpo", **keys[name], data={"batch_size": 8})
        assert run.curve("train/loss")[0] == pytest.approx(float(value), rel=1e-5), name
        assert run.curve("nll")[0] == pytest.approx(nll, rel=1e-5), name


@one_architecture
def test_length_normalized_log_ratios_are_means_per_token(tiny_run: TinyRun) -> None:
    """With a reference model, after a step: rewards are beta x the sum of token log-ratios / number of tokens."""
    run = tiny_run.train("dpo", length_normalized=True, trainer={"max_steps": 1})
    module, rows = run.module, run.datamodule.encoded("train")
    module.fill_ref_logprobs(batch := run.datamodule.collate(rows))
    _, _, [(terms, metrics), _] = module.loss_and_metrics(batch)
    with module.opened_reference() as reference:
        ratios = [
            (token_logprobs(module.policy.lm, row.chosen) - token_logprobs(reference.model.lm, row.chosen)).mean()
            for row in rows
        ]
    assert terms == 8
    assert float(metrics["rewards/chosen"]) == pytest.approx(0.1 * float(sum(ratios)) / 8, rel=1e-3)


@one_architecture
def test_precomputing_ref_logprobs_does_not_change_training(tiny_run: TinyRun) -> None:
    """The losses, rewards and final weights are the same: the reference model is the untrained policy in both runs.

    Precomputation scores batches of 3 responses, and training scores batches of 2 pairs, so sums of log-probs near -100
    nats differ by rounding errors of 1e-5, which the tolerances allow. AdamW's eps is 1, because the usual value would
    turn the rounding errors of tiny gradients into full steps.
    """
    keys = {"eps": 1.0, "learning_rate": 0.1, "trainer": {"max_epochs": 2}}
    before = tiny_run.train("dpo", precompute_ref_logprobs=True, **keys)
    during = tiny_run.train("dpo", precompute_ref_logprobs=False, **keys)
    for name in ("train/loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert len(set(before.curve(name))) > 1
        assert before.curve(name) == pytest.approx(during.curve(name), rel=1e-4, abs=1e-5)
    assert_same_weights(before.module.policy, during.module.policy, rtol=1e-4, atol=1e-5)


@one_architecture
def test_only_the_policy_is_trained(tiny_run: TinyRun) -> None:
    """The reference model stays bit-for-bit the same and is not in checkpoints; training prefers chosen responses."""
    keys = {"learning_rate": 3e-3, "precompute_ref_logprobs": False}
    run = tiny_run.train("dpo", data={"batch_size": 8}, trainer={"max_epochs": 10}, **keys)
    reference = run.module.reference.model
    assert_same_weights(reference.lm, tiny_run.lm, **EXACT)
    assert not any(part.training for part in reference.modules())
    assert all(name.startswith("policy.") for name in run.weights)
    assert run.curve("train/loss")[-1] < 0.9 * math.log(2)


@one_architecture
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_accumulation_equals_one_large_batch(tiny_run: TinyRun, name: str) -> None:
    """4 batches of 2 pairs make the same step as 1 batch of 8, with the SFT term, which is a mean over tokens.

    AdamW's eps is 1: the first step is then close to learning rate x gradient, where the usual eps would turn the
    rounding errors of tiny gradients into full steps. The reference model sees the policy's batches, so that log-ratios
    are exactly 0, because IPO's gradient is sensitive to them. Tolerances are the defaults.
    """
    keys = {**LOSSES[name], "sft_coef": 0.7, "eps": 1.0, "learning_rate": 1.0}
    keys |= {} if keys.get("reference_free") else {"precompute_ref_logprobs": False}
    large = tiny_run.train("dpo", data={"batch_size": 8}, trainer={"max_steps": 1}, **keys)
    small = tiny_run.train(
        "dpo", data={"batch_size": 2}, trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **keys
    )
    assert len(small.batches) == 4
    pairs = zip(large.module.policy.parameters(), tiny_run.lm.parameters(), strict=True)
    assert max(float((new - old).abs().max()) for new, old in pairs) > 1e-3
    assert_same_weights(small.module.policy, large.module.policy)


def test_beta_scales_the_rewards(tiny_run: TinyRun) -> None:
    """After the same first step, the rewards of the second batch are beta x the same log-ratios.

    AdamW's first step has the sign of the gradient, and beta only scales the gradient: the steps for beta 0.2 and 0.1
    are equal up to eps, so the rewards double.
    """
    one = tiny_run.train("dpo", beta=0.1, eps=1e-20, trainer={"max_steps": 2}).curve("rewards/chosen")
    two = tiny_run.train("dpo", beta=0.2, eps=1e-20, trainer={"max_steps": 2}).curve("rewards/chosen")
    assert two[1] == pytest.approx(2 * one[1], rel=1e-2)


@one_architecture
def test_sft_coef_weights_the_sft_term(tiny_run: TinyRun) -> None:
    """On the same first batch the loss rises by sft_coef x nll, and training then lowers nll further."""
    keys = {"learning_rate": 3e-3, "data": {"batch_size": 8}, "trainer": {"max_epochs": 5}}
    without = tiny_run.train("dpo", **keys)
    with_sft = tiny_run.train("dpo", sft_coef=0.5, **keys)
    nll = with_sft.curve("nll")
    assert with_sft.curve("train/loss")[0] == pytest.approx(math.log(2) + 0.5 * nll[0], rel=1e-5)
    assert without.curve("nll")[0] == pytest.approx(nll[0], rel=1e-5)
    assert nll[-1] < without.curve("nll")[-1] - 0.1


class CountingSource(FakeSource):
    """A source that counts the models that it has opened."""

    opened = 0

    def language_model(self, tokenizer: Any) -> Any:
        self.opened += 1
        return super().language_model(tokenizer)


@one_architecture
@pytest.mark.parametrize(("reference_free", "models"), [(True, 1), (False, 2)])
def test_reference_free_opens_no_reference_model(tiny_run: TinyRun, reference_free: bool, models: int) -> None:
    """One model is opened instead of two, and no log-probs are precomputed."""
    source = CountingSource(tiny_run.lm)
    run = tiny_run.train("dpo", policy=source, reference_free=reference_free, trainer={"max_steps": 1})
    assert source.opened == models
    assert (run.batches[0].ref_logprobs is None) is reference_free


@one_architecture
@pytest.mark.parametrize(
    ("stage", "keys", "message"),
    [
        ("dpo", {"beta": 0.0}, "stage.beta must be a number above 0, got 0.0."),
        ("dpo", {"sft_coef": -0.1}, "stage.sft_coef must be a number of at least 0, got -0.1."),
        (
            "dpo",
            {"loss": partial(conservative_loss, label_smoothing=0.5)},
            "stage.loss.label_smoothing must be a number of at least 0 and below 0.5, got 0.5.",
        ),
        (
            "dpo",
            {"loss": partial(robust_loss, label_smoothing=-0.1)},
            "stage.loss.label_smoothing must be a number of at least 0 and below 0.5, got -0.1.",
        ),
        (
            "dpo",
            {**LOSSES["simpo"], "loss": partial(simpo_loss, target_margin=-1.0)},
            "stage.loss.target_margin must be a number of at least 0, got -1.0.",
        ),
        (
            "dpo",
            {**LOSSES["simpo"], "reference_free": False},
            "stage.reference_free must be true with stage.loss._target_=rlhf.dpo.objective.simpo_loss, "
            "got stage.reference_free=false.",
        ),
        (
            "dpo",
            {**LOSSES["simpo"], "precompute_ref_logprobs": True},
            "stage.precompute_ref_logprobs=true has no effect with stage.reference_free=true.",
        ),
        ("dpo", {**LOSSES["simpo"], "length_normalized": False}, "got stage.length_normalized=false."),
        ("dpo", {**LOSSES["orpo"], "reference_free": False}, "with stage.loss._target_=rlhf.dpo.objective.odds_ratio"),
        (
            "kto",
            {"reference_free": True},
            "stage.reference_free must be false with stage.loss._target_=rlhf.dpo.object",
        ),
    ],
)
def test_invalid_settings_are_rejected(tiny_run: TinyRun, stage: str, keys: dict[str, Any], message: str) -> None:
    """Before a model is opened, with an error that names the key, the value and the constraint."""
    source = CountingSource(tiny_run.lm)
    with pytest.raises(ConfigError) as caught:
        tiny_run.train(stage, policy=source, **keys)
    assert message in str(caught.value)
    assert source.opened == 0


@one_architecture
def test_samples_show_rewards_and_kl(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 prompts after each of 2 validations: reward = beta x log-ratio and KL by the plain models.

    The reference model has been freed, and it is opened again for the table only.
    """
    tables: list[tuple[int, Sequence[str], Any]] = []
    monkeypatch.setattr(
        DPOModule, "log_samples", lambda self, header, rows: tables.append((self.global_step, header, rows))
    )
    val = tiny_run.write("val", PAIRS[:3])
    keys = {"samples": 2, "max_new_tokens": 5, "learning_rate": 1e-2}
    run = tiny_run.train("dpo", data={"val": val}, trainer={"max_epochs": 2}, **keys)
    assert [step for step, *_ in tables] == [4, 8]
    _, header, rows = tables[-1]
    assert header == ("prompt", "response", "reward", "KL in nats")
    assert [row[0] for row in rows] == [pair["prompt"] for pair in PAIRS[:2]]
    assert run.module.reference is None
    for (input_ids, _), (_, response, reward, kl) in zip(run.datamodule.sample_prompts(2, 5), rows, strict=True):
        rollout = LocalSampler()
        rollout.sync(run.module.policy.lm, tiny_run.tokenizer)
        ids = rollout.sample([input_ids], run.module.sampling).input_ids[0]
        after = range(len(input_ids) - 1, len(ids) - 1)
        new, old = (isolated_logprobs(lm, ids)[after] for lm in (run.module.policy.lm, tiny_run.lm))
        ratios = (new - old)[range(len(after)), ids[len(input_ids) :]]
        assert reward == pytest.approx(0.1 * float(ratios.sum()), rel=1e-3)
        assert kl == pytest.approx(float((new.exp() * (new - old)).sum()), rel=1e-3)
        assert tiny_run.tokenizer.decode(ids[len(input_ids) :], skip_special_tokens=True).strip() == response


@one_architecture
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_samples_are_shown_once_after_training_without_validation(
    tiny_run: TinyRun, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without validation data the prompts are those of the training data, each of them once."""
    tables: list[Any] = []
    monkeypatch.setattr(DPOModule, "log_samples", lambda self, header, rows: tables.append(rows))
    monkeypatch.setattr(KTOModule, "log_samples", lambda self, header, rows: tables.append(rows))
    tiny_run.train(stage, samples=3, max_new_tokens=2)
    (rows,) = tables
    assert [row[0] for row in rows] == [pair["prompt"] for pair in PAIRS[:3]]


@one_architecture
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_plain_dataloaders_have_no_table_of_samples(tiny_run: TinyRun, stage: str) -> None:
    """The prompts of the table come from a ``RecordDataModule``, which Lightning does not have here."""
    batches = DataLoader(list(tiny_run.datamodule(stage).loader("train")), batch_size=None)
    trainer = quick_trainer(default_root_dir=tiny_run.folder)
    trainer.fit(tiny_run.module(stage, samples=4), batches, batches)
    assert trainer.global_step == len(batches)
    assert "val/loss" in trainer.callback_metrics


class DrawingSampler(LocalSampler):
    """Draws random numbers for each response, as an external engine could."""

    def sample(self, prompts: Any, params: Any) -> Any:
        torch.rand(7)
        return super().sample(prompts, params)


@one_architecture
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_samples_do_not_advance_the_random_state_of_training(tiny_run: TinyRun, stage: str) -> None:
    states = []
    for samples in (0, 2):
        val = tiny_run.write("val", [{**pair, "completion": "yes"} for pair in PAIRS[:2]])
        tiny_run.train(stage, samples=samples, max_new_tokens=2, sampler=DrawingSampler(), data={"val": val})
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
