"""The LightningDataModule behind every stage: files to records to tokens to batches."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from rlhf.data.batches import Batch
from rlhf.data.encode import Encoder
from rlhf.data.files import read_rows, where
from rlhf.data.loader import BatchLoader, LengthBuckets
from rlhf.data.records import EXPECTED, Prompt, RecordError, RecordParser
from rlhf.errors import UserError
from rlhf.models.tokenizer import chat_template

log = logging.getLogger(__name__)
SHOWN = 5  # errors printed in full
DEFAULT_TEMPLATE = "{prompt}\n\nAnswer:"


class RecordDataModule(lightning.LightningDataModule):
    """Reads the splits of one stage.

    Args:
        train, val, test: a file, or a hub id; null for a split that is not there.
        val_fraction: share of train held out for validation when ``val`` is null.
        splits: names of the splits of a hub data set.
        subset: configuration of a hub data set that has several.
        columns: the data's own names of fields, such as ``{"rejected": "loser"}``; a field that maps to null keeps
            its own name.
        template: text around the prompt, with ``{prompt}`` in it; null: the tokenizer's chat template.
        max_length: longest prompt with answer, tokens; longer ones lose the beginning of the prompt.
        max_rows: rows read of each split; null for all.
        batch_size: rows of a training batch, per device.
        eval_batch_size: rows of a validation batch, per device.
        on_error: ``stop`` at records that cannot be used, or ``skip`` and count them.
        seed: of the order of the batches.
    """

    forms: Sequence[type] = ()  # record types this stage reads, the first that fits is taken
    bucket = True  # put rows of like length into a batch
    whole_batches = False  # leave out the rows that do not fill the last batch of an epoch

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        val_fraction: float = 0.05,
        splits: Mapping[str, str] | None = None,
        subset: str | None = None,
        columns: Mapping[str, str] | None = None,
        template: str | None = None,
        max_length: int = 512,
        max_rows: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        on_error: str = "stop",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.check_choice("on_error", on_error, ("stop", "skip"))
        for name, value in {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_length": max_length - 1,
        }.items():
            if value < 1:
                raise UserError(f"data.{name} is too small to hold anything")
        self.paths = {"train": train, "val": val, "test": test}
        self.val_fraction = val_fraction
        self.splits = dict(splits or {})
        self.subset = subset
        self.parser = RecordParser(dict(columns or {}))
        self.template = template
        self.max_length = max_length
        self.max_rows = max_rows
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.on_error = on_error
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._records: dict[str, list[Any]] = {}
        self._rows: dict[str, list[Any]] = {}
        self._place: dict[str, int] | None = None  # where in an epoch a resumed run goes on

    @staticmethod
    def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
        """Refuse a word that a key does not know."""
        if value not in choices:
            raise UserError(f"data.{key}={value} is none of {', '.join(choices)}", f"data.{key}={choices[0]}")

    # files to records

    def records(self, split: str) -> list[Any]:
        """The records of ``train``, ``val`` or ``test``, in file order; none where the split has no file."""
        if split == "val" and self.paths["val"] is None:
            self.records("train")  # which holds some out
        if split not in self._records:
            self._records[split] = self._read(split)
            if split == "train" and self._records[split] and self.paths["val"] is None and self.val_fraction > 0:
                self._hold_out()
        return self._records[split]

    def _require(self, split: str) -> None:
        if self.paths[split] is None:
            raise UserError(f"data.{split} names no file, and this stage reads it", f"data.{split}=<file>")

    def training_texts(self) -> Iterator[str]:
        """What the training records say, to train a tokenizer on."""
        self._require("train")
        for record in self.records("train"):
            yield from self.texts_of_record(record)

    def texts_of_record(self, record: Any) -> Sequence[str]:
        return [*(message["content"] for message in record.prompt.messages), " " + record.response]

    def _read(self, split: str) -> list[Any]:
        path = self.paths[split]
        if path is None:
            return []
        rows = read_rows(path, split=self.splits.get(split, split), subset=self.subset)
        count = len(rows) if self.max_rows is None else min(self.max_rows, len(rows))
        records, errors = [], []
        form = self._form(rows[0]) if count else self.forms[0]
        for number in range(count):
            try:
                records.append(self.parser.read(rows[number], form))
            except RecordError as error:
                errors.append((number, error))
        if errors:
            self._report(path, rows, errors, form)
        if not records:
            raise UserError(f"{path}: no record that can be used", f"expected form: {EXPECTED[form]}")
        log.info("%s: %d records read, %d dropped", path, len(records), len(errors))
        return records

    def _form(self, row: Mapping[str, Any]) -> type:
        for form in self.forms:
            try:
                self.parser.read(row, form)
                return form
            except RecordError:
                continue
        return self.forms[0]

    def _report(self, path: str, rows: Any, errors: list[tuple[int, RecordError]], form: type) -> None:
        shown = [f"{where(path, number)}: {error}." for number, error in errors[:SHOWN]]
        if self.on_error == "skip":
            log.warning("%s: %d records dropped, the first: %s", path, len(errors), shown[0])
            return
        if len(errors) > SHOWN:
            shown.append(f"... and {len(errors) - SHOWN} more of {len(rows)} records.")
        hints = []
        if missing := errors[0][1].missing:
            row = rows[errors[0][0]]
            other = [
                key
                for key in row
                if row[key] is not None and key not in ("prompt", "document", "target", "chosen", "rejected")
            ]
            hints.append(f"If the column only has another name: data.columns.{missing}={(other or ['<name>'])[-1]}")
        hints.append(f"Expected form: {EXPECTED[form]}")
        hints.append("To leave such records out: data.on_error=skip")
        raise UserError("\n".join(shown), "\n  ".join(hints))

    def _hold_out(self) -> None:
        records = self._records["train"]
        count = min(int(len(records) * self.val_fraction + 0.5), len(records) - 1)
        chosen = set(random.Random(self.seed).sample(range(len(records)), count))
        self._records["val"] = [record for i, record in enumerate(records) if i in chosen]
        self._records["train"] = [record for i, record in enumerate(records) if i not in chosen]
        log.info("%d records of %s held out for validation", count, self.paths["train"])

    # records to tokens

    def encode(self, encoder: Encoder, record: Any) -> Any:
        """One record as tokens; None for a record that cannot be used at this length."""
        raise NotImplementedError

    def length(self, row: Any) -> int:
        """Tokens of an encoded row, for batches of like length."""
        raise NotImplementedError

    def collate(self, rows: list[Any]) -> Batch:
        raise NotImplementedError

    def encoder(self) -> Encoder:
        """The encoder of this stage's tokenizer and template."""
        assert self.tokenizer is not None, "run.py sets the tokenizer before fit"
        if self.template is not None or not self.tokenizer.chat_template:
            self.tokenizer.chat_template = chat_template(self.template or DEFAULT_TEMPLATE)
        return Encoder(self.tokenizer, self.max_length)

    def encoded(self, split: str) -> list[Any]:
        """The rows of a split as tokens, made once."""
        if split not in self._rows:
            encoder, records = self.encoder(), self.records(split)
            coded = [
                self.encode(encoder, record)
                for record in track(records, f"encoding {split}", transient=True, disable=len(records) < 2000)
            ]
            self._rows[split] = [row for row in coded if row is not None]
            if records:
                cuts = {what: encoder.counts[what] for what in ("prompts cut", "answers cut")}
                log.info(
                    "%s: %d rows, %d dropped, %d prompts and %d answers cut to %d tokens",
                    self.paths[split] or split,
                    len(self._rows[split]),
                    len(coded) - len(self._rows[split]),
                    *cuts.values(),
                    self.max_length,
                )
                if not self._rows[split]:
                    raise UserError(
                        f"{self.paths[split]}: no record fits into data.max_length={self.max_length} tokens",
                        f"data.max_length={2 * self.max_length}",
                    )
        return self._rows[split]

    def setup(self, stage: str) -> None:
        if needed := {"fit": "train", "test": "test"}.get(stage):
            self._require(needed)
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            self.encoded(split)

    def samples(self, count: int, room: int = 64) -> list[tuple[list[int], Prompt]]:
        """Some validation prompts, as tokens and as records, to be answered and looked at.

        ``room`` tokens of max_length are kept free for the answer, but at most half of it.
        """
        room = min(room, self.max_length // 2)
        encoder, records = self.encoder(), (self.records("val") or self.records("train"))[:count]
        prompts = [record if isinstance(record, Prompt) else record.prompt for record in records]
        return [(encoder.encode_prompt(prompt.messages, room=room), prompt) for prompt in prompts]

    # tokens to batches

    def loader(self, split: str, *, training: bool = False) -> BatchLoader:
        trainer = self.trainer
        rows = self.encoded(split)
        batches = LengthBuckets(
            [self.length(row) for row in rows],
            self.batch_size if training else self.eval_batch_size,
            shuffle=training,
            bucket=self.bucket,
            seed=self.seed,
            whole_only=training and self.whole_batches,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
        per_step = trainer.accumulate_grad_batches if trainer and training else 1
        loader = BatchLoader(rows, self.collate, batches, per_step)
        if training and self._place is not None:
            loader.load_state_dict(self._place)
            self._place = None
        return loader

    def train_dataloader(self) -> Any:
        return self.loader("train", training=True)

    # The place within an epoch travels with the datamodule: Lightning keeps it for loaders too, but loses it wherever
    # the number of steps, which schedules need, is asked for before the checkpoint is read.

    def state_dict(self) -> dict[str, Any]:
        loader: Any = self.trainer.train_dataloader if self.trainer else None
        return {"train": loader.state_dict()} if loader is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._place = state["train"]

    def val_dataloader(self) -> Any:
        return self.loader("val") if self.records("val") else []

    def test_dataloader(self) -> Any:
        return self.loader("test")
