"""Pre-flight checks: ``check=true`` verifies a stage on the user's own model and data before it trains.

A check measures one property and compares it with a limit. The checks that several stages share are in ``checks.py``
and ``special_tokens.py``; each stage's ``preflight.py`` selects those that apply to it and adds its own. They use a few
rows of different lengths, and do not affect training: the run is bit-for-bit identical with and without them.
"""

from rlhf.preflight.checks import (
    check_accumulation_equivalence,
    check_frozen_models,
    check_no_dropout,
    check_padding_invariance,
    check_padding_is_ignored,
    check_reload,
)
from rlhf.preflight.measurements import (
    Measure,
    extreme_sequences,
    full_precision,
    full_precision_gradient,
    logprob_measure,
    micro_batches,
    sample_rows,
    score_measure,
    shortest_and_longest,
    unpadded_rows,
)
from rlhf.preflight.runner import PreflightFailed, run_preflight
from rlhf.preflight.special_tokens import check_ends_with_eos, check_eos_in_loss, check_single_bos
from rlhf.stage.check import Check

__all__ = [
    "Check",
    "Measure",
    "PreflightFailed",
    "check_accumulation_equivalence",
    "check_ends_with_eos",
    "check_eos_in_loss",
    "check_frozen_models",
    "check_no_dropout",
    "check_padding_invariance",
    "check_padding_is_ignored",
    "check_reload",
    "check_single_bos",
    "extreme_sequences",
    "full_precision",
    "full_precision_gradient",
    "logprob_measure",
    "micro_batches",
    "run_preflight",
    "sample_rows",
    "score_measure",
    "shortest_and_longest",
    "unpadded_rows",
]
