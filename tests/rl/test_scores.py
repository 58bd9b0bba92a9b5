"""Score shaping: exact running moments, and the effect of each setting."""

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.rl import ScoreShaping

FINISHED = torch.tensor([True, True])


def shaping(**keys: object) -> ScoreShaping:
    """Return score shaping with the given settings only, after scores 1 and 5: mean 3, standard deviation 2."""
    off = {"subtract_mean": False, "scale_by_std": False, "clip": None, "missing_eos_penalty": 0.0}
    scores = ScoreShaping(**{**off, **keys})
    scores.update(torch.tensor([1.0, 5.0]))
    return scores


def test_running_moments_match_torch_over_all_scores() -> None:
    """Batches of different sizes and means, compared with torch over their concatenation after each batch."""
    generator = torch.Generator().manual_seed(0)
    scores, batches = ScoreShaping(), []
    for size, level in ((4, 100.0), (1, -3.0), (32, 0.0), (7, 1000.0)):
        batch = torch.randn(size, generator=generator) + level
        scores.update(batch)
        batches.append(batch.double())
        all_scores = torch.cat(batches)
        assert scores.mean == pytest.approx(float(all_scores.mean()), rel=1e-12)
        assert scores.std == pytest.approx(float(all_scores.std(correction=0)), rel=1e-12)
        assert scores.count == len(all_scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_are_exact_in_every_precision(dtype: torch.dtype) -> None:
    """25600 scores in batches of 64, in a module that Lightning has cast; bfloat16 cannot count beyond 256."""
    batches = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * 2.5 + 3
    scores = ScoreShaping().to(dtype)
    for batch in batches:
        scores.update(batch)
    assert scores.count == 25600
    assert scores.mean == pytest.approx(float(batches.double().mean()), rel=1e-12)
    assert scores.std == pytest.approx(float(batches.double().std(correction=0)), rel=1e-12)
    assert dict(scores.named_buffers()) == {}


def test_scores_are_unchanged_when_all_settings_are_off() -> None:
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
def test_each_setting_by_hand(keys: dict, scores: list[float], expected: list[float]) -> None:
    """Running mean 3 and standard deviation 2; the comment of each case shows the arithmetic."""
    assert shaping(**keys)(torch.tensor(scores), FINISHED).tolist() == expected


def test_the_missing_eos_penalty_is_subtracted_after_clipping() -> None:
    """9 is clipped to 4 first: 4 for a finished response, 4 - 1.5 for an unfinished one."""
    scores = shaping(clip=4.0, missing_eos_penalty=1.5)
    assert scores(torch.tensor([9.0, 9.0]), torch.tensor([True, False])).tolist() == [4.0, 2.5]


def test_the_missing_eos_penalty_can_replace_the_score() -> None:
    """With ``replace`` an unfinished response gets -1.5, whatever its score (arXiv:2403.17031 uses -1)."""
    scores = shaping(missing_eos_penalty=1.5, missing_eos="replace")
    assert scores(torch.tensor([9.0, 9.0]), torch.tensor([True, False])).tolist() == [9.0, -1.5]
    with pytest.raises(ConfigError, match=r"stage\.scores\.missing_eos must be subtract or replace, got 'drop'"):
        ScoreShaping(missing_eos="drop")


def test_equal_scores_are_not_divided_by_zero() -> None:
    """Scores 2, 2, 2 have standard deviation 0: they become 0, not NaN."""
    scores = ScoreShaping(clip=None)
    scores.update(torch.full((3,), 2.0))
    assert scores(torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_running_moments_are_stored_in_checkpoints() -> None:
    """A new object with the state of the old one continues exactly where the old one was."""
    old, new = shaping(), ScoreShaping(clip=None)
    new.load_state_dict(old.state_dict())
    for scores in (old, new):
        scores.update(torch.tensor([9.0]))  # mean of 1, 5, 9: 5; variance 32/3
    assert new.mean == pytest.approx(5.0)
    assert new.std == pytest.approx((32 / 3) ** 0.5)
    assert new.state_dict() == old.state_dict()


def test_a_clip_range_of_0_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage\.scores\.clip must be a number above 0 or null, got 0"):
        ScoreShaping(clip=0.0)
