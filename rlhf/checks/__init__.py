"""``check=true``: before it trains, a stage proves itself on the user's own model and data.

A check measures one property and says whether it holds. Those common to several stages are in ``properties.py``; each
slice's ``checks.py`` says which apply to it. They look at a few rows, the shortest and the longest, and leave
everything as they found it, so that training goes on as if they had not been.
"""

from rlhf.checks.probe import (
    Reader,
    few_rows,
    loss_of,
    micro_batches,
    one_precision,
    reads_logprobs,
    reads_scores,
    real_rows,
)
from rlhf.checks.proof import ChecksFailed, prove
from rlhf.checks.properties import (
    Check,
    accumulation_is_the_big_batch,
    ends_in_eos,
    eos_carries_loss,
    frozen_parts,
    no_dropout,
    one_bos,
    padding_reaches_no_loss,
    reproduced_after_saving,
    same_whatever_the_padding,
)

__all__ = [
    "Check",
    "ChecksFailed",
    "Reader",
    "accumulation_is_the_big_batch",
    "ends_in_eos",
    "eos_carries_loss",
    "few_rows",
    "frozen_parts",
    "loss_of",
    "micro_batches",
    "no_dropout",
    "one_bos",
    "one_precision",
    "padding_reaches_no_loss",
    "prove",
    "reads_logprobs",
    "reads_scores",
    "real_rows",
    "reproduced_after_saving",
    "same_whatever_the_padding",
]
