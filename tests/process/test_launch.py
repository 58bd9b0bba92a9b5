"""What a process knows about its rank before the ranks are connected."""

import pytest

from rlhf.process.launch import RANK_VARIABLES, is_launched, rank_in_environment


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_without_a_launcher_is_rank_0() -> None:
    assert (rank_in_environment(), is_launched()) == (0, False)


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),  # torchrun, the second process of the second node
        ({"RANK": "0", "LOCAL_RANK": "0"}, 0),
        ({"SLURM_PROCID": "5"}, 5),
        ({"LOCAL_RANK": "1"}, 1),  # started by Lightning
    ],
)
def test_the_rank_is_that_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rank: int
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (rank_in_environment(), is_launched()) == (rank, True)
