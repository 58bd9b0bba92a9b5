"""The reference model of preference stages, and its log-probs of the data."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from rlhf.data import RecordDataModule, SequenceBatch
from rlhf.data.labeled_batches import LabeledBatch
from rlhf.dpo.ref_logprobs import ReferenceLogprobs, model_key
from rlhf.errors import ConfigError
from rlhf.models import Frozen, Policy, allows_shared_prompts, open_reference
from rlhf.schema import has_default, to_text
from rlhf.stage import StageModule
from rlhf.stage.precision import move_frozen
from rlhf.stage.random_state import separate_random_state

SPLITS = ("train", "val")


class ReferenceModule(StageModule):
    """A stage with a frozen reference model, whose log-probs of the data are computed once.

    Args:
        reference_free: Train without a reference model. The loss then reads log-probs instead of log-ratios.
        precompute_ref_logprobs: When the reference model's log-probs of the data are computed. ``lazy``: when a batch
            first needs them; later epochs reuse them. true: those of all rows before training. In both cases, the
            memory of the reference model is then freed, and the data must be a ``RecordDataModule``. false: at every
            step.
        ref_logprobs_cache: Directory where these log-probs are stored, keyed by model and data, so that the runs of a
            sweep compute them once. null: they are not stored.
        optimizer: Further keywords of ``StageModule``.

    Attributes:
        policy: The policy.
        reference: The reference model; None without one, and after its memory has been freed.
    """

    policy: Policy

    def __init__(
        self,
        *,
        reference_free: bool = False,
        precompute_ref_logprobs: bool | Literal["lazy"] = "lazy",
        ref_logprobs_cache: str | None = None,
        **optimizer: Any,
    ) -> None:
        super().__init__(**optimizer)
        if reference_free and not has_default(ReferenceModule, "precompute_ref_logprobs", precompute_ref_logprobs):
            raise ConfigError(
                f"stage.precompute_ref_logprobs={to_text(precompute_ref_logprobs)} has no effect with "
                "stage.reference_free=true.",
                "Set stage.reference_free=false or remove stage.precompute_ref_logprobs.",
            )
        self.reference_free = reference_free
        self.precompute_ref_logprobs = precompute_ref_logprobs
        self.ref_logprobs_cache = ref_logprobs_cache
        self.reference: Frozen | None = None
        self._known: ReferenceLogprobs | None = None
        self._known_data: RecordDataModule | None = None
        self._checkpointed: Mapping[str, Any] = {}  # log-probs in the checkpoint that training resumes from

    def open_reference(self) -> Frozen:
        """Open the reference model."""
        reference = open_reference(self.source, self.tokenizer)
        allows_shared_prompts(reference.lm.base_model)
        return Frozen(reference)

    @contextmanager
    def opened_reference(self) -> Iterator[Frozen]:
        """Give access to the reference model. If it has been freed, it is opened again until the context ends."""
        if self.reference is not None:
            yield self.reference
            return
        with separate_random_state(0), torch.device("cpu"):
            reference = self.open_reference()
        yield move_frozen(self, reference)

    # Log-probs

    def fill_ref_logprobs(self, batch: LabeledBatch, split: str | None = None) -> None:
        """Compute the reference log-probs that a batch does not contain.

        Args:
            batch: A batch of the datamodule. Its fields are set.
            split: The split of the datamodule that its rows are from. None: the log-probs are not remembered.
        """
        inputs = {} if self.reference_free else batch.scored_by_reference()
        unknown = [name for name in inputs if getattr(batch, name) is None]
        for name in unknown:
            setattr(batch, name, self.compute_ref_logprobs(inputs[name]))
        if unknown and self._known is not None and split is not None and self._is_known() and not batch.is_filler:
            values = torch.cat([getattr(batch, name) for name in inputs])
            self._known.add(split, batch.indices, values.view(-1, batch.row_count).T)

    def _is_known(self) -> bool:
        """Return whether the datamodule in use is the one whose log-probs are collected."""
        return getattr(self.trainer, "datamodule", None) is self._known_data

    @torch.no_grad()
    def compute_ref_logprobs(self, sequences: SequenceBatch) -> Tensor:
        """Compute the summed log-probs of responses under the reference model: [batch], in nats."""
        if self.reference is None:
            raise ConfigError(
                "stage.precompute_ref_logprobs must be false for these data: the reference model was freed when its "
                "log-probs of the training data were known, and these are different data.",
                "Set stage.precompute_ref_logprobs=false.",
            )
        sequences = sequences.to(self.device)
        with self.trainer.precision_plugin.forward_context():
            logprobs: Tensor = self.reference(**sequences.inputs).logprobs.sum(dim=1)
            return logprobs

    # Hooks

    def on_fit_start(self) -> None:
        """Read the log-probs that are known, or compute all of them before training."""
        data = getattr(self.trainer, "datamodule", None)
        if self.reference is None or not self.precompute_ref_logprobs or not isinstance(data, RecordDataModule):
            return
        self._known, self._known_data = self._ref_logprobs(data, self.reference), data
        # All ranks of a sharded model must compute the same batches, which they do before training only.
        is_sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        for split in SPLITS:
            if data.records(split):
                if self.precompute_ref_logprobs == "lazy" and not is_sharded:
                    self._known.attach(data.encoded(split), split, self._checkpointed.get(split))
                else:
                    self._known.fill(data.encoded(split), split)
        if not is_sharded:  # A sharded model cannot be opened again.
            self._free_reference()

    def _ref_logprobs(self, data: RecordDataModule, reference: Frozen) -> ReferenceLogprobs:
        arithmetic = f"{self.trainer.precision} on {self.device.type}"
        directory, key = None, arithmetic
        if self.ref_logprobs_cache is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            model: Any = reference.model
            directory, key = Path(self.ref_logprobs_cache), model_key(model.lm, arithmetic)
        return ReferenceLogprobs(self.compute_ref_logprobs, data.eval_batch_size, directory, key)

    def _free_reference(self) -> None:
        """Free the memory of the reference model if the log-probs of all rows are known."""
        if self.reference is not None and self._known is not None and self._known.complete:
            self.reference = None
            gc.collect()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self._known is not None:
            self._known.share()

    def on_train_epoch_end(self) -> None:
        if self._known is not None:
            self._known.share()
            self._free_reference()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._known is not None:
            self._known.share()
            checkpoint["ref_logprobs"] = self._known.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._checkpointed = checkpoint.get("ref_logprobs") or {}
