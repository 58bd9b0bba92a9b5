"""KTO: unpaired preferences, and the KL baseline that they are compared with."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import EXACT, PAIRS, Run, TinyRun, assert_same_weights, isolated_logprobs, one_architecture
from rlhf.data import EncodedResponse, SequenceBatch, UnpairedBatch
from rlhf.data.unpaired import EncodedUnpaired, rows_of_other_prompts
from rlhf.dpo import KTOModule
from rlhf.dpo.objective import kto_loss
from rlhf.errors import DataError
from rlhf.models import Frozen, PolicyOutput

Train = Callable[..., Run]


@pytest.fixture
def train(tiny_run: TinyRun) -> Train:
    """Trains KTO on the 16 responses of the 8 pairs, in batches of 4."""
    tiny_run.data_keys["batch_size"] = 4
    return partial(tiny_run.train, "kto")


def log_ratio(module: Any, input_ids: list[int], start: int) -> Tensor:
    """log pi - log ref of one response by the plain models, a scalar in nats."""
    ids = torch.tensor(input_ids)
    with module.opened_reference() as reference:
        sums = [
            isolated_logprobs(lm, ids)[range(start - 1, len(ids) - 1), ids[start:]].sum()
            for lm in (module.policy.lm, reference.model.lm)
        ]
    return sums[0] - sums[1]


def test_first_loss_is_half_the_mean_weight(train: Train) -> None:
    """The policy equals the reference model: log-ratios and baseline are 0, and sigmoid(0) = 1/2.

    16 responses, 8 with each label: (8 x 1 + 8 x 3) / 16 / 2 = 1.
    """
    loss = partial(kto_loss, desirable_weight=1.0, undesirable_weight=3.0)
    run = train(loss=loss, data={"batch_size": 16}, trainer={"max_epochs": 2})
    first, second = run.curve("train/loss")
    assert first == pytest.approx(1.0)
    assert run.curve("kto/kl")[0] == pytest.approx(0.0, abs=1e-5)
    assert second < 1.0
    assert [batch.ref_logprobs is not None for batch in run.batches] == [True, True]


@one_architecture
def test_each_weight_changes_the_loss(train: Train) -> None:
    """Half the mean of the weights (1, 1), (2, 1) and (1, 3) is 0.5, 0.75 and 1."""
    first = []
    for desirable, undesirable in ((1.0, 1.0), (2.0, 1.0), (1.0, 3.0)):
        loss = partial(kto_loss, desirable_weight=desirable, undesirable_weight=undesirable)
        first += train(loss=loss, data={"batch_size": 16}, trainer={"max_steps": 1}).curve("train/loss")
    assert first == pytest.approx([0.5, 0.75, 1.0], abs=1e-5)


def test_kl_baseline_agrees_with_the_plain_models(train: Train) -> None:
    """The mean log-ratio of the mismatched sequences of a batch, or 0 if it is negative.

    Swapping policy and reference model changes the sign, so one of the two values is positive and the other is clamped.
    """
    run = train(learning_rate=1e-2, trainer={"max_epochs": 2}, precompute_ref_logprobs=False)
    module, rows = run.module, run.datamodule.encoded("train")[:5]
    ratios = [log_ratio(module, row.mismatched.input_ids, row.mismatched.start) for row in rows]
    mean = float(sum(ratios)) / 5
    assert abs(mean) > 0.01

    def kl_baseline() -> float:
        module.fill_ref_logprobs(batch := run.datamodule.collate(rows))
        return float(module.kl_baseline(batch))

    assert kl_baseline() == pytest.approx(max(mean, 0.0), rel=1e-3)
    module.policy, module.reference = module.reference.model, Frozen(module.policy)
    assert kl_baseline() == pytest.approx(max(-mean, 0.0), rel=1e-3)


@one_architecture
def test_precomputing_ref_logprobs_does_not_change_training(train: Train) -> None:
    """Neither the losses nor the KL baselines change, and the reference model is not needed after the start."""
    keys = {"eps": 1.0, "learning_rate": 0.1, "trainer": {"max_epochs": 2}}
    before, during = (train(precompute_ref_logprobs=switch, **keys) for switch in (True, False))
    for name in ("train/loss", "kto/kl", "rewards/accuracies"):
        first = 1 if name == "rewards/accuracies" else 0  # At the first step, every reward is 0 up to rounding.
        assert before.curve(name)[first:] == pytest.approx(during.curve(name)[first:], rel=1e-4, abs=1e-5), name
    assert len(set(during.curve("kto/kl"))) > 1
    assert before.module.reference is None


def unpaired_rows(*prompts: str) -> list[EncodedUnpaired]:
    """Rows of 2, 3, 4, ... tokens with these prompts."""
    texts = [EncodedResponse([1, *[5] * length], 1) for length in range(1, len(prompts) + 1)]
    return [EncodedUnpaired(text, True, prompt) for text, prompt in zip(texts, prompts, strict=True)]


def test_mismatched_responses_belong_to_other_prompts() -> None:
    """Each row gets the next longer one with another prompt: a1 -> b, a2 -> b, b -> a3, a3 -> c and c -> a1."""
    assert rows_of_other_prompts([2, 3, 4, 5, 6], "aabac") == [2, 2, 3, 4, 0]
    b, c, _, a3, a1 = range(5)
    assert rows_of_other_prompts([4, 6, 3, 5, 2], "bcaaa") == [a3, a1, b, c, b]
    assert rows_of_other_prompts([2, 3], "aa") == [None, None]


@one_architecture
def test_validation_never_combines_a_prompt_with_its_own_responses(tiny_run: TinyRun) -> None:
    """All rows have equal lengths, so chosen and rejected responses are neighbors in every order by length."""
    pairs = [{"prompt": f"Prompt {i}", "chosen": f"yes {i}", "rejected": f"no {i}."} for i in range(9)]
    path = tiny_run.write("pairs", pairs)
    data = tiny_run.datamodule("kto", train=path, val=path, eval_batch_size=4)
    own = {tuple(row.text.input_ids) for row in data.encoded("val")}
    batches = list(data.loader("val"))
    assert [len(batch.desirable) for batch in batches] == [4, 4, 4, 4, 2]
    for batch in batches:
        for input_ids, mask in zip(batch.mismatched.input_ids, batch.mismatched.attention_mask, strict=True):
            assert tuple(input_ids[mask].tolist()) not in own


@one_architecture
def test_validation_rows_of_one_prompt_use_training_responses(tiny_run: TinyRun) -> None:
    """A single validation record has no other prompt. Training data with a single prompt are rejected."""
    one = tiny_run.write("one", [{"prompt": "Who won?", "completion": "May", "label": True}])
    data = tiny_run.datamodule("kto", val=one)
    (row,) = data.encoded("val")
    responses = [other.text.input_ids[other.text.start :] for other in data.encoded("train")]
    assert row.mismatched.input_ids[row.mismatched.start :] in responses
    with pytest.raises(DataError, match=r"one\.jsonl: all rows have the same prompt"):
        tiny_run.datamodule("kto", train=one).encoded("train")


@one_architecture
def test_a_batch_of_one_is_trained_and_validated(tiny_run: TinyRun, train: Train) -> None:
    """The baseline does not depend on other rows of the batch."""
    run = train(data={"batch_size": 1, "eval_batch_size": 1, "val": tiny_run.write("val", PAIRS[:1])})
    assert len(run.curve("train/loss")) == 16
    assert run.recorder.validation_sizes == [1, 1]


def test_the_baseline_is_the_mean_over_the_rows_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 rows with log-ratios 1, 2, 3 here and one row with 10 there: 16 / 4 = 4, not (2 + 10) / 2 = 6.

    A filler batch adds nothing to the 10 of the other rank.
    """

    monkeypatch.setattr("rlhf.dpo.kto.sum_over_ranks", lambda own: own + torch.tensor([10.0, 1.0]))
    sequences = SequenceBatch.collate([row.text for row in unpaired_rows("a", "b", "c")])
    batch = UnpairedBatch(sequences, torch.ones(3, dtype=torch.bool), sequences, torch.zeros(3), torch.zeros(3))
    module: Any = KTOModule(policy=None)
    module.policy = lambda **inputs: PolicyOutput(torch.tensor([[1.0], [2.0], [3.0]]), torch.empty(0))
    assert float(module.kl_baseline(batch)) == 4.0
    assert float(module.kl_baseline(batch.as_filler())) == 10.0


def test_metrics_of_a_batch_agree_with_the_plain_models(train: Train) -> None:
    """Rewards are beta x log-ratio, averaged over the responses with one label; 3 of 5 responses are desirable."""
    run = train(learning_rate=1e-2, trainer={"max_epochs": 2})
    module, rows = run.module, run.datamodule.encoded("train")[:5]
    ratios = torch.stack([log_ratio(module, row.text.input_ids, row.text.start) for row in rows])
    module.fill_ref_logprobs(batch := run.datamodule.collate(rows))
    loss, _, groups = module.loss_and_metrics(batch)
    metrics = {name: float(value) for group in groups for name, value in group.values.items()}
    kl, desirable = metrics["kto/kl"], batch.desirable
    assert metrics["rewards/chosen"] == pytest.approx(0.1 * float(ratios[desirable].mean()), rel=1e-3)
    assert metrics["rewards/rejected"] == pytest.approx(0.1 * float(ratios[~desirable].mean()), rel=1e-3)
    assert metrics["rewards/accuracies"] == pytest.approx(float(((ratios > kl) == desirable).float().mean()))
    assert [group.terms for group in groups] == [int(batch.sequences.response_mask.sum()), 5, 3, 2]
    gains = torch.where(desirable, ratios - kl, kl - ratios)
    assert float(loss.detach()) == pytest.approx(float((1 / (1 + (0.1 * gains).exp())).mean()), rel=1e-3)


@one_architecture
@pytest.mark.parametrize("size", [2, 3, 8])
def test_validation_does_not_depend_on_the_batch_size(train: Train, size: int, tiny_run: TinyRun) -> None:
    """Some batches have one label only, and numbers of tokens per row differ."""
    texts = ["a", "bb bb bb", "c c", "d" * 20, "e", "f f f f f f", "g", "h"]
    rows = [{"prompt": f"p{i}", "completion": text, "label": i % 3 > 0} for i, text in enumerate(texts)]
    run = train(
        sft_coef=0.5, data={"val": tiny_run.write("val", rows), "eval_batch_size": size}, trainer={"max_epochs": 1}
    )
    shown = {name.removeprefix("val/"): float(value) for name, value in run.trainer.callback_metrics.items()}
    assert shown["loss"] == pytest.approx(shown["preference_loss"] + 0.5 * shown["nll"])
    assert shown["rewards/margins"] == pytest.approx(shown["rewards/chosen"] - shown["rewards/rejected"], abs=1e-6)
    module, batch = run.module, run.datamodule.collate(list(run.datamodule.encoded("val")))
    module.fill_ref_logprobs(batch)
    nll = module.loss_and_metrics(batch)[1].detach()
    assert shown["nll"] == pytest.approx(float(nll), rel=1e-4)


@one_architecture
def test_metrics_without_responses_are_not_logged(tiny_run: TinyRun, train: Train) -> None:
    """With one label only, the other label's means would be 0, which would look like a measurement."""
    path = tiny_run.write("yes", [{"prompt": f"p{i}", "completion": "yes" * i, "label": True} for i in range(1, 9)])
    metrics = train(sft_coef=0.5, data={"train": path}).recorder.metrics[-1]
    assert "rewards/chosen" in metrics
    assert metrics.keys().isdisjoint({"rewards/rejected", "logps/rejected", "rewards/margins"})


@one_architecture
@pytest.mark.parametrize("label", [True, False])
def test_validation_metrics_without_responses_are_not_logged(tiny_run: TinyRun, train: Train, label: bool) -> None:
    """Validation data with one label have no mean over the other one, which would be 0 / 0, and no margin."""
    rows = [{"prompt": f"p{i}", "completion": "yes" * i, "label": label} for i in range(1, 9)]
    run = train(sft_coef=0.5, data={"val": tiny_run.write("val", rows), "eval_batch_size": 4})
    shown = {name: float(value) for name, value in run.trainer.callback_metrics.items() if name.startswith("val/")}
    present, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert {f"val/rewards/{present}", f"val/logps/{present}", "val/rewards/accuracies", "val/kto/kl"} <= shown.keys()
    assert shown.keys().isdisjoint({f"val/rewards/{absent}", f"val/logps/{absent}", "val/rewards/margins"})
    assert ("val/nll" in shown) is label  # The negative log-likelihood is that of desirable responses.
    assert all(math.isfinite(value) for value in shown.values())


@one_architecture
def test_training_separates_the_labels(tiny_run: TinyRun, train: Train) -> None:
    """Desirable responses become more likely than undesirable ones; the reference model stays bit-for-bit the same."""
    keys = {"learning_rate": 3e-3, "beta": 0.3, "precompute_ref_logprobs": False}
    run = train(data={"batch_size": 16}, trainer={"max_epochs": 15}, **keys)
    assert run.curve("rewards/margins")[-1] > 0.1
    assert_same_weights(run.module.reference.model.lm, tiny_run.lm, **EXACT)


@one_architecture
def test_gradient_accumulation_equals_one_large_batch_at_equal_baselines(tiny_run: TinyRun, train: Train) -> None:
    """4 batches of 4 responses make the same step as 1 batch of 16, with weights and SFT term.

    In the first step the baseline of every batch is 0; later it is a statistic of each batch (see KTOModule). AdamW's
    eps is 1, as for the other losses.
    """
    keys: dict[str, Any] = {
        "loss": partial(kto_loss, desirable_weight=1.0, undesirable_weight=2.5),
        "sft_coef": 0.7,
        "eps": 1.0,
        "learning_rate": 1.0,
    }
    large = train(data={"batch_size": 16}, trainer={"max_steps": 1}, **keys)
    small = train(data={"batch_size": 4}, trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **keys)
    assert len(small.batches) == 4
    pairs = zip(large.module.policy.parameters(), tiny_run.lm.parameters(), strict=True)
    assert max(float((new - old).abs().max()) for new, old in pairs) > 1e-3
    assert_same_weights(small.module.policy, large.module.policy)


@one_architecture
def test_length_normalized_changes_the_losses(train: Train) -> None:
    curves = [train(length_normalized=switch, trainer={"max_steps": 3}).curve("train/loss") for switch in (False, True)]
    assert curves[0] != pytest.approx(curves[1], rel=1e-4)


@one_architecture
def test_a_pair_equals_two_unpaired_rows(tiny_run: TinyRun) -> None:
    """A pair is encoded as a desirable and an undesirable response."""
    other = {"prompt": "It rains.", "completion": "So", "label": True}
    pairs = [{"prompt": "Who won?", "chosen": "May", "rejected": "A"}, {**other, "chosen": "So", "rejected": "No"}]
    from_pair = tiny_run.datamodule("kto", train=tiny_run.write("pair", pairs)).encoded("train")
    rows = [{"prompt": "Who won?", "completion": text, "label": text == "May"} for text in ("May", "A")]
    rows += [other, {**other, "completion": "No", "label": False}]
    data = tiny_run.datamodule("kto", train=tiny_run.write("rows", rows))
    assert list(data.encoded("train")) == list(from_pair)
    assert [row.desirable for row in from_pair] == [True, False, True, False]
    assert list(data.training_texts())[:4] == ["Who won?", "May", "Who won?", "A"]


@one_architecture
def test_mismatched_sequences_respect_max_length(tiny_run: TinyRun) -> None:
    """A prompt is truncated from its beginning to fit the longer response of the next row, and keeps its BOS."""
    rows = [
        {"prompt": "long words " * 12, "completion": "A", "label": True},
        {"prompt": "B", "completion": "many other words " * 2, "label": False},
    ]
    data = tiny_run.datamodule("kto", train=tiny_run.write("rows", rows), max_length=80)
    long, short = (row.text for row in data.encoded("train"))
    mismatched = data.collate(data.encoded("train")).mismatched
    response = short.input_ids[short.start :]
    first = mismatched.input_ids[0][mismatched.attention_mask[0]].tolist()
    assert len(first) == 80 < long.start + len(response)
    assert first == [long.input_ids[0], *long.input_ids[: long.start][-(79 - len(response)) :], *response]
    second = mismatched.input_ids[1][mismatched.attention_mask[1]].tolist()
    assert second == [*short.input_ids[: short.start], *long.input_ids[long.start :]]
    assert int(mismatched.response_mask[1].sum()) == len(long.input_ids) - long.start
