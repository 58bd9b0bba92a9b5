"""What checks work with: a few rows, other views of the same texts, the stage's own loss and its gradient."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.data import Batch, EncodedResponse, PromptBatch, RecordDataModule, SequenceBatch

if TYPE_CHECKING:  # a stage names its checks, so this cannot know stages
    from rlhf.stage import StageModule

B = TypeVar("B", bound=Batch)
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]  # tokens, mask, answer to numbers, [batch] or [batch, time]
ROWS, AMONG = 8, 300  # rows looked at, of so many at the beginning of the data
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}  # by type of the weights
HALF = 5e-2  # half precision has 2 or 3 digits


def sample_rows(datamodule: RecordDataModule) -> list[Any]:
    """The shortest and the longest of the first training rows, shortest first."""
    rows = sorted(datamodule.encoded("train")[:AMONG], key=datamodule.length)
    return rows if len(rows) <= ROWS else [*rows[: ROWS // 2], *rows[-ROWS // 2 :]]


def micro_batches(rows: list[Any], datamodule: RecordDataModule, count: int = 4) -> list[Batch]:
    """The rows as so many batches of unlike length, or fewer where there are fewer rows."""
    size = -(-len(rows) // count)
    return [datamodule.collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def texts_of(rows: list[Any], datamodule: RecordDataModule) -> SequenceBatch:
    """What rows of any stage say, as one batch of texts; of a prompt, every token but the first counts as answer."""
    batch: Any = datamodule.collate(rows)
    if isinstance(batch, PromptBatch):
        return SequenceBatch.collate([EncodedResponse(input_ids, 1) for input_ids in batch.input_ids])
    return batch if isinstance(batch, SequenceBatch) else batch.sequences


def unpadded_rows(texts: SequenceBatch) -> list[list[int]]:
    """Token ids of each text, without padding."""
    return [row[real].tolist() for row, real in zip(texts.input_ids, texts.attention_mask, strict=True)]


def logprob_measure(policy: Any) -> Measure:
    """Log-probs of a policy, or of one that is frozen."""
    return lambda input_ids, attention_mask, response_mask: policy(input_ids, attention_mask, response_mask).logprobs


def score_measure(model: Any) -> Measure:
    """Scores of a reward model, or of one that is frozen."""
    return lambda input_ids, attention_mask, response_mask: model(input_ids, attention_mask)


def full_precision(module: "StageModule") -> AbstractContextManager[Any]:
    """float32 where the weights are: what is compared then is the arithmetic, not the rounding of mixed precision."""
    return nullcontext() if _dtype(module) in ROUNDING else module.trainer.precision_plugin.forward_context()


def limit_of(module: "StageModule") -> float:
    """Largest difference that rounding explains, relative to 1 + the size of the number."""
    return ROUNDING.get(_dtype(module), HALF)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest ``|found - expected| / (1 + |expected|)``; NaN where either is not a number."""
    if found.shape != expected.shape:
        return float("nan")
    if not found.numel():
        return 0.0
    return float(((found - expected).abs() / (1 + expected.abs())).max())


def response_values(read: Measure, texts: SequenceBatch) -> Tensor:
    """The numbers of the answers' tokens, or of the texts: [tokens] or [batch]."""
    found = read(texts.input_ids, texts.attention_mask, texts.response_mask)
    return found[texts.response_mask] if found.ndim == 2 else found


def alone(texts: SequenceBatch) -> Iterator[SequenceBatch]:
    for row, length in enumerate(texts.attention_mask.sum(dim=1).tolist()):
        input_ids, attention_mask, response_mask = (
            part[row : row + 1, :length] for part in (texts.input_ids, texts.attention_mask, texts.response_mask)
        )
        yield SequenceBatch(input_ids, attention_mask, response_mask)


def pad_columns(texts: SequenceBatch, columns: int) -> SequenceBatch:
    input_ids, attention_mask, response_mask = (
        F.pad(part, (0, columns)) for part in (texts.input_ids, texts.attention_mask, texts.response_mask)
    )
    return SequenceBatch(input_ids, attention_mask, response_mask)


def left_padded(texts: SequenceBatch) -> SequenceBatch:
    """The same texts, padded on the left."""
    time = texts.input_ids.shape[1]
    shift = time - texts.attention_mask.sum(dim=1, keepdim=True)
    place = (torch.arange(time, device=shift.device) - shift) % time
    input_ids, attention_mask, response_mask = (
        part.gather(1, place) for part in (texts.input_ids, texts.attention_mask, texts.response_mask)
    )
    return SequenceBatch(input_ids, attention_mask, response_mask)


def training_loss(module: "StageModule", batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """The loss of the stage's own training step, and the numbers it would have logged."""
    numbers: dict[str, Any] = {}
    silenced = {"log": _ignore, "log_dict": _ignore, "log_train": numbers.update}
    vars(module).update(silenced)
    try:
        return module.training_step(batch, 0), numbers
    finally:
        for name in silenced:
            del vars(module)[name]


def _ignore(*args: Any, **keys: Any) -> None:
    """In place of a method that logs."""


def training_gradient(module: "StageModule", batches: Sequence[Batch]) -> tuple[float, list[Tensor]]:
    """Mean loss of some batches, and its gradient: what accumulating over them gives."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    total, sums = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        loss = training_loss(module, batch)[0] / len(batches)
        total += float(loss.detach())
        for whole, part in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if part is not None:
                whole += part
    return total, sums


def gradient_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """``|found - expected| / |expected|``, norms over all parameters together."""
    apart = nn.utils.get_total_norm([one - other for one, other in zip(found, expected, strict=True)])
    return float(apart / nn.utils.get_total_norm(expected).clamp(min=1e-12))


def corrupt_padding(batch: B) -> B:
    """The same batch with other tokens on its padding, and NaN in every number that stands outside the answers."""
    changes: dict[str, Any] = {}
    for part in fields(batch):
        value = getattr(batch, part.name)
        if isinstance(value, Batch):
            changes[part.name] = corrupt_padding(value)
        elif part.name == "input_ids" and isinstance(value, Tensor):
            real = value[batch.attention_mask]  # type: ignore[attr-defined]
            others = real.flip(0).repeat(-(-value.numel() // len(real)))[: value.numel()].view_as(value)
            changes["input_ids"] = torch.where(batch.attention_mask, value, others)  # type: ignore[attr-defined]
        elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2:
            changes[part.name] = torch.where(batch.response_mask, value, torch.nan)  # type: ignore[attr-defined]
    return replace(batch, **changes)
