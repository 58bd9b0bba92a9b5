"""The reward stage in Lightning's own loop, for both architectures."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harness import (
    DEMONSTRATIONS,
    EXACT,
    NO_UPDATE,
    PAIRS,
    PROMPTS,
    RATINGS,
    RESPONSES,
    Run,
    TinyRun,
    assert_same_weights,
)
from ranks import DDP, in_ranks
from rlhf.data import PairBatch, RatingBatch
from rlhf.errors import ConfigError
from rlhf.models import Transformer
from rlhf.reward import RewardModule

RECORDS = {"pairs": PAIRS, "ratings": RATINGS}


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


class RewardRun(TinyRun):
    """A harness for the reward stage."""

    def reward(
        self, kind: str = "pairs", *, data: dict[str, Any] | None = None, centered: bool = False, **keys: Any
    ) -> Run:
        """Train on pairs or ratings; with ``centered``, scores are centered on the demonstrations."""
        records = {"train": self.write(kind, RECORDS[kind])}
        if centered:
            records["demonstrations"] = self.write("demonstrations", DEMONSTRATIONS)
        return self.train("reward", data={"eval_batch_size": 3, **records, **(data or {})}, **keys)

    @torch.no_grad()
    def raw_scores(self, module: RewardModule, prompt: str, response: str) -> torch.Tensor:
        """Return the output of each head at the last token of one sequence, without the mean, [heads]."""
        text = f"<bos>{prompt}\nSummary: {response}<eos>"
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        hidden = module.model.trunk(input_ids=ids, use_cache=False).last_hidden_state
        return module.model.head.scores(hidden[0, -1])

    def raw_score(self, module: RewardModule, prompt: str, response: str) -> float:
        """Return the mean over the heads of ``raw_scores``."""
        return float(self.raw_scores(module, prompt, response).mean())

    def demonstration_scores(self, module: RewardModule) -> torch.Tensor:
        """Return raw scores of each prompt with its response, [8, heads]."""
        return torch.stack([self.raw_scores(module, *row) for row in zip(PROMPTS, RESPONSES, strict=False)])

    def pair_scores(self, module: RewardModule) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw scores of the chosen and the rejected responses of all pairs, [8, heads] each."""
        rejected = [self.raw_scores(module, *row) for row in zip(PROMPTS, RESPONSES[1:], strict=False)]
        return self.demonstration_scores(module), torch.stack(rejected)


@pytest.fixture
def harness(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> RewardRun:
    return RewardRun(tmp_path, tokenizer, lm)


# Training


def test_data_fields_select_pairs_or_ratings(harness: RewardRun) -> None:
    """Pairs are trained with the Bradley-Terry loss and log accuracy; ratings use regression and log the error."""
    pairs = harness.reward("pairs")
    assert isinstance(pairs.batches[0], PairBatch)
    assert {"train/accuracy", "train/margin", "train/mean_reward"} <= pairs.recorder.metrics[0].keys()
    ratings = harness.reward("ratings")
    assert isinstance(ratings.batches[0], RatingBatch)
    assert sorted(ratings.batches[0].rewards.tolist()) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert "train/absolute_error" in ratings.recorder.metrics[0]
    assert "train/accuracy" not in ratings.recorder.metrics[0]


def test_first_loss_of_pairs_equals_that_of_isolated_sequences(harness: RewardRun) -> None:
    """At learning rate 0, the loss is -mean ln sigmoid(chosen - rejected)."""
    run = harness.reward("pairs", learning_rate=NO_UPDATE)
    chosen, rejected = harness.pair_scores(run.module)
    difference = chosen - rejected
    logged = run.recorder.metrics[0]
    assert logged["train/loss"] == pytest.approx(float((1 + (-difference).exp()).log().mean()), rel=1e-5)
    assert logged["train/accuracy"] == pytest.approx(float((difference > 0).float().mean()))


def test_first_loss_of_ratings_equals_that_of_isolated_sequences(harness: RewardRun) -> None:
    """At learning rate 0, the loss is the mean squared error."""
    run = harness.reward("ratings", learning_rate=NO_UPDATE)
    errors = harness.demonstration_scores(run.module)[:, 0] - torch.arange(8) / 2
    assert run.recorder.metrics[0]["train/loss"] == pytest.approx(float(errors.square().mean()), rel=1e-5)


def test_margin_of_the_data_changes_the_loss(harness: RewardRun) -> None:
    """A margin of 1000, far above the difference of the scores, gives a loss of 1000 - (chosen - rejected)."""
    row = {"prompt": "May", "chosen": "A", "rejected": "B b", "margin": 1000.0}
    run = harness.reward(data={"train": harness.write("margin", [row])}, learning_rate=NO_UPDATE)
    difference = harness.raw_score(run.module, "May", "A") - harness.raw_score(run.module, "May", "B b")
    assert run.recorder.metrics[0]["train/loss"] == pytest.approx(1000 - difference, rel=1e-6)


ALL_OPTIONS = {"num_heads": 3, "label_smoothing": 0.1, "centering_coef": 0.05}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("pairs", {}), ("ratings", {}), ("pairs", ALL_OPTIONS), ("ratings", {"num_heads": 3})],
    ids=["pairs", "ratings", "pairs-all-options", "ratings-heads"],
)
def test_accumulated_batches_equal_one_large_batch(harness: RewardRun, kind: str, options: dict[str, Any]) -> None:
    """Batches of 3, 3 and 2 rows give the step of one batch of 8. The last batch has a smaller weight.

    AdamW's epsilon is 1, so that the first step is close to learning rate x gradient. With the usual epsilon, rounding
    noise of tiny gradients would become full steps.
    """
    keys: dict[str, Any] = {"eps": 1.0, "learning_rate": 0.1, **options}
    large = harness.reward(kind, trainer={"max_steps": 1}, **keys)
    steps = {"max_steps": 1, "accumulate_grad_batches": 3}
    small = harness.reward(kind, data={"batch_size": 3}, trainer=steps, **keys)
    assert sorted(batch.loss_terms for batch in small.batches) == [2, 3, 3]
    initial = large.recorder.initial_weights
    assert max(float((initial[name] - weight).abs().max()) for name, weight in large.weights.items()) > 1e-3
    assert_same_weights(small.module, large.module)


def test_label_smoothing_centering_and_heads_are_in_the_loss(harness: RewardRun) -> None:
    """At learning rate 0, with difference z: the mean of 0.9 ln(1 + e^-z) + 0.1 ln(1 + e^z), plus 0.05 (c + r)^2."""
    run = harness.reward(learning_rate=NO_UPDATE, **ALL_OPTIONS)
    chosen, rejected = harness.pair_scores(run.module)
    assert chosen.shape == (8, 3)
    z = chosen - rejected
    bradley_terry = (0.9 * (1 + (-z).exp()).log() + 0.1 * (1 + z.exp()).log()).mean()
    centering = (chosen + rejected).square().mean()
    logged = run.recorder.metrics[0]
    assert logged["train/centering"] == pytest.approx(float(centering), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(float(bradley_terry + 0.05 * centering), rel=1e-5)
    assert logged["train/accuracy"] == pytest.approx(float((z.mean(dim=1) > 0).float().mean()))
    assert logged["train/margin"] == pytest.approx(float(z.mean()), rel=1e-4)
    scores = torch.cat([chosen, rejected])
    ensemble_std = (scores - scores.mean(dim=0)).std(dim=1, correction=0).mean()
    assert logged["train/ensemble_std"] == pytest.approx(float(ensemble_std), rel=1e-4)


def test_every_head_has_its_own_regression_loss(harness: RewardRun) -> None:
    """The loss is the mean over the heads. The logged error is that of the mean score."""
    run = harness.reward("ratings", learning_rate=NO_UPDATE, num_heads=3)
    scores, rewards = harness.demonstration_scores(run.module), torch.arange(8) / 2
    logged = run.recorder.metrics[0]
    assert logged["train/loss"] == pytest.approx(float((scores - rewards[:, None]).square().mean()), rel=1e-5)
    error = (scores.mean(dim=1) - rewards).abs().mean()
    assert logged["train/absolute_error"] == pytest.approx(float(error), rel=1e-5)


def test_unused_options_are_not_logged(harness: RewardRun) -> None:
    """One head has no standard deviation, and without a coefficient there is no centering penalty."""
    assert not {"train/ensemble_std", "train/centering"} & harness.reward().recorder.metrics[0].keys()


@pytest.mark.parametrize("key", [{"num_heads": 2}, {"label_smoothing": 0.2}, {"centering_coef": 0.5}])
def test_every_option_changes_the_trained_trunk(harness: RewardRun, key: dict[str, Any]) -> None:
    """Three epochs from the same weights and seed end with different weights."""
    default = harness.reward(trainer={"max_epochs": 3}).module.model.trunk
    other = harness.reward(trainer={"max_epochs": 3}, **key).module.model.trunk
    weights = dict(default.named_parameters())
    assert max(float((weights[name] - weight).detach().abs().max()) for name, weight in other.named_parameters()) > 1e-4


def test_centering_penalty_moves_scores_towards_zero(harness: RewardRun) -> None:
    """A large penalty reduces the absolute sum of a pair's scores by more than a factor of 5."""
    sums = []
    for coef in (0.0, 10.0):
        run = harness.reward(trainer={"max_epochs": 20}, learning_rate=1e-2, centering_coef=coef)
        sums.append(sum(harness.pair_scores(run.module)).abs().mean())
    assert sums[1] < 0.2 * sums[0]


# Settings


def test_head_has_the_requested_shape(harness: RewardRun) -> None:
    """num_layers=3 and hidden_dim=7 with hidden states of width 32: 32-7, 7-7, 7-1."""
    head = harness.reward(num_layers=3, hidden_dim=7, input_dim=32).module.model.head
    linear = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(32, 7), (7, 7), (7, 1)]


def test_wrong_input_dim_is_rejected(harness: RewardRun) -> None:
    with pytest.raises(ConfigError, match=r"stage\.input_dim must be 32, .*, got 77\."):
        harness.reward(input_dim=77)


@pytest.mark.parametrize(
    ("keys", "data", "message"),
    [
        ({"hidden_dim": 7}, {}, "stage.hidden_dim=7 has no effect with stage.num_layers=1"),
        ({}, {"demonstration_rows": 7}, "data.demonstration_rows=7 has no effect without data.demonstrations."),
    ],
)
def test_a_key_without_effect_is_rejected(
    harness: RewardRun, keys: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    """A linear head has no inner layers, and without a file of demonstrations there are no rows to limit."""
    with pytest.raises(ConfigError) as caught:
        harness.reward(data=data, **keys)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("key", [{"label_smoothing": 0.1}, {"centering_coef": 0.01}])
def test_pair_options_are_rejected_for_ratings(harness: RewardRun, key: dict[str, float]) -> None:
    """They are rejected before any weights are loaded."""
    ((name, value),) = key.items()
    with pytest.raises(ConfigError, match=rf"stage\.{name} applies to preference pairs only.* got {value}\.") as error:
        harness.reward("ratings", policy=None, **key)
    assert error.value.hint == f"Set stage.{name}=0."


@pytest.mark.parametrize(
    "key", [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"centering_coef": -1.0}, {"num_heads": 0}]
)
def test_values_out_of_range_are_rejected(harness: RewardRun, key: dict[str, Any]) -> None:
    ((name, value),) = key.items()
    with pytest.raises(ConfigError, match=rf"^stage\.{name} must be .* of at least .*, got {value}\."):
        harness.reward(**key)


# Centering on demonstrations


def test_mean_score_of_the_demonstrations_is_subtracted(harness: RewardRun) -> None:
    """After training, the mean raw score of the demonstrations is stored, and ``forward`` subtracts it."""
    module = harness.reward(centered=True, learning_rate=1e-2).module
    mean = float(harness.demonstration_scores(module).mean())
    assert float(module.model.reward_mean) == pytest.approx(mean, rel=1e-4)
    text = "<bos>May\nSummary: A<eos>"
    ids = harness.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    score = float(module.model(ids, torch.ones_like(ids, dtype=torch.bool))[0])
    assert score == pytest.approx(harness.raw_score(module, "May", "A") - mean, rel=1e-4, abs=1e-6)


def test_nothing_is_subtracted_without_demonstrations(harness: RewardRun) -> None:
    assert float(harness.reward().module.model.reward_mean) == 0.0


def test_demonstration_rows_limits_the_mean(harness: RewardRun) -> None:
    module = harness.reward(centered=True, data={"demonstration_rows": 2}).module
    mean = float(harness.demonstration_scores(module)[:2].mean())
    assert float(module.model.reward_mean) == pytest.approx(mean, rel=1e-4)


def test_each_head_is_centered_separately(harness: RewardRun) -> None:
    module = harness.reward(centered=True, learning_rate=1e-2, num_heads=3).module
    means = harness.demonstration_scores(module).mean(dim=0)
    torch.testing.assert_close(module.model.reward_mean, means, rtol=1e-4, atol=1e-6)
    assert float(module.model.reward_mean.std()) > 1e-3


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_the_subtracted_mean_is_float32_in_any_precision(harness: RewardRun, precision: str) -> None:
    """Otherwise, the mean would be rounded to the 8 or 11 significant bits of the weights."""
    model = harness.reward(centered=True, num_heads=2, trainer={"precision": precision}).module.model
    assert model.reward_mean.dtype == torch.float32
    assert not torch.equal(model.reward_mean, model.reward_mean.to(model.trunk.dtype).float())


@pytest.mark.parametrize(
    ("keys", "warns"),
    [
        ({}, False),
        ({"num_heads": 2}, True),
        ({"num_heads": 2, "centered": True}, False),
        ({"num_heads": 2, "centering_coef": 0.1}, False),
    ],
)
def test_heads_with_arbitrary_offsets_give_a_warning(
    harness: RewardRun, caplog: pytest.LogCaptureFixture, keys: dict[str, Any], warns: bool
) -> None:
    """Without demonstrations and without a penalty, the disagreement of the heads contains their offsets."""
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        harness.reward(**keys)
    assert ("The offsets of the 2 heads are arbitrary" in caplog.text) is warns


# Resuming


class SaveBeforeCentering(lightning.Callback):
    """Writes a checkpoint at the end of training, before the scores are centered, as ``ModelCheckpoint`` does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mean_in_checkpoint", [False, True])
def test_resuming_a_finished_run_centers_again(
    harness: RewardRun, tmp_path: Path, heads: int, mean_in_checkpoint: bool
) -> None:
    """The checkpoint may be written before or after centering. All weights are bit-for-bit equal."""
    path = tmp_path / "last.ckpt"
    keys: dict[str, Any] = {"centered": True, "learning_rate": 1e-2, "num_heads": heads}
    first = harness.reward(callbacks=[] if mean_in_checkpoint else [SaveBeforeCentering(path)], **keys)
    if mean_in_checkpoint:
        first.trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["state_dict"]["model.reward_mean"]
    assert bool(stored.any()) is mean_in_checkpoint
    second = harness.reward(resume=path, **keys)
    assert second.batches == []
    assert float(first.module.model.reward_mean.abs().min()) > 1e-3
    assert_same_weights(second.module, first.module, **EXACT)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_stored_mean_is_not_subtracted_twice(harness: RewardRun, tmp_path: Path, penalty: float) -> None:
    """A run that resumes for a second epoch does not depend on whether its checkpoint stores a mean.

    The centering penalty depends on the offset of the scores, so training has to use raw scores.
    """
    keys: dict[str, Any] = {"centered": True, "learning_rate": 1e-2, "centering_coef": penalty}
    first = harness.reward(callbacks=[SaveBeforeCentering(tmp_path / "without.ckpt")], **keys)
    first.trainer.save_checkpoint(tmp_path / "with.ckpt")
    without, with_mean = (
        harness.reward(resume=tmp_path / f"{name}.ckpt", trainer={"max_epochs": 2}, **keys)
        for name in ("without", "with")
    )
    assert len(with_mean.recorder.metrics) == 1
    assert with_mean.recorder.metrics[0]["train/loss"] == without.recorder.metrics[0]["train/loss"]
    assert_same_weights(with_mean.module, without.module, **EXACT)
    mean = float(harness.demonstration_scores(with_mean.module).mean())
    assert float(with_mean.module.model.reward_mean) == pytest.approx(mean, rel=1e-4)


def test_resuming_a_finished_run_writes_the_same_report(harness: RewardRun, tmp_path: Path) -> None:
    callbacks = [SaveBeforeCentering(tmp_path / "last.ckpt")]
    _, first = train_with_report(harness, "pairs", tmp_path / "first", callbacks=callbacks)
    _, second = train_with_report(harness, "pairs", tmp_path / "second", resume=tmp_path / "last.ckpt")
    assert second == first


# Report


def train_with_report(harness: RewardRun, kind: str, output: Path, **keys: Any) -> tuple[Run, dict[str, Any]]:
    """Train with the training rows as validation rows, and return the run and its metrics.json."""
    rows = harness.write(kind, RECORDS[kind])
    run = harness.reward(kind, data={"val": rows}, centered=True, output=str(output), learning_rate=1e-2, **keys)
    return run, json.loads((output / "metrics.json").read_text())


def test_report_of_pairs_uses_the_final_weights(harness: RewardRun, tmp_path: Path) -> None:
    """Accuracy, margin and standard deviation equal those of isolated sequences, and lengths count response tokens."""
    run, report = train_with_report(harness, "pairs", tmp_path / "out", num_heads=2)
    chosen, rejected = harness.pair_scores(run.module)
    difference = (chosen - rejected).mean(dim=1)
    assert (report["kind"], report["count"], report["heads"]) == ("pairs", 8, 2)
    assert report["accuracy"] == pytest.approx(float((difference > 0).float().mean()))
    assert report["margin"] == pytest.approx(float(difference.mean()), rel=1e-4)
    scores = torch.cat([chosen, rejected]) - run.module.model.reward_mean
    assert report["ensemble_std"] == pytest.approx(float(scores.std(dim=1, correction=0).mean()), rel=1e-4)
    lengths = [len(harness.tokenizer(f" {text}<eos>", add_special_tokens=False)["input_ids"]) for text in RESPONSES]
    assert report["longer_chosen"]["count"] == sum(lengths[row] > lengths[row + 1] for row in range(8))
    assert report["by_length"][0]["low"] == min(lengths)
    assert report["by_length"][-1]["high"] == max(lengths)


def test_report_of_ratings_is_on_the_scale_of_the_data(harness: RewardRun, tmp_path: Path) -> None:
    """The mean that is subtracted from the scores counts as an error neither in the report nor in validation."""
    run, report = train_with_report(harness, "ratings", tmp_path / "out")
    assert abs(float(run.module.model.reward_mean)) > 1e-2
    errors = harness.demonstration_scores(run.module)[:, 0] - torch.arange(8) / 2
    assert report["kind"] == "ratings"
    assert report["absolute_error"] == pytest.approx(float(errors.abs().mean()), rel=1e-4)
    (validation,) = run.trainer.validate(run.module, run.datamodule, verbose=False)
    assert validation["val/loss"] == pytest.approx(float(errors.square().mean()), rel=1e-4)


def test_report_is_logged_to_tensorboard(harness: RewardRun, tmp_path: Path) -> None:
    """TensorBoard gets the numbers of metrics.json and one figure."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path, name="board", version="")
    _, report = train_with_report(harness, "pairs", tmp_path / "out", trainer={"logger": logger})
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert events.Tags()["images"] == ["report"]
    expected = {
        "accuracy": report["accuracy"],
        "calibration_error": report["calibration_error"],
        "length_correlation/pearson": report["length_correlation"]["pearson"],
    }
    for name, value in expected.items():
        assert events.Scalars(f"report/{name}")[0].value == pytest.approx(value)


@pytest.mark.parametrize(
    ("has_validation_rows", "trainer"),
    [(False, {}), (True, {"limit_val_batches": 0}), (True, {"fast_dev_run": True})],
    ids=["no-rows", "no-batches", "fast_dev_run"],
)
def test_no_report_without_validation(
    harness: RewardRun, tmp_path: Path, has_validation_rows: bool, trainer: dict[str, Any]
) -> None:
    data = {"val": harness.write("pairs", PAIRS)} if has_validation_rows else {}
    harness.reward(data=data, trainer=trainer, output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_file_without_output(harness: RewardRun, tmp_path: Path) -> None:
    rows = harness.write("pairs", PAIRS)
    before = set(tmp_path.iterdir())
    harness.reward(data={"val": rows})
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("limit", "count"), [(1, 3), (2, 6), (0.7, 6), (1.0, 8), (9, 8)])
def test_report_uses_as_many_batches_as_validation(
    harness: RewardRun, tmp_path: Path, limit: float, count: int
) -> None:
    """Eight rows are batches of 3, 3 and 2. A fraction of 0.7 rounds down to two batches."""
    _, report = train_with_report(harness, "pairs", tmp_path / "out", trainer={"limit_val_batches": limit})
    assert report["count"] == count


# Several processes


def center_and_report(rank: int, harness: RewardRun, output: Path, flags: dict[str, Any]) -> tuple[float, int]:
    """Return the mean that is subtracted from the scores, and the number of sequences scored for it and the report."""
    scored = []
    scores = RewardModule._scores

    def count(module: RewardModule, sequences: Any) -> torch.Tensor:
        scored.append(len(sequences.input_ids))
        return scores(module, sequences)

    RewardModule._scores = count
    rows = {"val": harness.write("val", PAIRS[:7]), "demonstration_rows": 7}
    trainer = {"limit_train_batches": 1, **flags}
    run = harness.reward(data=rows, centered=True, output=str(output), learning_rate=NO_UPDATE, trainer=trainer)
    return float(run.module.model.reward_mean), sum(scored)


def test_ranks_share_centering_and_report(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 demonstrations and 7 pairs on two ranks give the mean and the report of one process.

    One row is left for the last batch. Rank 1 scores another one again, which counts neither there nor here: rank 0
    scores 4 demonstrations and 4 pairs, and so does rank 1.
    """
    monkeypatch.setattr(RewardModule, "_scores", RewardModule._scores)  # restores it
    torch.manual_seed(0)
    source = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_length=128)
    harness = RewardRun(tmp_path, tokenizer, source.language_model(tokenizer))
    mean, count = center_and_report(0, harness, tmp_path / "one", {})
    ranks = in_ranks(center_and_report, harness, tmp_path / "two", DDP)
    assert count == 7 + 14
    assert [count for _, count in ranks] == [4 + 8, 4 + 8]
    assert [mean for mean, _ in ranks] == pytest.approx([mean, mean], rel=1e-5)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["count"] == 7
    for name in ("accuracy", "margin", "calibration_error"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)
    assert two["by_length"] == [pytest.approx(bucket, rel=1e-4) for bucket in one["by_length"]]
