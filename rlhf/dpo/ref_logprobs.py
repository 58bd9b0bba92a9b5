"""Log-probs of the data's responses under the reference model, computed once and cached on disk by model and data."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data import EncodedResponse, SequenceBatch
from rlhf.data.lazy import LazySequence
from rlhf.data.rows import RowList, Rows
from rlhf.distributed import gather_objects, get_rank, is_rank_zero, world_size
from rlhf.files import atomic_write
from rlhf.models import adapter_of
from rlhf.models.sharding import full_state_dict

log = logging.getLogger(__name__)


@dataclass
class ReferenceLogprobs:
    """Log-probs of the data's responses under the reference model, on disk by model and data.

    They are computed before training (``fill``), or together with the batches that need them (``attach``, ``add`` and
    ``share``). Those that an earlier run has stored are read from its file.

    Args:
        compute: Function from sequences to [batch] summed log-probs of their responses, in nats.
        batch_size: Responses per forward pass of ``fill``.
        directory: Directory of the cache, with one file per split. None: nothing is cached.
        model_key: Hash of the reference model (see the function ``model_key``), or only its precision and device if
            nothing is cached.
    """

    compute: Callable[[SequenceBatch], Tensor]
    batch_size: int
    directory: Path | None = None
    model_key: str = ""

    def __post_init__(self) -> None:
        self._rows: dict[str, Rows] = {}
        self._values: dict[str, Tensor] = {}  # [rows, responses of a row] of each split; NaN: unknown
        self._keys: dict[str, str] = {}  # what the values of each split depend on
        self._new: list[tuple[str, list[int], Tensor]] = []

    # Before training

    def fill(self, rows: Sequence[Any], split: str) -> None:
        """Set ``ref_logprobs`` of each encoded row to the log-probs of its ``responses``.

        The rows are the ones that the datamodule keeps, so its ``collate`` copies the values into every later batch.
        All ranks call this method with the same rows. Each computes its share, and all get the same values.
        """
        self.attach(rows, split)
        known = self._values[split].flatten()
        unknown = known.isnan().nonzero()[:, 0].tolist()
        if not unknown:
            return
        known[unknown] = self._compute(_Responses(self._rows[split], unknown), split)
        self._set(split)
        self._write(split)

    def _compute(self, responses: "_Responses", split: str) -> Tensor:
        # The longest sequences come first, so that a batch that does not fit into memory fails at once.
        lengths = [len(response.input_ids) for response in responses]
        order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rank, steps = get_rank(), range(0, len(chunks), world_size())
        log.info("Reference log-probs of %s: computing them for %d responses", split, len(responses))
        logprobs = torch.zeros(len(responses))
        for step in track(steps, f"reference log-probs, {split}", transient=True, disable=not is_rank_zero()):
            # All ranks run the same number of forward passes, which are collective operations if the model is sharded.
            chunk = chunks[min(step + rank, len(chunks) - 1)]
            values = self.compute(SequenceBatch.collate([responses[i] for i in chunk])).float().cpu()
            if step + rank < len(chunks):
                logprobs[chunk] = values
        total: Tensor = torch.stack(gather_objects(logprobs)).sum(dim=0)
        return total

    # During training

    def attach(self, rows: Sequence[Any], split: str, state: Mapping[str, Any] | None = None) -> None:
        """Set ``ref_logprobs`` of the encoded rows whose log-probs are known.

        Args:
            rows: The encoded rows of a split.
            split: Its name.
            state: Log-probs of this split from a checkpoint, see ``state_dict``. Those of other rows, or of another
                model, are ignored.
        """
        self._rows[split] = rows if isinstance(rows, Rows) else RowList(list(rows))
        self._keys[split] = self._key(split)
        values = torch.full((len(rows), len(rows[0].responses)), torch.nan)
        if (path := self._path(split)) is not None:
            # Only rank 0 reads the file, so that all ranks agree on what is known.
            stored = gather_objects(_read(path, values.numel()) if is_rank_zero() else None)[0]
            if stored is not None:
                values = stored.view_as(values).clone()
                log.info("Reference log-probs of %s: read from %s", split, path)
        if isinstance(state, Mapping) and state["key"] == self._keys[split]:  # Earlier versions stored tensors.
            values = torch.where(state["logprobs"].isnan(), values, state["logprobs"])
        self._values[split] = values
        self._set(split)

    def add(self, split: str, rows: Sequence[int], values: Tensor) -> None:
        """Remember log-probs that have been computed for a batch. ``share`` makes them known.

        Args:
            split: Name of the split.
            rows: Indices of the rows of the batch.
            values: [rows, responses of a row] the log-probs, in nats, on any device.
        """
        if split in self._rows and rows:
            self._new.append((split, list(rows), values.detach()))

    def share(self) -> None:
        """Give all ranks the log-probs that each of them has added, and store them. All ranks call this method."""
        own = [(split, rows, values.float().cpu()) for split, rows, values in self._new]
        self._new = []
        changed: dict[str, None] = {}  # splits, in an order that is the same on all ranks
        for split, rows, values in chain.from_iterable(gather_objects(own)):
            self._values[split][rows] = values
            changed[split] = None
        for split in changed:
            self._set(split)
            self._write(split)

    @property
    def complete(self) -> bool:
        """Whether the log-probs of all rows are known."""
        return not any(bool(values.isnan().any()) for values in self._values.values())

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each split.

        Returns:
            For each split, ``logprobs``: [rows, responses of a row] in nats, NaN where they are unknown; ``key``: hash
            of what they depend on.
        """
        return {split: {"key": self._keys[split], "logprobs": values} for split, values in self._values.items()}

    def _set(self, split: str) -> None:
        values = self._values[split]

        def known(index: int) -> tuple[float, ...] | None:
            logprobs = values[index].tolist()
            return None if any(map(math.isnan, logprobs)) else tuple(logprobs)

        self._rows[split].extend("ref_logprobs", known)

    def _write(self, split: str) -> None:
        path, logprobs = self._path(split), self._values[split].flatten()
        if path is None or not is_rank_zero():
            return
        # Parallel jobs of a sweep may write the same file.
        atomic_write(path, lambda file: torch.save({"logprobs": logprobs}, file), concurrent=True)
        known = int((~logprobs.isnan()).sum())
        log.info("Reference log-probs of %s: %d of %d stored in %s", split, known, len(logprobs), path)

    def _path(self, split: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{self._keys[split]}.pt"

    def _key(self, split: str) -> str:
        """Return the SHA-256 of the model and the token ids. It depends on their content, not on file paths."""
        digest = hashlib.sha256(self.model_key.encode())
        for part in self._rows[split].content():
            digest.update(part)
        return digest.hexdigest()


class _Responses(LazySequence[EncodedResponse]):
    """Some of the responses of all rows.

    Args:
        rows: The rows, each with the same number of responses.
        indices: Indices into the responses of all rows, one row after the other.
    """

    def __init__(self, rows: Rows, indices: Sequence[int]) -> None:
        self._rows, self._indices, self._per_row = rows, indices, len(rows[0].responses)

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, index: int) -> EncodedResponse:
        row, response_index = divmod(self._indices[index], self._per_row)
        response: EncodedResponse = self._rows[row].responses[response_index]
        return response


def model_key(lm: PreTrainedModel, arithmetic: str) -> str:
    """Return the SHA-256 of a model's weights and configuration. All ranks call this function; rank 0 needs the result.

    Args:
        lm: The model. It may be sharded.
        arithmetic: Precision and device type that it runs with, such as ``bf16-mixed on cuda``.
    """
    settings = {name: value for name, value in lm.config.to_dict().items() if name != "_name_or_path"}
    adapter = adapter_of(lm)  # The weights do not contain its scale.
    lora = None if adapter is None else adapter.lora.overrides()
    digest = hashlib.sha256(json.dumps([arithmetic, settings, lora], sort_keys=True, default=str).encode())
    for name, weight in sorted(full_state_dict(lm).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, count: int) -> Tensor | None:
    """Read log-probs from a cache file, NaN where they are unknown; None if there is no such file or it is invalid."""
    if not path.is_file():
        return None
    try:
        logprobs: Tensor = torch.load(path, weights_only=True)["logprobs"]
        if logprobs.shape != (count,) or bool(logprobs.isinf().any()):
            raise ValueError(f"expected {count} finite values")
    except Exception as error:  # torch.load raises many types of exceptions for invalid files.
        log.warning(
            "%s is not a valid file of reference log-probs (%s). They are computed again.", path, type(error).__name__
        )
        return None
    return logprobs
