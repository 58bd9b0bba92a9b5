"""Shaping of scores: exact running moments, and keys that do what they say."""

import pytest
import torch

from rlhf.errors import UserError
from rlhf.rl import ScoreShaping

FINISHED = torch.tensor([True, True])


def shaping(**keys: object) -> ScoreShaping:
    """Everything off but what is given, having seen scores 1 and 5: mean 3, standard deviation 2."""
    off = {"subtract_mean": False, "scale_by_std": False, "clip": None, "missing_eos_penalty": 0.0}
    scores = ScoreShaping(**{**off, **keys})
    scores.update(torch.tensor([1.0, 5.0]))
    return scores


def test_running_moments_are_those_of_all_scores_seen() -> None:
    """Batches of different sizes and levels, against torch over their concatenation after each one."""
    generator = torch.Generator().manual_seed(0)
    scores, seen = ScoreShaping(), []
    for size, level in ((4, 100.0), (1, -3.0), (32, 0.0), (7, 1000.0)):
        batch = torch.randn(size, generator=generator) + level
        scores.update(batch)
        seen.append(batch.double())
        everything = torch.cat(seen)
        torch.testing.assert_close(scores.mean, everything.mean())
        torch.testing.assert_close(scores.std, everything.std(correction=0))
        assert scores.count == len(everything)


def test_nothing_is_shaped_when_everything_is_off() -> None:
    assert shaping()(torch.tensor([1.0, 50.0]), FINISHED).tolist() == [1.0, 50.0]


@pytest.mark.parametrize(
    ("keys", "scores", "expected"),
    [
        ({"subtract_mean": True}, [1.0, 9.0], [-2.0, 6.0]),  # - 3
        ({"scale_by_std": True}, [1.0, 9.0], [0.5, 4.5]),  # / 2
        ({"clip": 4.0}, [-7.0, 9.0], [-4.0, 4.0]),
        ({"subtract_mean": True, "scale_by_std": True, "clip": 2.5}, [1.0, 9.0], [-1.0, 2.5]),  # (1-3)/2, (9-3)/2 = 3
    ],
    ids=["subtract_mean", "scale_by_std", "clip", "clip after the rest"],
)
def test_each_key_does_what_it_says(keys: dict, scores: list[float], expected: list[float]) -> None:
    """Mean 3 and standard deviation 2 have been seen; the arithmetic stands beside each case."""
    assert shaping(**keys)(torch.tensor(scores), FINISHED).tolist() == expected


def test_the_penalty_is_taken_off_unfinished_answers_after_clipping() -> None:
    """9 is clipped to 4 first: 4 if it ended, 4 - 1.5 if it was cut."""
    scores = shaping(clip=4.0, missing_eos_penalty=1.5)
    assert scores(torch.tensor([9.0, 9.0]), torch.tensor([True, False])).tolist() == [4.0, 2.5]


def test_an_unfinished_answer_may_lose_its_score_altogether() -> None:
    """``replace``: whatever the score was, an answer that was cut is worth -1.5 (arXiv:2403.17031: -1)."""
    scores = shaping(missing_eos_penalty=1.5, missing_eos="replace")
    assert scores(torch.tensor([9.0, 9.0]), torch.tensor([True, False])).tolist() == [9.0, -1.5]
    with pytest.raises(UserError, match=r"stage\.scores\.missing_eos=drop"):
        ScoreShaping(missing_eos="drop")


def test_equal_scores_are_not_divided_by_zero() -> None:
    """Scores 2, 2, 2 have no spread: they become 0, not NaN."""
    scores = ScoreShaping(clip=None)
    scores.update(torch.full((3,), 2.0))
    assert scores(torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_running_moments_survive_a_checkpoint() -> None:
    """A new object with the old one's state goes on exactly where the old one was."""
    old, new = shaping(), ScoreShaping(clip=None)
    new.load_state_dict(old.state_dict())
    for scores in (old, new):
        scores.update(torch.tensor([9.0]))  # mean of 1, 5, 9: 5; variance 32/3
    torch.testing.assert_close(new.mean.item(), 5.0)
    torch.testing.assert_close(new.std.item(), (32 / 3) ** 0.5)
    torch.testing.assert_close(dict(new.state_dict()), dict(old.state_dict()), rtol=0.0, atol=0.0)


def test_a_clip_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"stage\.scores\.clip=0"):
        ScoreShaping(clip=0.0)
