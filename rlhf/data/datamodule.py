"""Base class of the data modules of all stages: records to token ids to batches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning
from transformers import PreTrainedTokenizerBase

from rlhf.data.batches import Batch
from rlhf.data.cache import DataCache
from rlhf.data.encode import Encoder
from rlhf.data.encode_split import encode_split
from rlhf.data.files import locations
from rlhf.data.loader import BatchLoader, BucketBatchSampler
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader, hold_out
from rlhf.data.records import Prompt, Record, prompt_of
from rlhf.data.report import report_encoded, report_held_out
from rlhf.data.rows import Rows
from rlhf.errors import ConfigError
from rlhf.schema import DataPath, FractionBelowOne, PositiveInt, Seed, check_arguments
from rlhf.tokenizer.probe import check_template
from rlhf.tokenizer.templates import chat_template

DEFAULT_TEMPLATE = "{prompt}\n\nAnswer:"


class RecordDataModule(lightning.LightningDataModule):
    """Reads, encodes and loads the data of one stage.

    A subclass sets ``record_types`` and implements ``encode``, ``length`` and ``collate``. The rows of a
    data module are the objects that its ``encode`` returns.

    Args:
        train: Training data: a file or the ID of a Hub dataset; null for none.
        val: Validation data, like ``train``; null to hold out a fraction of the training data.
        test: Test data, like ``train``; null for none.
        val_fraction: Fraction of the training records to hold out for validation if ``val`` is null.
        splits: Split names of a Hub dataset, such as ``{"val": "test"}``; slices such as ``train[:1000]`` are allowed.
        subset: Configuration name of a Hub dataset that has several.
        columns: Column names that differ from the field names, such as ``{"rejected": "loser"}``. A field that maps to
            null has a column of the same name. An optional field that maps to an empty text is ignored.
        template: Text around the prompt, with ``{prompt}`` in it; null for the tokenizer's chat template. It becomes
            the chat template of the tokenizer, so exported models have it as well.
        max_length: Maximum length of prompt and response together, in tokens. Longer sequences lose the beginning of
            the prompt.
        max_rows: Maximum number of rows to read from each split; null for all.
        batch_size: Rows per training batch and device.
        eval_batch_size: Rows per validation or test batch and device.
        on_error: What to do with rows that are not valid records: ``stop``, or ``skip`` and count them.
        seed: Seed of the batch order and of the held-out records.
        cache_dir: Directory where the token ids of 2,000 rows or more are stored, by the content of the data and of the
            tokenizer, so that the next run reads them; null: they are not stored.
        tokenizer: Tokenizer that encodes the records; None for the tokenizer of the LightningModule.
    """

    record_types: Sequence[type[Record]] = ()  # the first one that fits the first row is used
    bucket_by_length = True  # put rows of similar length into one batch
    drop_last = False  # leave out the rows that do not fill the last batch of an epoch

    def __init__(
        self,
        *,
        train: DataPath | None = None,
        val: DataPath | None = None,
        test: DataPath | None = None,
        val_fraction: FractionBelowOne = 0.05,
        splits: Mapping[str, str] | None = None,
        subset: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        template: str | None = None,
        max_length: Annotated[int, ">= 2"] = 512,
        max_rows: PositiveInt | None = None,
        batch_size: PositiveInt = 16,
        eval_batch_size: PositiveInt = 64,
        on_error: Literal["stop", "skip"] = "stop",
        seed: Seed = 0,
        cache_dir: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        check_arguments(RecordDataModule, "data", locals())
        self.paths = {"train": train, "val": val, "test": test}
        self.val_fraction = val_fraction
        self.reader = RecordReader(RecordParser(dict(columns or {})), dict(splits or {}), subset, max_rows, on_error)
        self.template = template
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.tokenizer = tokenizer
        self.cache = DataCache(Path(cache_dir)) if cache_dir is not None else None
        self._records: dict[str, Sequence[Any]] = {}
        self._rows: dict[str, Rows] = {}
        self._loader_state: dict[str, Any] | None = None  # of the checkpoint that training resumes from
        self._common_attributes = set(vars(self))

    # Hooks of a subclass

    def encode(self, encoder: Encoder, record: Any) -> Any:
        """Encode a record as a row, or return None if it cannot be used with this ``max_length``."""
        raise NotImplementedError

    def length(self, row: Any) -> int:
        """Return the length of a row in tokens, by which batches are bucketed."""
        raise NotImplementedError

    def collate(self, rows: list[Any]) -> Batch:
        """Make a batch of rows."""
        raise NotImplementedError

    def texts_of_record(self, record: Any) -> Sequence[str]:
        """Return the texts of a record on which a tokenizer is trained."""
        return [*(message["content"] for message in record.prompt.messages), " " + record.response]

    # Records

    def records(self, split: str) -> Sequence[Any]:
        """Return the records of ``train``, ``val`` or ``test`` in file order; an empty list if there are no data."""
        if split == "val" and self.paths["val"] is None:
            self.records("train")  # holds out the validation records
        if split not in self._records:
            path = self.paths[split]
            self._records[split] = (
                self.reader.read(path, split, self.record_types, self.cache) if path is not None else []
            )
            if split == "train" and self._records[split] and self.paths["val"] is None and self.val_fraction > 0:
                train, val = hold_out(self._records["train"], self.val_fraction, self.seed)
                self._records.update(train=train, val=val)
                report_held_out(str(path), len(train) + len(val), len(val), self.val_fraction)
        return self._records[split]

    def training_texts(self) -> Iterator[str]:
        """Yield the texts of all training records, to train a tokenizer on."""
        self._require("train")
        for record in self.records("train"):
            yield from self.texts_of_record(record)

    def _require(self, split: str) -> None:
        if self.paths[split] is None:
            raise ConfigError(
                f"data.{split} must be a file or a Hub dataset for this stage.", f"Set data.{split}=<file>"
            )

    # Rows

    def setup(self, stage: str) -> None:
        if needed := {"fit": "train", "test": "test"}.get(stage):
            self._require(needed)
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            self.encoded(split)

    @property
    def module(self) -> Any:
        """The LightningModule that the Trainer runs with these data; None without a Trainer."""
        return self.trainer.lightning_module if self.trainer else None

    def encoder(self) -> Encoder:
        """Return a new encoder with the tokenizer and the template of this stage."""
        if self.tokenizer is None:
            self.tokenizer = getattr(self.module, "tokenizer", None)
        if self.tokenizer is None:
            raise ConfigError(
                "The data module needs a tokenizer, and neither it nor the LightningModule has one.",
                "Pass a tokenizer to the data module or to the module of the stage.",
            )
        if self.template is not None or not self.tokenizer.chat_template:
            self.tokenizer.chat_template = chat_template(self.template or DEFAULT_TEMPLATE)
        check_template(self.tokenizer)
        return Encoder(self.tokenizer, self.max_length)

    def encode_settings(self) -> dict[str, Any]:
        """Return what ``encode`` depends on in addition to the record, the tokenizer and ``max_length``.

        These are the attributes of a subclass whose names do not begin with an underscore. Encoded rows are stored on
        disk only if all values can be written as JSON.
        """
        names = vars(self).keys() - self._common_attributes - {"trainer"}
        return {name: vars(self)[name] for name in names if not name.startswith("_")}

    def encoded(self, split: str) -> Rows:
        """Return the encoded rows of a split. They are computed once."""
        if split not in self._rows:
            self._rows[split], summary = encode_split(self, split)
            if self.records(split):
                report_encoded(self, split, summary)
        return self._rows[split]

    def sample_prompts(
        self, count: int, response_budget: int = 64, max_length: int | None = None
    ) -> list[tuple[list[int], Prompt]]:
        """Return the first validation prompts as token ids and records; training prompts if there is no validation.

        Args:
            count: Number of different prompts.
            response_budget: Tokens of ``max_length`` to reserve for the response, at most half of ``max_length``.
            max_length: Maximum length of prompt and response together, in tokens, if it is shorter than that of the
                data.
        """
        length = min(self.max_length, max_length or self.max_length)
        reserve = self.max_length - length + min(response_budget, length // 2)
        encoder, records = self.encoder(), self.records("val") or self.records("train")
        unique: dict[str, Prompt] = {}
        for record in records:
            if len(unique) == count:
                break
            prompt = prompt_of(record)
            unique.setdefault(prompt.raw_text, prompt)
        prompts = unique.values()
        return [(encoder.encode_prompt(prompt.messages, reserve=reserve), prompt) for prompt in prompts]

    # Batches

    def loader(self, split: str, *, training: bool = False) -> BatchLoader:
        """Return a loader for this rank's rows of a split, shuffled and resumable if ``training``."""
        trainer = self.trainer
        rows = self.encoded(split)
        batches = BucketBatchSampler(
            rows.lengths,
            self.batch_size if training else self.eval_batch_size,
            shuffle=training and not (trainer and trainer.overfit_batches),  # type: ignore[attr-defined]
            bucket=self.bucket_by_length,
            seed=self.seed,
            drop_last=training and self.drop_last,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
        per_step = trainer.accumulate_grad_batches if trainer and training else 1
        loader = BatchLoader(rows, self.collate, batches, per_step, rows.numbers)
        if training and self._loader_state is not None:
            loader.load_state_dict(self._loader_state)
            self._loader_state = None
        return loader

    def locations(self, batch: Batch) -> list[str]:
        """Return where the rows of a training batch are in the data: ``file:line``, or ``file, row n``."""
        path = self.paths["train"]
        return locations(path, [row for row in batch.rows if row is not None]) if path is not None else []

    def train_dataloader(self) -> Any:
        return self.loader("train", training=True)

    def val_dataloader(self) -> Any:
        return self.loader("val") if self.records("val") else []

    def test_dataloader(self) -> Any:
        return self.loader("test")

    # The position within an epoch is saved here. Lightning saves the state of loaders as well, but loses it if the
    # number of steps, which learning rate schedules need, is computed before the checkpoint is read.

    def state_dict(self) -> dict[str, Any]:
        loader: Any = self.trainer.train_dataloader if self.trainer else None
        return {"train": loader.state_dict()} if loader is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader_state = state["train"]
        loader: Any = self.trainer.train_dataloader if self.trainer else None
        if loader is not None:  # A sharded run is restored after the loader has been made.
            loader.load_state_dict(self._loader_state)
            self._loader_state = None
