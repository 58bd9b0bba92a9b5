"""``check=true``: before it trains, a stage proves itself on the user's own model and data.

A check measures one property and says whether it holds. Those common to several stages are in ``properties.py``; each
slice's ``checks.py`` says which apply to it. They look at a few rows, the shortest and the longest, and leave
everything as they found it, so that training goes on as if they had not been.
"""

from rlhf.preflight.checks import (
    Check,
    check_accumulation_equivalence,
    check_ends_with_eos,
    check_eos_in_loss,
    check_frozen_models,
    check_no_dropout,
    check_padding_invariance,
    check_padding_is_ignored,
    check_reload,
    check_single_bos,
)
from rlhf.preflight.measurements import (
    Measure,
    full_precision,
    logprob_measure,
    micro_batches,
    sample_rows,
    score_measure,
    training_loss,
    unpadded_rows,
)
from rlhf.preflight.runner import ChecksFailed, run_preflight

__all__ = [
    "Check",
    "ChecksFailed",
    "Measure",
    "check_accumulation_equivalence",
    "check_ends_with_eos",
    "check_eos_in_loss",
    "check_frozen_models",
    "check_no_dropout",
    "check_padding_invariance",
    "check_padding_is_ignored",
    "check_reload",
    "check_single_bos",
    "full_precision",
    "logprob_measure",
    "micro_batches",
    "run_preflight",
    "sample_rows",
    "score_measure",
    "training_loss",
    "unpadded_rows",
]
