"""What the reward model's stage proves of itself with ``check=true``."""

from collections.abc import Iterator
from typing import Any

from rlhf.preflight import (
    Check,
    check_accumulation_equivalence,
    check_ends_with_eos,
    check_no_dropout,
    check_padding_invariance,
    check_padding_is_ignored,
    check_single_bos,
    micro_batches,
    sample_rows,
    score_measure,
    unpadded_rows,
)


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of a RewardModule on its own data."""
    rows = sample_rows(datamodule)
    batch = datamodule.collate(rows).to(module.device)
    texts, model, read = batch.sequences, module.model, score_measure(module.model)
    yield check_single_bos(module.tokenizer, unpadded_rows(texts))
    yield check_ends_with_eos(module.tokenizer, texts, datamodule.max_length)
    yield from check_padding_invariance(module, "scores", read, texts, model)
    yield check_no_dropout(module, "reward model", model, read, texts)
    yield check_padding_is_ignored(module, batch)
    yield check_accumulation_equivalence(module, batch, micro_batches(rows, datamodule))
