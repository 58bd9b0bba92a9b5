"""Pre-flight checks of the reward stage."""

from collections.abc import Iterator
from typing import Any

from rlhf.data import RecordDataModule
from rlhf.models import ScalarModel
from rlhf.preflight import (
    Check,
    check_accumulation_equivalence,
    check_ends_with_eos,
    check_no_dropout,
    check_padding_invariance,
    check_padding_is_ignored,
    check_single_bos,
    extreme_sequences,
    full_precision_gradient,
    micro_batches,
    sample_rows,
    score_measure,
    unpadded_rows,
)
from rlhf.stage import StageModule


def reward_model_checks(module: StageModule, model: ScalarModel, datamodule: RecordDataModule) -> Iterator[Check]:
    """Check the reward stage on its model and data.

    Args:
        module: The stage, on its device and with its model.
        model: The reward model that it trains.
        datamodule: Its data.
    """
    rows = sample_rows(datamodule)
    batch: Any = datamodule.collate(rows).to(module.device)
    extremes = extreme_sequences(datamodule).to(module.device)
    sequences, measure = batch.sequences, score_measure(model)
    yield check_single_bos(module.tokenizer, [*unpadded_rows(sequences), *unpadded_rows(extremes)])
    yield check_ends_with_eos(module.tokenizer, sequences, datamodule.max_length)
    yield from check_padding_invariance(module, "scores", measure, extremes, model)
    yield check_no_dropout(module, "reward model", model, measure, sequences)
    gradient = full_precision_gradient(module, [batch])
    yield check_padding_is_ignored(module, batch, gradient)
    yield check_accumulation_equivalence(module, batch, micro_batches(rows, datamodule), gradient)
