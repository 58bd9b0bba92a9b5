"""The reward model's stage in Lightning's own loop, for both architectures."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers import PROMPTS, Fixed
from rlhf.data import PairBatch, RatingBatch
from rlhf.errors import UserError
from rlhf.reward import RewardDataModule, RewardModule

ANSWERS = [
    "May", "Nadia Falk, camera, Dunmore, May, 90 euros.", "In short, it rains.", "90 euros", "A",
    "The mayor opened it.", "B b", "Monday", "children, weather",
]  # fmt: skip


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
        self, train: str, *, data: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **keys: Any
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
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, callbacks=[record],
            **{"max_epochs": 1, **(trainer or {})},
        ).fit(module, datamodule)  # fmt: skip
        return module, record

    @torch.no_grad()
    def raw_score(self, module: RewardModule, prompt: str, answer: str) -> float:
        """The head's number at the last token of one text alone, without the mean that is subtracted."""
        text = f"<bos>{prompt}\nSummary: {answer}<eos>"
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        hidden = module.model.trunk(input_ids=ids, use_cache=False).last_hidden_state
        return float(module.model.head(hidden[0, -1]))


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


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_accumulation_is_the_bigger_batch(setting: Setting, kind: str) -> None:
    """3 batches of 3, 3 and 2 rows make the step that 1 of 8 makes: the last batch weighs less.

    AdamW's eps is 1: the first step is then close to lr x gradient, where the usual eps would turn the rounding noise
    of tiny gradients into whole steps. Tolerances are the defaults.
    """
    train, keys = getattr(setting, kind), {"eps": 1.0, "learning_rate": 0.1}
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
