"""KTO: rows with a label each, and the baseline that they are compared with."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.data import UnpairedDataModule
from rlhf.dpo.objective import kto_loss
from rlhf.errors import UserError
from rlhf.models import Frozen

one_architecture = pytest.mark.parametrize("architecture", ["transformer"], indirect=True)


def log_ratio(module: Any, tokens: list[int], start: int) -> Tensor:
    """log pi - log reference of an answer by plain transformers, nats, []."""
    sums = []
    for lm in (module.policy.lm, module.reference.model.lm):
        with torch.no_grad():
            logprobs = lm(input_ids=torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
        sums.append(sum(logprobs[t - 1, tokens[t]] for t in range(start, len(tokens))))
    return sums[0] - sums[1]


def test_first_loss_is_half_the_weights(setting: Any) -> None:
    """The policy is the reference: log-ratios and baseline are 0, and every answer costs its weight x sigmoid(0).

    16 answers, 8 of each kind: (8 x 1 + 8 x 3) / 16 / 2 = 1.
    """
    objective = partial(kto_loss, desirable_weight=1.0, undesirable_weight=3.0)
    _, record = setting.train(kto=True, loss=objective, data={"batch_size": 16}, trainer={"max_epochs": 2})
    assert record.curve("train/loss")[0] == pytest.approx(1.0)
    assert record.curve("kto/kl")[0] == pytest.approx(0.0, abs=1e-5)
    assert record.curve("train/loss")[1] < 1.0
    assert record.precomputed == [True, True]


@one_architecture
def test_weights_change_the_outcome(setting: Any) -> None:
    """Each weight by itself: other losses from the first batch on."""
    first = set()
    for weights in ((1.0, 1.0), (2.0, 1.0), (1.0, 3.0)):
        objective = partial(kto_loss, **dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True)))
        _, record = setting.train(kto=True, loss=objective, data={"batch_size": 16}, trainer={"max_steps": 1})
        first.add(round(record.curve("train/loss")[0], 5))
    assert first == {0.5, 0.75, 1.0}


def test_the_baseline_by_plain_transformers(setting: Any) -> None:
    """Prompt i with the answer of row i + 1, the last with the first: mean log-ratio, and 0 where that is below 0.

    Policy and reference changing places turns the sign, so that one way round is above 0 and the other is clamped.
    """
    module, _ = setting.train(kto=True, learning_rate=1e-2, trainer={"max_epochs": 2})
    data = setting.data(kto=True)
    rows = data.encoded("train")[:5]
    texts = [row.text for row in rows]
    ratios = []
    for one, other in zip(texts, [*texts[1:], texts[0]], strict=True):
        ratios.append(log_ratio(module, one.input_ids[: one.start] + other.input_ids[other.start :], one.start))
    mean = float(sum(ratios)) / 5
    assert abs(mean) > 0.01
    batch = data.collate(rows)
    assert float(module.kl_baseline(batch)) == pytest.approx(max(mean, 0.0), rel=1e-3)
    module.policy, module.reference = module.reference.model, Frozen(module.policy)
    assert float(module.kl_baseline(batch)) == pytest.approx(max(-mean, 0.0), rel=1e-3)


def test_numbers_of_a_batch_by_plain_transformers(setting: Any) -> None:
    """Rewards are beta x log-ratio, averaged over the answers of their kind; 5 answers, 3 of them desirable."""
    module, _ = setting.train(kto=True, learning_rate=1e-2, trainer={"max_epochs": 2})
    data = setting.data(kto=True)
    rows = data.encoded("train")[:5]
    ratios = torch.stack([log_ratio(module, row.text.input_ids, row.text.start) for row in rows])
    batch = data.collate(rows)
    loss, _, groups = module.loss_and_metrics(batch)
    numbers = {name: float(value) for _, part in groups for name, value in part.items()}
    kl, desirable = numbers["kto/kl"], batch.desirable
    assert numbers["rewards/chosen"] == pytest.approx(0.1 * float(ratios[desirable].mean()), rel=1e-3)
    assert numbers["rewards/rejected"] == pytest.approx(0.1 * float(ratios[~desirable].mean()), rel=1e-3)
    assert numbers["rewards/margins"] == pytest.approx(numbers["rewards/chosen"] - numbers["rewards/rejected"])
    assert numbers["rewards/accuracies"] == pytest.approx(float(((ratios > kl) == desirable).float().mean()))
    assert [terms for terms, _ in groups] == [int(batch.sequences.response_mask.sum()), 5, 3, 2, 5]
    gains = torch.where(desirable, ratios - kl, kl - ratios)
    assert float(loss) == pytest.approx(float((1 / (1 + (0.1 * gains).exp())).mean()), rel=1e-3)


@one_architecture
def test_a_batch_of_one_kind_logs_nothing_of_the_other(setting: Any) -> None:
    """No average over nothing: 0 there would look like a measurement."""
    setting.pairs.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "completion": "yes" * i, "label": True}) + "\n" for i in range(1, 9))
    )
    _, record = setting.train(kto=True, sft_coef=0.5)
    assert "rewards/chosen" in record.numbers[-1]
    assert record.numbers[-1].keys().isdisjoint({"rewards/rejected", "logps/rejected", "rewards/margins"})


def test_training_tells_the_answers_apart(setting: Any) -> None:
    """Desirable answers become likelier than undesirable ones, and the reference keeps every bit."""
    module, record = setting.train(
        kto=True, data={"batch_size": 16}, learning_rate=3e-3, trainer={"max_epochs": 15}, beta=0.3
    )
    assert record.curve("rewards/margins")[-1] > 0.1
    torch.testing.assert_close(module.reference.model.lm.state_dict(), setting.lm.state_dict(), rtol=0.0, atol=0.0)


@one_architecture
def test_accumulation_is_the_bigger_batch_at_one_baseline(setting: Any) -> None:
    """4 batches of 4 answers make the step that 1 of 16 makes, weights and SFT term included.

    In the first step the baseline is 0 in any batch; later it is a statistic of each batch (KTOModule says so). AdamW's
    eps is 1, as for the other objectives.
    """
    keys = {
        "kto": True,
        "loss": partial(kto_loss, desirable_weight=1.0, undesirable_weight=2.5),
        "sft_coef": 0.7,
        "eps": 1.0,
        "learning_rate": 1.0,
    }
    big, _ = setting.train(data={"batch_size": 16}, trainer={"max_steps": 1}, **keys)
    small, record = setting.train(
        data={"batch_size": 4}, trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **keys
    )
    assert len(record.numbers) == 4
    pairs = zip(big.policy.parameters(), setting.lm.parameters(), strict=True)
    assert max(float((new - old).abs().max()) for new, old in pairs) > 1e-3
    torch.testing.assert_close(small.policy.state_dict(), big.policy.state_dict())


@one_architecture
def test_length_normalized_changes_the_outcome(setting: Any) -> None:
    curves = [
        setting.train(kto=True, length_normalized=switch, trainer={"max_steps": 3})[1].curve("train/loss")
        for switch in (False, True)
    ]
    assert curves[0] != pytest.approx(curves[1], rel=1e-4)


@one_architecture
def test_unpaired_rows_and_pairs_become_the_same_rows(setting: Any, tokenizer: Any) -> None:
    """Two labelled answers of a prompt are a pair."""
    pair = {"prompt": "Who won?", "chosen": "May", "rejected": "A"}
    setting.pairs.write_text(json.dumps(pair) + "\n")
    from_pair = setting.data(kto=True).encoded("train")
    rows = [{"prompt": "Who won?", "completion": text, "label": text == "May"} for text in ("May", "A")]
    setting.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = setting.data(kto=True)
    assert data.encoded("train") == from_pair
    assert [row.desirable for row in from_pair] == [True, False]
    assert list(data.training_texts()) == ["Who won?", "May", "Who won?", "A"]


@one_architecture
def test_mismatched_texts_stay_within_the_length(setting: Any) -> None:
    """A prompt gives way to the longer answer it is joined with, from its beginning, and keeps its BOS."""
    rows = [
        {"prompt": "long words " * 12, "completion": "A", "label": True},
        {"prompt": "B", "completion": "many other words " * 2, "label": False},
    ]
    setting.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = setting.data(kto=True, max_length=80)
    long, short = (row.text for row in data.encoded("train"))
    joined = data.collate(data.encoded("train")).mismatched
    answer = short.input_ids[short.start :]
    first = joined.input_ids[0][joined.attention_mask[0]].tolist()
    assert len(first) == 80 < long.start + len(answer)
    assert first == [long.input_ids[0], *long.input_ids[: long.start][-(79 - len(answer)) :], *answer]
    second = joined.input_ids[1][joined.attention_mask[1]].tolist()
    assert second == [*short.input_ids[: short.start], *long.input_ids[long.start :]]
    assert int(joined.response_mask[1].sum()) == len(long.input_ids) - long.start


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size"])
def test_a_batch_of_one_has_no_other_answer(key: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{key}=1"):
        UnpairedDataModule(**{key: 1})
