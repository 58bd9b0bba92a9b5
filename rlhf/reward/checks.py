"""What the reward model's stage proves of itself with ``check=true``."""

from collections.abc import Iterator
from typing import Any

from rlhf.checks import (
    Check,
    accumulation_is_the_big_batch,
    ends_in_eos,
    few_rows,
    micro_batches,
    no_dropout,
    one_bos,
    padding_reaches_no_loss,
    reads_scores,
    real_rows,
    same_whatever_the_padding,
)


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of a RewardModule on its own data."""
    rows = few_rows(datamodule)
    batch = datamodule.collate(rows).to(module.device)
    texts, model, read = batch.texts, module.model, reads_scores(module.model)
    yield one_bos(module.tokenizer, real_rows(texts))
    yield ends_in_eos(module.tokenizer, texts, datamodule.max_length)
    yield from same_whatever_the_padding(module, "scores", read, texts, model)
    yield no_dropout(module, "reward model", model, read, texts)
    yield padding_reaches_no_loss(module, batch)
    yield accumulation_is_the_big_batch(module, batch, micro_batches(rows, datamodule))
