"""The arithmetic of evaluation: means, win rates and their bootstrap intervals, ROUGE-L."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor


def bootstrap_interval(values: Tensor, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of per-prompt numbers with its 95 % percentile bootstrap interval: (mean, low, high).

    Args:
        values: [prompts], any unit.
        draws: resamples of the prompts, with replacement.
        seed: of the resampling; the same numbers always get the same interval.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.double()
    rows = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values[rows].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.mean().item(), low, high


def wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 where our answer scores higher, 0 where theirs does, 0.5 for a tie: [prompts] scores each to [prompts]."""
    return (ours > theirs).double() + 0.5 * (ours == theirs).double()


def rouge_l(answers: Sequence[str], targets: Sequence[str]) -> Tensor:
    """ROUGE-L F-measure of each answer to its target, [prompts], 0 to 1; words of any script, case ignored.

    Source: Lin 2004 (W04-1013), by torchmetrics.
    """
    from torchmetrics.functional.text import rouge_score

    def words(text: str) -> list[str]:
        return re.findall(r"\w", text) if _has_no_spaces(text) else re.findall(r"\w+", text)

    scores = [
        rouge_score(answer, target, rouge_keys="rougeL", tokenizer=words, normalizer=str.lower)["rougeL_fmeasure"]
        for answer, target in zip(answers, targets, strict=True)
    ]
    return torch.stack(scores).double() if scores else torch.zeros(0, dtype=torch.float64)


def _has_no_spaces(text: str) -> bool:
    """Scripts such as Chinese are compared letter by letter: mostly letters beyond U+2E80, where they begin."""
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum(ord(letter) >= 0x2E80 for letter in letters) > len(letters)
