"""The DPO stage in Lightning's own loop, for both architectures."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers import Fixed
from rlhf.dpo.objective import (
    conservative_loss,
    hinge_loss,
    ipo_loss,
    odds_ratio_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from rlhf.errors import UserError

ALONE = {"reference_free": True, "length_normalized": True}
SMOOTHED = {"label_smoothing": 0.1}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": sigmoid_loss},
    "ipo": {"loss": ipo_loss, "beta": 5.0},
    "hinge": {"loss": hinge_loss},
    "conservative": {"loss": partial(conservative_loss, **SMOOTHED)},
    "robust": {"loss": partial(robust_loss, **SMOOTHED)},
    "simpo": {"loss": partial(simpo_loss, target_margin=0.5), "beta": 2.0, **ALONE},
    "orpo": {"loss": odds_ratio_loss, "sft_coef": 1.0, **ALONE},
}
one_architecture = pytest.mark.parametrize("architecture", ["transformer"], indirect=True)


def token_logprobs(lm: PreTrainedModel, row: Any) -> Tensor:
    """Log-probs of the tokens of an answer by plain transformers, one text at a time: [tokens of the answer], nats."""
    with torch.no_grad():
        logprobs = lm(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(dim=-1)
    return torch.stack([logprobs[t - 1, row.input_ids[t]] for t in range(row.start, len(row.input_ids))])


@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "at each step"])
def test_first_loss_is_ln_2(setting: Any, precompute: bool) -> None:
    """The policy is the reference until the first step: every margin is 0, and -ln sigmoid(0) = ln 2."""
    _, record = setting.train(precompute_ref_logprobs=precompute)
    assert record.curve("train/loss")[0] == pytest.approx(math.log(2))
    assert record.curve("train/loss")[1] != pytest.approx(math.log(2))
    assert record.precomputed == [precompute] * 4


@one_architecture
@pytest.mark.parametrize(
    ("name", "first"),
    [("ipo", 0.01), ("hinge", 1.0), ("conservative", math.log(2)), ("robust", math.log(2))],
)
def test_first_loss_of_the_other_objectives(setting: Any, name: str, first: float) -> None:
    """All log-ratios are 0; IPO's beta is 5: (0 - 1 / (2 x 5))^2 = 0.01. The second step has the same pairs."""
    # a small step: IPO aims at 0.1 nats here, and must not overshoot
    keys = {"learning_rate": 1e-5, "data": {"batch_size": 8}, "trainer": {"max_epochs": 2}}
    _, record = setting.train(**OBJECTIVES[name], **keys)
    assert record.curve("train/loss")[0] == pytest.approx(first, rel=1e-5)
    assert record.curve("train/loss")[1] < record.curve("train/loss")[0]


def test_first_loss_without_a_reference_by_plain_transformers(setting: Any) -> None:
    """SimPO and ORPO of all 8 pairs, from the logits of single texts; the switches apart, on DPO, too.

    mean log-prob a token m, sum s: SimPO ln(1 + e^-(2 (m+ - m-) - 0.5)); ORPO 0.1 ln(1 + o- / o+) + nll with odds
    o = e^m / (1 - e^m) and nll over the tokens of the 8 chosen answers; DPO, beta 0.1, on s or m.
    """
    rows = setting.data().encoded("train")
    chosen, rejected = ([token_logprobs(setting.lm, row.responses[side]) for row in rows] for side in (0, 1))
    sums = torch.stack([a.sum() - b.sum() for a, b in zip(chosen, rejected, strict=True)])
    means = torch.stack([a.mean() - b.mean() for a, b in zip(chosen, rejected, strict=True)])
    odds = [(a.mean().exp() / (1 - a.mean().exp())) for a in (*chosen, *rejected)]
    ratio = torch.tensor([bad / good for good, bad in zip(odds[:8], odds[8:], strict=True)])
    nll = -float(torch.cat(chosen).mean())
    expected = {
        "simpo": (-(2 * means - 0.5)).exp().log1p().mean(),
        "orpo": 0.1 * ratio.log1p().mean() + nll,
        "reference-free": (-0.1 * sums).exp().log1p().mean(),
        "length-normalised": (-0.1 * means).exp().log1p().mean(),
    }
    keys = {
        "simpo": OBJECTIVES["simpo"],
        "orpo": OBJECTIVES["orpo"],
        "reference-free": {"reference_free": True},
        "length-normalised": ALONE,
    }
    for name, value in expected.items():
        _, record = setting.train(**keys[name], data={"batch_size": 8})
        assert record.curve("train/loss")[0] == pytest.approx(float(value), rel=1e-5), name
        assert record.curve("nll")[0] == pytest.approx(nll, rel=1e-5), name


@one_architecture
def test_length_normalized_log_ratios_are_means_a_token(setting: Any) -> None:
    """With a reference too: after a step, rewards are beta x the sum of log-ratios over the answer / its length."""
    module, _ = setting.train(length_normalized=True, trainer={"max_steps": 1})
    data = setting.data()
    rows = data.encoded("train")
    _, _, [(terms, numbers), _] = module.loss_and_metrics(data.collate(rows))
    ratios = [
        (token_logprobs(module.policy.lm, row.chosen) - token_logprobs(module.reference.model.lm, row.chosen)).mean()
        for row in rows
    ]
    assert terms == 8
    assert float(numbers["rewards/chosen"]) == pytest.approx(0.1 * float(sum(ratios)) / 8, rel=1e-3)


def test_precomputing_the_reference_changes_no_number(setting: Any) -> None:
    """The same losses, rewards and final weights: the reference is the untrained policy either way.

    The reference is scored in batches of 3 answers, the policy in batches of 2 pairs. Sums of log-probs near -100 nats
    are then rounded at 1e-5, which the tolerances of the curves allow. AdamW's eps is 1, where the usual one would turn
    the rounding noise of tiny gradients into whole steps.
    """
    keys = {"eps": 1.0, "learning_rate": 0.1, "trainer": {"max_epochs": 2}}
    before, one = setting.train(precompute_ref_logprobs=True, **keys)
    during, other = setting.train(precompute_ref_logprobs=False, **keys)
    for name in ("train/loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert len(set(one.curve(name))) > 1
        assert one.curve(name) == pytest.approx(other.curve(name), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(before.policy.state_dict(), during.policy.state_dict(), rtol=1e-4, atol=1e-5)


def test_only_the_policy_learns(setting: Any) -> None:
    """The reference keeps every bit and stays out of checkpoints, and training prefers the chosen answers."""
    module, record = setting.train(data={"batch_size": 8}, learning_rate=3e-3, trainer={"max_epochs": 10})
    torch.testing.assert_close(module.reference.model.lm.state_dict(), setting.lm.state_dict(), rtol=0.0, atol=0.0)
    assert not any(part.training for part in module.reference.model.modules())
    assert all(name.startswith("policy.") for name in module.state_dict())
    assert record.curve("train/loss")[-1] < 0.9 * math.log(2)


@one_architecture
@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_is_the_bigger_batch(setting: Any, name: str) -> None:
    """4 batches of 2 pairs make the step that 1 of 8 makes, SFT term included, whose mean is over tokens.

    AdamW's eps is 1: the first step is then close to lr x gradient, where the usual eps would turn the rounding noise
    of tiny gradients into whole steps. The reference is scored in the policy's batches, so that log-ratios are exactly
    0, to which IPO's gradient is sensitive. Tolerances are the defaults.
    """
    keys = {**OBJECTIVES[name], "sft_coef": 0.7, "eps": 1.0, "learning_rate": 1.0, "precompute_ref_logprobs": False}
    big, _ = setting.train(data={"batch_size": 8}, trainer={"max_steps": 1}, **keys)
    small, record = setting.train(
        data={"batch_size": 2}, trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **keys
    )
    assert len(record.numbers) == 4
    pairs = zip(big.policy.parameters(), setting.lm.parameters(), strict=True)
    assert max(float((new - old).abs().max()) for new, old in pairs) > 1e-3
    torch.testing.assert_close(small.policy.state_dict(), big.policy.state_dict())


def test_beta_scales_the_rewards(setting: Any) -> None:
    """After the same first step, the second batch's rewards are beta x the same log-ratio.

    AdamW's first step has the sign of the gradient, and beta only scales the gradient: beta 0.2 and 0.1 move alike up
    to eps, and rewards double.
    """
    _, one = setting.train(beta=0.1, eps=1e-20, trainer={"max_steps": 2})
    _, two = setting.train(beta=0.2, eps=1e-20, trainer={"max_steps": 2})
    assert two.curve("rewards/chosen")[1] == pytest.approx(2 * one.curve("rewards/chosen")[1], rel=1e-2)


@one_architecture
def test_the_sft_term_is_added_with_its_weight(setting: Any) -> None:
    """The same first batch: the loss rises by sft_coef x nll, and training then learns the chosen answers by heart."""
    keys = {"learning_rate": 3e-3, "data": {"batch_size": 8}, "trainer": {"max_epochs": 5}}
    _, without = setting.train(**keys)
    _, with_it = setting.train(sft_coef=0.5, **keys)
    nll = with_it.curve("nll")
    assert with_it.curve("train/loss")[0] == pytest.approx(math.log(2) + 0.5 * nll[0], rel=1e-5)
    assert without.curve("nll")[0] == pytest.approx(nll[0], rel=1e-5)
    assert nll[-1] < without.curve("nll")[-1] - 0.1


class Counted(Fixed):
    """A source that counts the models it opened."""

    opened = 0

    def language_model(self, tokenizer: Any) -> Any:
        self.opened += 1
        return super().language_model(tokenizer)


@one_architecture
def test_without_a_reference_none_is_loaded(setting: Any) -> None:
    """One model is opened instead of two, and no log-probs are computed ahead."""
    for switch, models in ((True, 1), (False, 2)):
        source = Counted(setting.lm)
        module, record = setting.train(policy=source, reference_free=switch, trainer={"max_steps": 1})
        assert source.opened == models
        assert (module.reference is None) is switch
        assert record.precomputed[0] is not switch


@one_architecture
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"beta": 0.0}, ["stage.beta=0"]),
        ({"sft_coef": -0.1}, ["stage.sft_coef=-0.1"]),
        ({"loss": partial(conservative_loss, label_smoothing=0.5)}, ["stage.loss.label_smoothing=0.5"]),
        ({"loss": partial(robust_loss, label_smoothing=-0.1)}, ["stage.loss.label_smoothing=-0.1"]),
        ({**OBJECTIVES["simpo"], "loss": partial(simpo_loss, target_margin=-1.0)}, ["target_margin=-1"]),
        (
            {**OBJECTIVES["simpo"], "reference_free": False},
            ["stage.reference_free=false", "stage.loss._target_=rlhf.dpo.objective.simpo_loss"],
        ),
        ({**OBJECTIVES["simpo"], "length_normalized": False}, ["stage.length_normalized=false", "simpo_loss"]),
        ({**OBJECTIVES["orpo"], "reference_free": False}, ["stage.reference_free=false", "odds_ratio_loss"]),
        ({"reference_free": True, "kto": True}, ["stage.reference_free=true", "kto_loss"]),
    ],
)
def test_what_cannot_be_is_refused(setting: Any, keys: dict[str, Any], words: list[str]) -> None:
    """Before a model is opened, naming the key, or both where two contradict each other."""
    source = Counted(setting.lm)
    with pytest.raises(UserError) as caught:
        setting.train(policy=source, **keys)
    assert [word for word in words if word not in str(caught.value)] == []
    assert source.opened == 0
