"""Pre-flight checks of supervised fine-tuning (``check=true``)."""

from collections.abc import Iterator
from typing import Any

from rlhf.preflight import (
    Check,
    check_accumulation_equivalence,
    check_eos_in_loss,
    check_padding_invariance,
    check_padding_is_ignored,
    check_single_bos,
    logprob_measure,
    micro_batches,
    sample_rows,
    unpadded_rows,
)


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Run the pre-flight checks of an ``SFTModule`` on its data."""
    rows = sample_rows(datamodule)
    batch = datamodule.collate(rows).to(module.device)
    policy = module.policy
    yield check_single_bos(module.tokenizer, unpadded_rows(batch))
    yield check_eos_in_loss(module, policy, batch, datamodule.max_length)
    yield from check_padding_invariance(module, "log-probs", logprob_measure(policy), batch, policy.lm)
    yield check_padding_is_ignored(module, batch)
    yield check_accumulation_equivalence(module, batch, micro_batches(rows, datamodule))
