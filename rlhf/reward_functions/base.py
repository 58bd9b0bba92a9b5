"""What a reward is given to judge."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScoringBatch:
    """Answers as tokens and as text.

    tokens: [batch, time] prompt and answer, padded on the right.
    mask: [batch, time] bool, True on real tokens.
    prompts: the prompts as they stand in the data.
    texts: the answers, without special tokens.
    targets: the data's own answers, where it has them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: Sequence[str]
    texts: Sequence[str]
    targets: Sequence[str | None]
