"""The supervised stage in Lightning's own loop, for both architectures."""

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers import PROMPTS, Fixed
from rlhf.sft import SFTDataModule, SFTModule

ANSWERS = [
    "May",
    "Nadia Falk, camera, Dunmore, May, 90 euros.",
    "In short, it rains.",
    "90 euros",
    "A",
    "The mayor opened it.",
    "B b",
    "Monday",
]


class Record(lightning.Callback):
    """Keeps the logged numbers of every batch, and the batches."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.numbers: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.numbers.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Setting:
    """Builds and trains a tiny run of 8 demonstrations; every call starts from the same model and seed."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> None:
        self.tokenizer, self.lm, self.rows = tokenizer, lm, folder / "rows.jsonl"
        rows = [{"document": prompt, "target": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(
        self, *, data: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **keys: Any
    ) -> tuple[SFTModule, Record]:
        module, record = (
            SFTModule(policy=Fixed(self.lm), **{"learning_rate": 1e-3, "schedule": "constant", **keys}),
            Record(),
        )
        datamodule = SFTDataModule(
            **{"train": str(self.rows), "val_fraction": 0, "max_length": 96, "batch_size": 8, **(data or {})}
        )
        module.tokenizer = datamodule.tokenizer = self.tokenizer
        lightning.seed_everything(7, verbose=False)
        self.trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            callbacks=[record],
            **{"max_epochs": 1, **(trainer or {})},
        )
        self.trainer.fit(module, datamodule)
        return module, record

    def nll(self, prompt: str, answer: str) -> tuple[list[float], int]:
        """Negative log-likelihoods of all tokens but the first by the bare model, and where the answer begins."""
        opening, text = f"<bos>{prompt}\nSummary:", f"<bos>{prompt}\nSummary: {answer}<eos>"
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = len(self.tokenizer(opening, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = self.lm(ids).logits[0, :-1]
        return F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist(), start - 1


@pytest.fixture
def setting(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> Setting:
    return Setting(tmp_path, tokenizer, lm)


@pytest.mark.parametrize("loss_on", ["answer", "text"])
def test_first_loss_is_the_mean_over_the_tokens_to_learn(setting: Setting, loss_on: str) -> None:
    """Against each text alone through the bare model: answers with their EOS, or everything after BOS."""
    expected: list[float] = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        losses, start = setting.nll(prompt, answer)
        expected += losses[start:] if loss_on == "answer" else losses
    _, record = setting.train(data={"loss_on": loss_on})
    assert record.numbers[0]["train/loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)  # float32
    assert record.batches[0].loss_terms == len(expected)


def test_eos_is_learned_and_padding_is_not(setting: Setting) -> None:
    """Every row's last loss term is its EOS, once, and no term stands on padding."""
    _, record = setting.train()
    batch = record.batches[0]
    assert not (batch.response_mask & ~batch.attention_mask).any()
    assert not batch.attention_mask.all(), "without padding this would show nothing"
    learned = [row[chosen].tolist() for row, chosen in zip(batch.input_ids, batch.response_mask, strict=True)]
    eos = setting.tokenizer.eos_token_id
    assert all(row[-1] == eos and row.count(eos) == 1 for row in learned)


def test_accumulation_is_the_bigger_batch_for_answers_of_different_lengths(setting: Setting) -> None:
    """4 batches of 2 texts make the step that 1 of 8 makes (transformers#35203: a mean of means is another loss).

    AdamW's eps is 1: the first step is then close to lr x gradient, where the usual eps would turn the rounding noise
    of tiny gradients into whole steps. Tolerances are the defaults.
    """
    keys = {"eps": 1.0, "learning_rate": 1.0}
    big, _ = setting.train(trainer={"max_steps": 1}, **keys)
    small, record = setting.train(
        data={"batch_size": 2}, trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **keys
    )
    assert len({batch.loss_terms for batch in record.batches}) > 1
    pairs = zip(big.policy.parameters(), setting.lm.parameters(), strict=True)
    assert max(float((new - old).abs().max()) for new, old in pairs) > 1e-3
    torch.testing.assert_close(small.policy.state_dict(), big.policy.state_dict())


def test_validation_loss_is_the_mean_over_tokens_of_all_batches(setting: Setting) -> None:
    """Batches of 3, 3 and 2 texts are with_loss_weights by their tokens; nothing is trained (learning rate 0)."""
    expected: list[float] = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        losses, start = setting.nll(prompt, answer)
        expected += losses[start:]
    setting.train(data={"val": str(setting.rows), "eval_batch_size": 3}, learning_rate=0.0, max_new_tokens=4)
    assert float(setting.trainer.callback_metrics["val/loss"]) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.slow
def test_it_learns_its_demonstrations(setting: Setting) -> None:
    """60 steps on 8 texts: the loss falls from ln 300 = 5.7 to below 1, and the result answers as it was shown."""
    module, record = setting.train(trainer={"max_epochs": 60}, learning_rate=1e-2)
    assert record.numbers[-1]["train/loss"] < 1.0
    assert record.numbers[-1]["train/token_accuracy"] > 0.8
    assert module.result().model is module.policy.lm
