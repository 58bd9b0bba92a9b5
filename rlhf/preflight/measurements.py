"""Building blocks of checks: sample rows, differently padded views of a batch, measurements, and gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.data import Batch, EncodedResponse, PromptBatch, RecordDataModule, SequenceBatch
from rlhf.models import Frozen, Policy, ScalarModel, frozen_in_float32, is_sharded
from rlhf.stage import StageModule

B = TypeVar("B", bound=Batch)
# (input_ids, attention_mask, response_mask) -> values, [batch] or [batch, time]
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
SAMPLE_ROWS, CANDIDATE_ROWS = 8, 300  # Rows that checks use, chosen from this many at the beginning of the data.
SAMPLE_TOKENS = 96  # Checks prefer rows of at most this length, in tokens: they take much time with large models.
FULL_PRECISION = (torch.float32, torch.float64)
# Largest relative differences that are attributed to rounding. Half precision has two or three significant digits.
FULL_PRECISION_TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-4, 5e-2


# Rows and batches


def sample_rows(datamodule: RecordDataModule, count: int = SAMPLE_ROWS) -> list[Any]:
    """Return rows of different lengths among the first encoded training rows, shortest first.

    These are the shortest rows, and the longest ones that have at most ``SAMPLE_TOKENS`` tokens.

    Args:
        datamodule: The data.
        count: Number of rows, even.
    """
    rows = _first_rows(datamodule)
    few = [row for row in rows if datamodule.length(row) <= SAMPLE_TOKENS]
    rows = rows[: max(len(few), count)]
    return rows if len(rows) <= count else [*rows[: count // 2], *rows[-count // 2 :]]


def extreme_sequences(datamodule: RecordDataModule) -> SequenceBatch:
    """Return the shortest and the longest sequence of the first encoded training rows."""
    rows = _first_rows(datamodule)
    return shortest_and_longest(as_sequences([rows[0], rows[-1]], datamodule))


def shortest_and_longest(sequences: SequenceBatch) -> SequenceBatch:
    """Return the shortest and the longest sequence of a batch."""
    lengths = sequences.attention_mask.sum(dim=1)
    chosen = torch.stack([lengths.argmin(), lengths.argmax()])
    input_ids, attention_mask, response_mask = (tensor[chosen] for tensor in _tensors(sequences))
    return SequenceBatch(input_ids, attention_mask, response_mask)


def _first_rows(datamodule: RecordDataModule) -> list[Any]:
    return sorted(datamodule.encoded("train")[:CANDIDATE_ROWS], key=datamodule.length)


def micro_batches(rows: list[Any], datamodule: RecordDataModule) -> list[Batch]:
    """Split rows into at most 4 batches, in order, so that their lengths differ."""
    size = -(-len(rows) // 4)
    return [datamodule.collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def as_sequences(rows: list[Any], datamodule: RecordDataModule) -> SequenceBatch:
    """Collate rows of any stage into one batch of sequences. A prompt counts as a response from its second token on."""
    batch: Any = datamodule.collate(rows)
    if isinstance(batch, PromptBatch):
        return SequenceBatch.collate([EncodedResponse(input_ids, 1) for input_ids in batch.input_ids])
    return batch if isinstance(batch, SequenceBatch) else batch.sequences


def unpadded_rows(batch: SequenceBatch) -> list[list[int]]:
    """Return the token ids of each row without padding."""
    return [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


# Views of a batch


def one_at_a_time(batch: SequenceBatch) -> Iterator[SequenceBatch]:
    """Yield each row as a batch without padding."""
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        input_ids, attention_mask, response_mask = (tensor[row : row + 1, :length] for tensor in _tensors(batch))
        yield SequenceBatch(input_ids, attention_mask, response_mask)


def pad_columns(batch: SequenceBatch, columns: int) -> SequenceBatch:
    """Add columns of padding on the right."""
    input_ids, attention_mask, response_mask = (F.pad(tensor, (0, columns)) for tensor in _tensors(batch))
    return SequenceBatch(input_ids, attention_mask, response_mask)


def pad_left(batch: SequenceBatch) -> SequenceBatch:
    """Move the padding from the right to the left."""
    time = batch.input_ids.shape[1]
    shift = time - batch.attention_mask.sum(dim=1, keepdim=True)
    columns = (torch.arange(time, device=shift.device) - shift) % time
    input_ids, attention_mask, response_mask = (tensor.gather(1, columns) for tensor in _tensors(batch))
    return SequenceBatch(input_ids, attention_mask, response_mask)


def _tensors(batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.input_ids, batch.attention_mask, batch.response_mask


def corrupt_padding(batch: B) -> B:
    """Replace padding by other tokens, and per-token floats outside of the responses by NaN."""
    changes: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Batch):
            changes[item.name] = corrupt_padding(value)
        elif item.name == "input_ids" and isinstance(value, Tensor):
            tokens = value[batch.attention_mask]  # type: ignore[attr-defined]
            others = tokens.flip(0).repeat(-(-value.numel() // len(tokens)))[: value.numel()].view_as(value)
            changes["input_ids"] = torch.where(batch.attention_mask, value, others)  # type: ignore[attr-defined]
        elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2:
            changes[item.name] = torch.where(batch.response_mask, value, torch.nan)  # type: ignore[attr-defined]
    return replace(batch, **changes)


# Measurements


def logprob_measure(policy: Policy | Frozen) -> Measure:
    """Measure the log-probs of a policy."""
    return lambda input_ids, attention_mask, response_mask: policy(input_ids, attention_mask, response_mask).logprobs


def score_measure(model: ScalarModel | Frozen) -> Measure:
    """Measure the scores of a reward model."""
    return lambda input_ids, attention_mask, response_mask: model(input_ids, attention_mask)


def response_values(measure: Measure, batch: SequenceBatch) -> Tensor:
    """Measure a batch: one value per response token, [tokens], or one per sequence, [batch]."""
    values = measure(batch.input_ids, batch.attention_mask, batch.response_mask)
    return values[batch.response_mask] if values.ndim == 2 else values


def full_precision(module: StageModule) -> AbstractContextManager[Any]:
    """Turn mixed precision off if the weights have full precision, so that checks measure errors and not rounding."""
    if _has_full_precision(module):
        return frozen_in_float32(module)
    return module.trainer.precision_plugin.forward_context()


def tolerance(module: StageModule) -> float:
    """Return the largest difference that rounding explains, relative to 1 + the magnitude of the value."""
    return FULL_PRECISION_TOLERANCE if _has_full_precision(module) else HALF_PRECISION_TOLERANCE


def _has_full_precision(module: nn.Module) -> bool:
    # Shards of frozen models keep the dtype of autocast: ``frozen_in_float32`` cannot replace them.
    shards = [part.model for part in module.modules() if isinstance(part, Frozen) and is_sharded(part.model)]
    return all(parameter.dtype in FULL_PRECISION for model in (module, *shards) for parameter in model.parameters())


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest ``|actual - expected| / (1 + |expected|)``; NaN if shapes differ or either has a NaN."""
    if actual.shape != expected.shape:
        return float("nan")
    if not actual.numel():
        return 0.0
    return float(((actual - expected).abs() / (1 + expected.abs())).max())


# Gradients


Gradient: TypeAlias = tuple[float, list[Tensor]]  # a loss, and its gradient for each trainable parameter


def training_gradient(module: StageModule, batches: Sequence[Batch]) -> Gradient:
    """Return the mean training loss of some batches and its gradient, as gradient accumulation computes them."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    total, sums = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        loss = module.training_loss(batch)[0] / len(batches)
        total += float(loss.detach())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for accumulated, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                accumulated += gradient
    return total, sums


def full_precision_gradient(module: StageModule, batches: Sequence[Batch]) -> Gradient:
    """Return ``training_gradient`` without mixed precision, see ``full_precision``."""
    with full_precision(module):
        return training_gradient(module, batches)


def gradient_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return ``|actual - expected| / |expected|``, with norms over all parameters together."""
    norm = nn.utils.get_total_norm([one - other for one, other in zip(actual, expected, strict=True)])
    return float(norm / nn.utils.get_total_norm(expected).clamp(min=1e-12))
