"""The reward model's stage in Lightning's own loop, for both architectures."""

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers import ANSWERS, PROMPTS, Fixed
from rlhf.data import PairBatch, RatingBatch
from rlhf.errors import UserError
from rlhf.reward import RewardDataModule, RewardModule


class Record(lightning.Callback):
    """Keeps the batches, the logged numbers, and the weights before the first step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.numbers: list[dict[str, float]] = []
        self.first: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.first = deepcopy(module.state_dict())

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.numbers.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Setting:
    """Builds and trains a tiny run; every call starts from the same model and seed."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> None:
        self.folder, self.tokenizer, self.lm = folder, tokenizer, lm
        self.callbacks: list[lightning.Callback] = []
        self.pairs = self.write(
            "pairs",
            [
                {"document": prompt, "chosen": chosen, "rejected": rejected}
                for prompt, chosen, rejected in zip(PROMPTS, ANSWERS, ANSWERS[1:], strict=False)
            ],
        )
        self.ratings = self.write(
            "ratings",
            [
                {"document": prompt, "response": answer, "reward": number / 2}
                for number, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=False))
            ],
        )
        self.demonstrations = self.write(
            "demonstrations",
            [{"document": prompt, "target": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=False)],
        )

    def write(self, name: str, rows: list[dict[str, Any]]) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def train(
        self,
        train: str,
        *,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        resume: Path | None = None,
        **keys: Any,
    ) -> tuple[RewardModule, Record]:
        module, record = (
            RewardModule(policy=Fixed(self.lm), **{"learning_rate": 1e-3, "schedule": "constant", **keys}),
            Record(),
        )
        datamodule = RewardDataModule(
            **{
                "train": train,
                "val_fraction": 0,
                "max_length": 96,
                "batch_size": 8,
                "eval_batch_size": 3,
                **(data or {}),
            }
        )
        module.tokenizer = datamodule.tokenizer = self.tokenizer
        lightning.seed_everything(7, verbose=False)
        lightning.Trainer(
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[record, *self.callbacks],
            **{"max_epochs": 1, "logger": False, **(trainer or {})},
        ).fit(module, datamodule, ckpt_path=resume, weights_only=True)
        return module, record

    def raw_score(self, module: RewardModule, prompt: str, answer: str) -> float:
        """The mean over the heads of their numbers, without what is subtracted."""
        return float(self.raw_scores(module, prompt, answer).mean())

    @torch.no_grad()
    def raw_scores(self, module: RewardModule, prompt: str, answer: str) -> torch.Tensor:
        """Each head's number at the last token of one text alone, [heads]."""
        text = f"<bos>{prompt}\nSummary: {answer}<eos>"
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        hidden = module.model.trunk(input_ids=ids, use_cache=False).last_hidden_state
        return module.model.head.scores(hidden[0, -1])

    def pair_scores(self, module: RewardModule) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen and rejected raw scores of all eight pairs, each text alone: [pairs, heads] each."""
        chosen = [self.raw_scores(module, *row) for row in zip(PROMPTS, ANSWERS, strict=False)]
        rejected = [self.raw_scores(module, *row) for row in zip(PROMPTS, ANSWERS[1:], strict=False)]
        return torch.stack(chosen), torch.stack(rejected)


@pytest.fixture
def setting(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> Setting:
    return Setting(tmp_path, tokenizer, lm)


def test_the_fields_of_the_data_choose_pairs_or_ratings(setting: Setting) -> None:
    """chosen/rejected: Bradley-Terry with its accuracy; response/reward: regression with its error."""
    _, pairs = setting.train(setting.pairs)
    assert isinstance(pairs.batches[0], PairBatch)
    assert {"train/accuracy", "train/margin", "train/mean_reward"} <= pairs.numbers[0].keys()
    _, ratings = setting.train(setting.ratings)
    assert isinstance(ratings.batches[0], RatingBatch)
    assert sorted(ratings.batches[0].rewards.tolist()) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert "train/absolute_error" in ratings.numbers[0]
    assert "train/accuracy" not in ratings.numbers[0]


def test_first_losses_are_those_of_each_text_alone(setting: Setting) -> None:
    """Nothing is trained (learning rate 0): -mean ln sigmoid(chosen - rejected), and the mean squared error."""
    module, pairs = setting.train(setting.pairs, learning_rate=0.0)
    scores = [
        (setting.raw_score(module, prompt, chosen), setting.raw_score(module, prompt, rejected))
        for prompt, chosen, rejected in zip(PROMPTS, ANSWERS, ANSWERS[1:], strict=False)
    ]
    differences = torch.tensor([chosen - rejected for chosen, rejected in scores])
    assert pairs.numbers[0]["train/loss"] == pytest.approx(float((1 + (-differences).exp()).log().mean()), rel=1e-5)
    assert pairs.numbers[0]["train/accuracy"] == pytest.approx(float((differences > 0).float().mean()))
    module, ratings = setting.train(setting.ratings, learning_rate=0.0)
    errors = [
        setting.raw_score(module, prompt, answer) - number / 2
        for number, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=False))
    ]
    assert ratings.numbers[0]["train/loss"] == pytest.approx(sum(e * e for e in errors) / 8, rel=1e-5)


def test_a_margin_in_the_data_changes_the_loss(setting: Setting) -> None:
    """A margin of 1000 that the scores do not reach costs 1000 - (chosen - rejected) nats a pair."""
    row = {"prompt": "May", "chosen": "A", "rejected": "B b"}
    module, record = setting.train(setting.write("margin", [{**row, "margin": 1000.0}]), learning_rate=0.0)
    difference = setting.raw_score(module, "May", "A") - setting.raw_score(module, "May", "B b")
    assert record.numbers[0]["train/loss"] == pytest.approx(1000 - difference, rel=1e-6)


EVERYTHING = {"num_heads": 3, "label_smoothing": 0.1, "centering_coef": 0.05}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("pairs", {}), ("ratings", {}), ("pairs", EVERYTHING), ("ratings", {"num_heads": 3})],
    ids=["pairs", "ratings", "pairs-everything", "ratings-heads"],
)
def test_accumulation_is_the_bigger_batch(setting: Setting, kind: str, extra: dict[str, Any]) -> None:
    """3 batches of 3, 3 and 2 rows make the step that 1 of 8 makes: the last batch weighs less.

    AdamW's eps is 1: the first step is then close to lr x gradient, where the usual eps would turn the rounding noise
    of tiny gradients into whole steps. Tolerances are the defaults.
    """
    train, keys = getattr(setting, kind), {"eps": 1.0, "learning_rate": 0.1, **extra}
    big, record = setting.train(train, trainer={"max_steps": 1}, **keys)
    steps = {"max_steps": 1, "accumulate_grad_batches": 3}
    small, parts = setting.train(train, data={"batch_size": 3}, trainer=steps, **keys)
    assert sorted(batch.loss_terms for batch in parts.batches) == [2, 3, 3]
    assert max(float((record.first[name] - weight).abs().max()) for name, weight in big.state_dict().items()) > 1e-3
    torch.testing.assert_close(small.state_dict(), big.state_dict())


def test_the_mean_score_of_the_demonstrations_becomes_zero(setting: Setting) -> None:
    """Trained or not, the stored mean is that of each demonstration alone, and scores are counted from it."""
    module, _ = setting.train(setting.pairs, data={"demonstrations": setting.demonstrations}, learning_rate=1e-2)
    raw = [setting.raw_score(module, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=False)]
    assert abs(sum(raw) / 8) > 1e-3
    assert float(module.model.reward_mean) == pytest.approx(sum(raw) / 8, rel=1e-4)  # batched float32
    ids = setting.tokenizer("<bos>May\nSummary: A<eos>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    score = float(module.model(ids, torch.ones_like(ids, dtype=torch.bool))[0])
    assert score == pytest.approx(setting.raw_score(module, "May", "A") - sum(raw) / 8, rel=1e-4, abs=1e-6)


def test_without_demonstrations_nothing_is_subtracted(setting: Setting) -> None:
    module, _ = setting.train(setting.pairs)
    assert float(module.model.reward_mean) == 0.0


def test_only_as_many_demonstrations_are_scored_as_asked_for(setting: Setting) -> None:
    """demonstration_rows=2: the mean of the first two."""
    data = {"demonstrations": setting.demonstrations, "demonstration_rows": 2}
    module, _ = setting.train(setting.pairs, data=data)
    raw = [setting.raw_score(module, prompt, answer) for prompt, answer in zip(PROMPTS[:2], ANSWERS[:2], strict=True)]
    assert float(module.model.reward_mean) == pytest.approx(sum(raw) / 2, rel=1e-4)


def test_head_has_the_shape_that_was_asked_for(setting: Setting) -> None:
    """num_layers=3, hidden_dim=7 over a width of 32: 32-7, 7-7, 7-1; input_dim=32 may be said, 77 may not."""
    module, _ = setting.train(setting.pairs, num_layers=3, hidden_dim=7, input_dim=32)
    linear = [layer for layer in module.model.head.layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(32, 7), (7, 7), (7, 1)]
    with pytest.raises(UserError, match=r"stage\.input_dim=77, but the model's hidden state is 32 wide"):
        setting.train(setting.pairs, input_dim=77)


def test_smoothing_centring_and_heads_are_in_the_loss(setting: Setting) -> None:
    """Nothing is trained. Each head's leads z: mean of 0.9 ln(1 + e^-z) + 0.1 ln(1 + e^z), and 0.05 (c + r)^2."""
    module, record = setting.train(setting.pairs, learning_rate=0.0, **EVERYTHING)
    chosen, rejected = setting.pair_scores(module)
    assert chosen.shape == (8, 3)
    lead = chosen - rejected
    bradley_terry = (0.9 * (1 + (-lead).exp()).log() + 0.1 * (1 + lead.exp()).log()).mean()
    centering = (chosen + rejected).square().mean()
    logged = record.numbers[0]
    assert logged["train/centering"] == pytest.approx(float(centering), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(float(bradley_terry + 0.05 * centering), rel=1e-5)
    assert logged["train/accuracy"] == pytest.approx(float((lead.mean(dim=1) > 0).float().mean()))
    assert logged["train/margin"] == pytest.approx(float(lead.mean()), rel=1e-4)
    scores = torch.cat([chosen, rejected])
    spread = (scores - scores.mean(dim=0)).std(dim=1, correction=0).mean()
    assert logged["train/spread"] == pytest.approx(float(spread), rel=1e-4)


def test_heads_learn_ratings_each_by_itself(setting: Setting) -> None:
    """Three heads: the mean of three mean squared errors; the error that is logged is that of their mean."""
    module, record = setting.train(setting.ratings, learning_rate=0.0, num_heads=3)
    scores = torch.stack([setting.raw_scores(module, *row) for row in zip(PROMPTS, ANSWERS, strict=False)])
    rewards = torch.arange(8) / 2
    logged = record.numbers[0]
    assert logged["train/loss"] == pytest.approx(float((scores - rewards[:, None]).square().mean()), rel=1e-5)
    error = (scores.mean(dim=1) - rewards).abs().mean()
    assert logged["train/absolute_error"] == pytest.approx(float(error), rel=1e-5)


def test_what_is_not_asked_for_is_not_logged(setting: Setting) -> None:
    """One head has no spread, and no penalty is no number."""
    _, record = setting.train(setting.pairs)
    assert not {"train/spread", "train/centering"} & record.numbers[0].keys()


@pytest.mark.parametrize("key", [{"num_heads": 2}, {"label_smoothing": 0.2}, {"centering_coef": 0.5}])
def test_every_switch_changes_what_is_learned(setting: Setting, key: dict[str, Any]) -> None:
    """Three epochs from the same weights and seed end at another body."""
    plain, _ = setting.train(setting.pairs, trainer={"max_epochs": 3})
    other, _ = setting.train(setting.pairs, trainer={"max_epochs": 3}, **key)
    weights = dict(plain.model.trunk.named_parameters())
    apart = [float((weights[name] - weight).abs().max()) for name, weight in other.model.trunk.named_parameters()]
    assert max(apart) > 1e-4


def test_centring_pulls_the_scores_to_zero(setting: Setting) -> None:
    """Preferences leave the zero free; a heavy penalty brings the sum of a pair's scores near it."""
    keys = {"trainer": {"max_epochs": 20}, "learning_rate": 1e-2}
    free, held = (setting.train(setting.pairs, centering_coef=coef, **keys)[0] for coef in (0.0, 10.0))
    sums = [sum(setting.pair_scores(module)).abs().mean() for module in (free, held)]
    assert sums[1] < 0.2 * sums[0]


@pytest.mark.parametrize("key", [{"label_smoothing": 0.1}, {"centering_coef": 0.01}])
def test_what_speaks_of_pairs_is_refused_for_ratings(setting: Setting, key: dict[str, float]) -> None:
    """Before any weight is loaded: the source is never asked."""
    ((name, value),) = key.items()
    setting.lm = None
    with pytest.raises(UserError, match=rf"stage\.{name}={value} .* ratings\n  stage\.{name}=0"):
        setting.train(setting.ratings, **key)


@pytest.mark.parametrize(
    "key", [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"centering_coef": -1.0}, {"num_heads": 0}]
)
def test_values_without_a_meaning_are_refused(setting: Setting, key: dict[str, Any]) -> None:
    ((name, value),) = key.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        setting.train(setting.pairs, **key)


def test_each_head_is_centred_by_its_own_mean(setting: Setting) -> None:
    """The mean of the demonstrations under each head alone; afterwards every head gives them 0 on average."""
    data = {"demonstrations": setting.demonstrations}
    module, _ = setting.train(setting.pairs, data=data, learning_rate=1e-2, num_heads=3)
    raw = torch.stack([setting.raw_scores(module, *row) for row in zip(PROMPTS, ANSWERS, strict=False)])
    torch.testing.assert_close(module.model.reward_mean, raw.mean(dim=0), rtol=1e-4, atol=1e-6)  # batched float32
    assert float(module.model.reward_mean.std()) > 1e-3


# resuming


class SaveAtTheEnd(lightning.Callback):
    """Writes a checkpoint before the scores are centered, as ``ModelCheckpoint`` does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("centered", [False, True], ids=["checkpoint-without-mean", "checkpoint-with-mean"])
def test_a_resumed_finished_run_is_centered_like_the_first(
    setting: Setting, tmp_path: Path, heads: int, centered: bool
) -> None:
    """The checkpoint may be written before or after the mean is stored; all weights are equal to the last bit."""
    path, data = tmp_path / "last.ckpt", {"demonstrations": setting.demonstrations}
    keys = {"data": data, "learning_rate": 1e-2, "num_heads": heads}
    setting.callbacks = [] if centered else [SaveAtTheEnd(path)]
    first, _ = setting.train(setting.pairs, **keys)
    if centered:
        first.trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["state_dict"]["model.reward_mean"]
    assert bool(stored.any()) is centered
    setting.callbacks = []
    second, record = setting.train(setting.pairs, resume=path, **keys)
    assert record.batches == []
    assert float(first.model.reward_mean.abs().min()) > 1e-3
    assert_equal(second, first)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_mean_in_the_checkpoint_of_an_unfinished_run_is_not_subtracted_twice(
    setting: Setting, tmp_path: Path, penalty: float
) -> None:
    """Two epochs, with and without a stored mean at the break: equal losses and weights, and one mean at the end.

    The centering penalty depends on where the zero of the scores is, so training has to use the raw scores.
    """
    keys = {"data": {"demonstrations": setting.demonstrations}, "learning_rate": 1e-2, "centering_coef": penalty}
    setting.callbacks = [SaveAtTheEnd(tmp_path / "without.ckpt")]
    first, _ = setting.train(setting.pairs, **keys)
    setting.callbacks = []
    first.trainer.save_checkpoint(tmp_path / "with.ckpt")
    without, expected = setting.train(
        setting.pairs, resume=tmp_path / "without.ckpt", trainer={"max_epochs": 2}, **keys
    )
    held, record = setting.train(setting.pairs, resume=tmp_path / "with.ckpt", trainer={"max_epochs": 2}, **keys)
    assert len(record.numbers) == 1
    assert record.numbers[0]["train/loss"] == expected.numbers[0]["train/loss"]
    assert_equal(held, without)
    raw = [setting.raw_score(held, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=False)]
    assert float(held.model.reward_mean) == pytest.approx(sum(raw) / 8, rel=1e-4)


def test_a_resumed_finished_run_writes_its_report_again(setting: Setting, tmp_path: Path) -> None:
    """The second metrics.json equals the first."""
    setting.callbacks = [SaveAtTheEnd(tmp_path / "last.ckpt")]
    _, first = report_of(setting, setting.pairs, tmp_path / "first")
    setting.callbacks = []
    _, second = report_of(setting, setting.pairs, tmp_path / "second", resume=tmp_path / "last.ckpt")
    assert second == first


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("keys", "demonstrations", "warned"),
    [
        ({}, False, False),
        ({"num_heads": 2}, False, True),
        ({"num_heads": 2}, True, False),
        ({"num_heads": 2, "centering_coef": 0.1}, False, False),
    ],
)
def test_heads_without_a_common_zero_are_warned_about(
    setting: Setting, caplog: pytest.LogCaptureFixture, keys: dict[str, Any], demonstrations: bool, warned: bool
) -> None:
    """Preferences leave each head's zero free: without demonstrations or penalty the spread holds offsets."""
    data = {"demonstrations": setting.demonstrations if demonstrations else None}
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        setting.train(setting.pairs, data=data, **keys)
    assert ("nothing ties the zeros of the 2 heads" in caplog.text) is warned


# the report


def report_of(setting: Setting, train: str, folder: Path, **keys: Any) -> tuple[RewardModule, dict[str, Any]]:
    """Train a little with the training rows as validation rows too; the module and its metrics.json."""
    data = {"val": train, "demonstrations": setting.demonstrations, **keys.pop("data", {})}
    module, _ = setting.train(train, data=data, output=str(folder), learning_rate=1e-2, **keys)
    return module, json.loads((folder / "metrics.json").read_text())


def test_the_report_speaks_of_the_final_weights(setting: Setting, tmp_path: Path) -> None:
    """Accuracy, margin and spread of all eight pairs, each text alone, and the answers' real lengths."""
    module, report = report_of(setting, setting.pairs, tmp_path / "out", num_heads=2)
    chosen, rejected = setting.pair_scores(module)
    lead = (chosen - rejected).mean(dim=1)
    assert (report["kind"], report["count"], report["heads"]) == ("pairs", 8, 2)
    assert report["accuracy"] == pytest.approx(float((lead > 0).float().mean()))
    assert report["margin"] == pytest.approx(float(lead.mean()), rel=1e-4)
    scores = torch.cat([chosen, rejected]) - module.model.reward_mean
    assert report["spread"] == pytest.approx(float(scores.std(dim=1, correction=0).mean()), rel=1e-4)
    count = [len(setting.tokenizer(f" {answer}<eos>", add_special_tokens=False)["input_ids"]) for answer in ANSWERS]
    longer = sum(count[row] > count[row + 1] for row in range(8))
    assert report["longer_chosen"]["count"] == longer
    assert report["by_length"][0]["low"] == min(count)
    assert report["by_length"][-1]["high"] == max(count)


def test_the_report_on_ratings_is_on_the_scale_of_the_data(setting: Setting, tmp_path: Path) -> None:
    """The mean that is subtracted afterwards does not count as an error; nor does it in a later validation."""
    module, report = report_of(setting, setting.ratings, tmp_path / "out")
    assert abs(float(module.model.reward_mean)) > 1e-2
    raw = torch.tensor([setting.raw_score(module, *row) for row in zip(PROMPTS, ANSWERS, strict=False)])
    errors = raw - torch.arange(8) / 2
    assert report["kind"] == "ratings"
    assert report["absolute_error"] == pytest.approx(float(errors.abs().mean()), rel=1e-4)
    (later,) = module.trainer.validate(module, module.trainer.datamodule, verbose=False)
    assert later["val/loss"] == pytest.approx(float(errors.square().mean()), rel=1e-4)


def test_the_report_stands_in_tensorboard(setting: Setting, tmp_path: Path) -> None:
    """Its single numbers, equal to the file's, and one picture."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path, name="board", version="")
    _, report = report_of(setting, setting.pairs, tmp_path / "out", trainer={"logger": logger})
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert events.Tags()["images"] == ["report"]
    for name in ("accuracy", "calibration_error", "length_correlation/pearson"):
        value = report
        for part in name.split("/"):
            value = value[part]
        assert events.Scalars(f"report/{name}")[0].value == pytest.approx(value)


def test_rows_without_report(setting: Setting, tmp_path: Path) -> None:
    """No validation rows, no validation wanted, or a dry run: nothing is written; nor without a folder to write to."""
    for data, trainer in (
        ({}, {}),
        ({"val": setting.pairs}, {"limit_val_batches": 0}),
        ({"val": setting.pairs}, {"fast_dev_run": True}),
    ):
        setting.train(setting.pairs, data=data, trainer=trainer, output=str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    before = set(tmp_path.iterdir())
    setting.train(setting.pairs, data={"val": setting.pairs})
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("limit", "count"), [(1, 3), (2, 6), (0.7, 6), (1.0, 8), (9, 8)])
def test_the_report_reads_as_many_batches_as_validation(
    setting: Setting, tmp_path: Path, limit: float, count: int
) -> None:
    """Eight rows in batches of 3, 3 and 2; 0.7 of three batches are two."""
    _, report = report_of(setting, setting.pairs, tmp_path / "out", trainer={"limit_val_batches": limit})
    assert report["count"] == count
