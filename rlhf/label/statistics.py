"""Statistics of choices: agreement of annotators, and proportions with their intervals."""

import math
from collections.abc import Sequence

Z = 1.959963984540054  # quantile of the normal distribution for 95 %


def cohens_kappa(choices: Sequence[tuple[str, str]]) -> float:
    """Agreement of two annotators, corrected for the agreement that is expected by chance.

        kappa = (p_o - p_e) / (1 - p_e)

    Here, p_o is the share of pairs with the same choice, and p_e = sum_c p_1(c) p_2(c) is that share if both chose
    independently with their own frequencies.

    Args:
        choices: The choices of both annotators for each pair that both have labeled.

    Returns:
        From -1 to 1; 1 for complete agreement. NaN without pairs, or if both always made the same single choice.

    Reference: Cohen 1960, A Coefficient of Agreement for Nominal Scales.
    """
    if not choices:
        return math.nan
    count = len(choices)
    observed = sum(one == two for one, two in choices) / count
    labels = {label for pair in choices for label in pair}
    frequencies = [[sum(pair[side] == label for pair in choices) / count for label in labels] for side in (0, 1)]
    expected = sum(one * two for one, two in zip(*frequencies, strict=True))
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def wilson_interval(successes: float, count: int) -> tuple[float, float, float]:
    """A proportion with its 95 % score interval.

    Args:
        successes: Number of successes. A tie counts as half of one.
        count: Number of trials, at least 1.

    Returns:
        The proportion, and the lower and the upper bound.

    Reference: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    share = successes / count
    center = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    width = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return share, max(0.0, center - width), min(1.0, center + width)
