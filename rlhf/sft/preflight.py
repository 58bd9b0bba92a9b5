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
    extreme_sequences,
    full_precision_gradient,
    logprob_measure,
    micro_batches,
    sample_rows,
    unpadded_rows,
)


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Run the pre-flight checks of an ``SFTModule`` on its data."""
    rows = sample_rows(datamodule)
    batch = datamodule.collate(rows).to(module.device)
    extremes = extreme_sequences(datamodule).to(module.device)
    policy = module.policy
    yield check_single_bos(module.tokenizer, [*unpadded_rows(batch), *unpadded_rows(extremes)])
    yield check_eos_in_loss(module, policy, batch, datamodule.max_length)
    yield from check_padding_invariance(module, "log-probs", logprob_measure(policy), extremes, policy.lm)
    gradient = full_precision_gradient(module, [batch])
    yield check_padding_is_ignored(module, batch, gradient)
    yield check_accumulation_equivalence(module, batch, micro_batches(rows, datamodule), gradient)
