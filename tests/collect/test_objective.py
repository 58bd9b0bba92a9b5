"""Which responses form a pair."""

import torch

from rlhf.collect.objective import best_and_worst


def test_best_and_worst_by_hand() -> None:
    """Four prompts with three responses.

    scores             best  worst
    0.1  0.5  0.3         1      0
    2.0  2.0 -1.0    0 or 1      2    either of the two best ones
    1.0  1.0  1.0         0      0    all scores are equal: no pair
    -3.0 -2.0 -9.0        1      2
    """
    scores = torch.tensor([[0.1, 0.5, 0.3], [2.0, 2.0, -1.0], [1.0, 1.0, 1.0], [-3.0, -2.0, -9.0]])
    pairs = best_and_worst(scores).tolist()
    assert [pairs[0], pairs[3]] == [[1, 0], [1, 2]]
    assert pairs[1] in ([0, 2], [1, 2])
    assert pairs[2][0] == pairs[2][1]
