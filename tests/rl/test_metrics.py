"""Metrics of rollouts, by hand."""

import pytest
import torch

from rlhf.rl import KLController, ScoreShaping
from rlhf.rl.metrics import count_ngrams, rollout_metrics


def repetition(responses: list[list[int]]) -> float:
    """``response/repetition`` of a rollout whose scores and log-probs are 0."""
    ngrams, distinct_ngrams = (torch.tensor(counts).float() for counts in count_ngrams(responses))
    zeros = torch.zeros(len(responses))
    names = ("scores", "kl", "kl_estimate", "logprobs", "length", "finished")
    columns = dict.fromkeys(names, zeros) | {"ngrams": ngrams, "distinct_ngrams": distinct_ngrams}
    (kl := KLController()).initialize(0.1)
    return float(rollout_metrics(columns, kl, ScoreShaping())["response/repetition"])


def test_count_ngrams_by_hand() -> None:
    """Bigrams of 1 2 1 2 1: 12, 21, 12, 21, of which two are distinct; of 5 6 7: 56, 67; of 9: none."""
    assert count_ngrams([[1, 2, 1, 2, 1], [5, 6, 7], [9]], 2) == ([4, 2, 0], [2, 2, 0])


def test_repetition_sums_over_responses() -> None:
    """The first response has the 4-grams 1212, 2121 and 1212, the second 5678: one of four is repeated."""
    assert repetition([[1, 2, 1, 2, 1, 2], [5, 6, 7, 8], [9]]) == pytest.approx(1 / 4)


def test_repetition_of_short_responses_is_zero() -> None:
    assert repetition([[9], []]) == 0.0


def test_repetition_of_one_repeated_token() -> None:
    """Ten equal tokens contain 7 n-grams of 4 tokens, and all but the first are repeated."""
    assert repetition([[4] * 10]) == pytest.approx(1 - 1 / 7)


@pytest.mark.parametrize(("scores", "std"), [([0.1, 0.1, 0.1], 0.0), ([1.0, 5.0], 2.0)])
def test_scores_std_is_zero_if_all_scores_are_equal(scores: list[float], std: float) -> None:
    """1 and 5 differ from their mean by 2. Equal scores are not divided by 0."""
    (kl := KLController()).initialize(0.1)
    shaping = ScoreShaping()
    shaping.update(torch.tensor(scores))
    names = ("kl", "kl_estimate", "logprobs", "length", "ngrams", "distinct_ngrams")
    columns = dict.fromkeys(names, torch.zeros(len(scores)))
    columns |= {"scores": torch.tensor(scores), "finished": torch.ones(len(scores))}
    metrics = rollout_metrics(columns, kl, shaping)
    assert metrics["objective/scores_std"] == std
    assert metrics["objective/rlhf_reward"] == pytest.approx(0.0, abs=1e-6)
