"""Statistics of evaluation: bootstrap intervals, wins and ROUGE-L."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

DRAWN_AT_ONCE = 2_000_000  # values, which limits the memory of a bootstrap to 32 MB


def bootstrap_interval(values: Tensor, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean with a 95% percentile bootstrap interval.

    Args:
        values: [prompts] one value per prompt, in any unit.
        draws: Number of resamples of the prompts, with replacement.
        seed: Seed of the resampling. Equal values always get equal intervals.

    Returns:
        The mean, the lower and the upper bound, in the unit of ``values``.

    Reference: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.double()
    chunks = torch.arange(draws).split(max(1, DRAWN_AT_ONCE // len(values)))
    rows = (torch.randint(len(values), (len(chunk), len(values)), generator=generator) for chunk in chunks)
    means = torch.cat([values[chunk].mean(dim=1) for chunk in rows])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.mean().item(), low, high


def wins(scores: Tensor, other_scores: Tensor) -> Tensor:
    """Wins of one model against another: 1 for a higher score, 0.5 for a tie, 0 for a lower score.

    Args:
        scores: [prompts] scores of the model's responses.
        other_scores: [prompts] scores of the other model's responses to the same prompts.

    Returns:
        [prompts] wins. Their mean is the win rate.
    """
    return (scores > other_scores).double() + 0.5 * (scores == other_scores).double()


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound of the KL of best-of-n sampling to the model that it samples from.

        KL <= log n - (n - 1) / n

    It is exact for a continuous distribution of responses, in which no response is sampled twice.

    Args:
        n: Number of responses to choose from.

    Returns:
        The bound, in nats per response.

    Reference: Stiennon et al. 2020, appendix G.3 (arXiv:2009.01325), who state it as the KL; Beirami et al. 2024
        (arXiv:2401.01879), who prove that it is a bound.
    """
    return math.log(n) - (n - 1) / n


def rouge_l(responses: Sequence[str], targets: Sequence[str]) -> Tensor:
    """ROUGE-L F-measure of each response and its target, from 0 to 1.

    Case and punctuation are ignored. Text in scripts without spaces, such as Chinese, is compared character by
    character, other text word by word. The implementation is that of torchmetrics.

    Args:
        responses: Responses as text.
        targets: One reference response each.

    Returns:
        [responses] F-measures.

    Reference: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries (W04-1013).
    """
    from torchmetrics.functional.text import rouge_score

    def words(text: str) -> list[str]:
        return re.findall(r"\w", text) if _is_written_without_spaces(text) else re.findall(r"\w+", text)

    scores = [
        rouge_score(response, target, rouge_keys="rougeL", tokenizer=words, normalizer=str.lower)["rougeL_fmeasure"]
        for response, target in zip(responses, targets, strict=True)
    ]
    return torch.stack(scores).double() if scores else torch.zeros(0, dtype=torch.float64)


def _is_written_without_spaces(text: str) -> bool:
    """Whether most letters belong to East Asian scripts, which start at U+2E80."""
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum(ord(letter) >= 0x2E80 for letter in letters) > len(letters)
