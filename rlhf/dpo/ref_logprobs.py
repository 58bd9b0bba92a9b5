"""Log-probs of the data's answers under the reference: computed once, kept on disk, found again by what made them."""

import hashlib
import json
import logging
import os
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

log = logging.getLogger(__name__)


@dataclass
class ReferenceLogprobs:
    """Scores answers with the reference, or reads from disk what an earlier run scored.

    Args:
        score: texts to [batch] summed log-probs of their answers, nats.
        batch_size: answers scored at once.
        folder: where results are kept, a file a data split; null: nowhere.
        model_key: what names the scoring model, see ``model_key``.
    """

    score: Callable[[SequenceBatch], Tensor]
    batch_size: int
    folder: Path | None = None
    model_key: str = ""

    def fill(self, rows: Sequence[Any], split: str) -> None:
        """Give each row the log-probs of its ``answers``, as its ``reference``."""
        answers = [answer for row in rows for answer in row.responses]
        values = iter(self.of(answers, split).tolist())
        for row in rows:
            row.ref_logprobs = tuple(next(values) for _ in row.responses)

    def of(self, answers: Sequence[EncodedResponse], split: str) -> Tensor:
        """[answers] log-probs, nats, from disk if they lie there."""
        if self.folder is None:
            return self._compute(answers, split)
        path = self.folder / f"{self._key(answers)}.pt"
        logprobs = _read(path, len(answers))
        if logprobs is not None:
            log.info("reference log-probs, %s: read from %s", split, path)
            return logprobs
        logprobs = self._compute(answers, split)
        _write(logprobs, path)
        log.info("reference log-probs, %s: computed, kept in %s", split, path)
        return logprobs

    def _compute(self, answers: Sequence[EncodedResponse], split: str) -> Tensor:
        """Longest first, so that a batch too large shows at once."""
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].input_ids), reverse=True)
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        logprobs = torch.zeros(len(answers))
        for part in track(parts, f"reference log-probs, {split}", transient=True, disable=not parts):
            logprobs[part] = self.score(SequenceBatch.collate([answers[i] for i in part])).float().cpu()
        return logprobs

    def _key(self, answers: Sequence[EncodedResponse]) -> str:
        """SHA-256 of model and tokens: of what the numbers depend on, and not of where it lay."""
        digest = hashlib.sha256(self.model_key.encode())
        for answer in answers:
            digest.update(array("q", [len(answer.input_ids), answer.start, *answer.input_ids]).tobytes())
        return digest.hexdigest()


def model_key(lm: PreTrainedModel, arithmetic: str) -> str:
    """SHA-256 of a model's weights and configuration and of what it is run with, such as ``bf16-mixed on cuda``."""
    settings = {name: value for name, value in lm.config.to_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(json.dumps([arithmetic, settings], sort_keys=True, default=str).encode())
    for name, weight in sorted(lm.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, count: int) -> Tensor | None:
    """The log-probs that lie there; None for no file, or one that is broken."""
    if not path.is_file():
        return None
    try:
        logprobs = torch.load(path, weights_only=True)["logprobs"]
        if logprobs.shape != (count,) or not bool(logprobs.isfinite().all()):
            raise ValueError(f"{count} finite numbers expected")
    except Exception as error:  # a broken file shows itself in many ways
        log.warning("%s: not a whole file of log-probs (%s); they are computed again", path, type(error).__name__)
        return None
    return logprobs


def _write(logprobs: Tensor, path: Path) -> None:
    """Written beside its place and renamed: jobs side by side never read half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    torch.save({"logprobs": logprobs}, beside)
    os.replace(beside, path)
