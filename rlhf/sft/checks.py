"""What supervised fine-tuning proves of itself with ``check=true``."""

from collections.abc import Iterator
from typing import Any

from rlhf.checks import (
    Check,
    accumulation_is_the_big_batch,
    eos_carries_loss,
    few_rows,
    micro_batches,
    one_bos,
    padding_reaches_no_loss,
    reads_logprobs,
    real_rows,
    same_whatever_the_padding,
)


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of an SFTModule on its own data."""
    rows = few_rows(datamodule)
    batch = datamodule.collate(rows).to(module.device)
    policy = module.policy
    yield one_bos(module.tokenizer, real_rows(batch))
    yield eos_carries_loss(module, policy, batch, datamodule.max_length)
    yield from same_whatever_the_padding(module, "log-probs", reads_logprobs(policy), batch, policy.lm)
    yield padding_reaches_no_loss(module, batch)
    yield accumulation_is_the_big_batch(module, batch, micro_batches(rows, datamodule))
