"""Which of the responses to a prompt form a preference pair."""

from torch import Tensor


def best_and_worst(scores: Tensor) -> Tensor:
    """Indices of the response with the highest and with the lowest score of each prompt.

    Args:
        scores: [prompts, responses] scores, in reward units.

    Returns:
        [prompts, 2] indices. They are equal where all scores are.

    Reference: Yuan et al. 2024, Self-Rewarding Language Models, section 2.4 (arXiv:2401.10020).
    """
    # argmax and argmin do not specify which of several equal scores they return, so ties are broken here.
    order = scores.argsort(dim=1, stable=True)
    is_tie = scores.amax(dim=1) == scores.amin(dim=1)
    pairs = order[:, [-1, 0]]
    return pairs.where(~is_tie[:, None], pairs[:, :1])
