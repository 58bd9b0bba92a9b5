"""Scores of reward model ensembles."""

from torch import Tensor


def pessimistic_score(scores: Tensor, *, uncertainty_penalty: float) -> Tensor:
    """Mean score minus a penalty on the disagreement of an ensemble.

        score = mean_k s_k - uncertainty_penalty * std_k s_k,    std: population standard deviation

    Coste et al. subtract the variance. The standard deviation has the unit of the scores, so the penalty means the same
    at any scale. It must not be differentiated: its derivative is undefined where all scores are equal.

    Args:
        scores: [batch, scorers] score of each response by each member or head, in reward units.
        uncertainty_penalty: Number of standard deviations to subtract, dimensionless. 0 gives the mean.

    Returns:
        [batch] scores, in reward units.

    Reference: Coste et al. 2023, section 3.2, uncertainty-weighted optimization (arXiv:2310.02743).
    """
    return scores.mean(dim=1) - uncertainty_penalty * scores.std(dim=1, correction=0)
