"""Log-probs of the data's responses under the reference model, computed once and cached on disk by model and data."""

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data import EncodedResponse, SequenceBatch
from rlhf.distributed import gather_objects, get_rank, is_rank_zero, world_size
from rlhf.files import atomic_write
from rlhf.models import adapter_of
from rlhf.models.sharding import full_state_dict

log = logging.getLogger(__name__)


@dataclass
class ReferenceLogprobs:
    """Computes log-probs of responses under the reference model, or reads them from the cache of an earlier run.

    Args:
        compute: Function from sequences to [batch] summed log-probs of their responses, in nats.
        batch_size: Responses per forward pass.
        directory: Directory of the cache, with one file per split. None: nothing is cached.
        model_key: Identifies the reference model, see ``model_key``.
    """

    compute: Callable[[SequenceBatch], Tensor]
    batch_size: int
    directory: Path | None = None
    model_key: str = ""

    def fill(self, rows: Sequence[Any], split: str) -> None:
        """Set ``ref_logprobs`` of each encoded row to the log-probs of its ``responses``.

        The rows are the ones that the datamodule keeps, so its ``collate`` copies the values into every later batch.
        """
        responses = [response for row in rows for response in row.responses]
        values = iter(self.logprobs(responses, split).tolist())
        for row in rows:
            row.ref_logprobs = tuple(next(values) for _ in row.responses)

    def logprobs(self, responses: Sequence[EncodedResponse], split: str) -> Tensor:
        """Return the log-probs of responses, from the cache if possible: [responses], in nats.

        All ranks call this method with the same responses. Each computes its share, and all return the same values.
        """
        path = None
        if self.directory is not None and is_rank_zero():
            path = self.directory / f"{self._key(responses)}.pt"
        # Only rank 0 reads the file, so that all ranks agree on whether there is a valid one.
        cached = gather_objects(None if path is None else _read(path, len(responses)))[0]
        if cached is not None:
            log.info("Reference log-probs of %s: read from %s", split, path)
            return cached
        logprobs = self._compute(responses, split)
        if path is not None:
            # Parallel jobs of a sweep may write the same file.
            atomic_write(path, lambda file: torch.save({"logprobs": logprobs}, file), concurrent=True)
            log.info("Reference log-probs of %s: computed and stored in %s", split, path)
        return logprobs

    def _compute(self, responses: Sequence[EncodedResponse], split: str) -> Tensor:
        # The longest sequences come first, so that a batch that does not fit into memory fails at once.
        order = sorted(range(len(responses)), key=lambda i: len(responses[i].input_ids), reverse=True)
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

    def _key(self, responses: Sequence[EncodedResponse]) -> str:
        """Return the SHA-256 of the model and the token ids. It depends on their content, not on file paths."""
        digest = hashlib.sha256(self.model_key.encode())
        for response in responses:
            digest.update(array("q", [len(response.input_ids), response.start, *response.input_ids]).tobytes())
        return digest.hexdigest()


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
    """Read log-probs from a cache file; None if there is no such file or it is invalid."""
    if not path.is_file():
        return None
    try:
        logprobs: Tensor = torch.load(path, weights_only=True)["logprobs"]
        if logprobs.shape != (count,) or not bool(logprobs.isfinite().all()):
            raise ValueError(f"expected {count} finite values")
    except Exception as error:  # torch.load raises many types of exceptions for invalid files.
        log.warning(
            "%s is not a valid file of reference log-probs (%s). They are computed again.", path, type(error).__name__
        )
        return None
    return logprobs
