"""A tiny preference run in Lightning's own loop."""

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers import ANSWERS, PROMPTS, Fixed
from rlhf.data import PreferenceDataModule, UnpairedDataModule
from rlhf.dpo import DPOModule, KTOModule


class Record(lightning.Callback):
    """Keeps the logged numbers of every batch, and whether the data knew the reference's log-probs."""

    def __init__(self) -> None:
        self.numbers: list[dict[str, float]] = []
        self.precomputed: list[bool] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.numbers.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.precomputed.append(batch.ref_logprobs is not None)

    def curve(self, name: str) -> list[float]:
        return [numbers[name] for numbers in self.numbers]


class Setting:
    """Builds and trains a tiny run of 8 pairs; every call starts from the same model and seed."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> None:
        self.tokenizer, self.lm, self.pairs = tokenizer, lm, folder / "pairs.jsonl"
        rows = [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for prompt, chosen, rejected in zip(PROMPTS, ANSWERS, ANSWERS[1:], strict=False)
        ]
        self.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def data(self, *, kto: bool = False, **keys: Any) -> Any:
        """The 8 pairs, or for KTO the 16 answers; without a key they are read in batches of a quarter."""
        kind, size = (UnpairedDataModule, 4) if kto else (PreferenceDataModule, 2)
        keys = {"max_length": 96, "batch_size": size, "eval_batch_size": 3, "val_fraction": 0, **keys}
        data = kind(**{"train": str(self.pairs), **keys})
        data.tokenizer = self.tokenizer
        return data

    def train(
        self,
        *,
        kto: bool = False,
        trainer: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **keys: Any,
    ) -> tuple[Any, Record]:
        """Train by ``stage.*`` keys; the module and what was logged."""
        keys = {"policy": Fixed(self.lm), "beta": 0.1, "learning_rate": 1e-3, "schedule": "constant", **keys}
        module, record = (KTOModule if kto else DPOModule)(**keys), Record()
        datamodule = self.data(kto=kto, **(data or {}))
        module.tokenizer = self.tokenizer
        lightning.seed_everything(7, verbose=False)
        lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[record],
            **{"max_epochs": 1, **(trainer or {})},
        ).fit(module, datamodule)
        return module, record


@pytest.fixture
def setting(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> Setting:
    return Setting(tmp_path, tokenizer, lm)
