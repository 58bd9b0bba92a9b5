"""The demonstrations that reward models are centered on."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import DataError
from rlhf.reward import RewardDataModule

COLUMNS = {"prompt": "question", "chosen": "good", "rejected": "bad"}


def data(folder: Path, demonstration: dict[str, Any]) -> RewardDataModule:
    """Pairs with other column names, and one demonstration."""
    pair = {"question": "Q", "good": "A", "bad": "B"}
    for name, row in (("pairs", pair), ("demonstrations", demonstration)):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    paths = {"train": str(folder / "pairs.jsonl"), "demonstrations": str(folder / "demonstrations.jsonl")}
    return RewardDataModule(**paths, val_fraction=0.0, columns=COLUMNS, splits={"train": "train_prefs"})


@pytest.mark.parametrize(
    "demonstration",
    [{"question": "R", "completion": "C"}, {"prompt": "R", "completion": "C"}],
    ids=["columns of the pairs", "default columns"],
)
def test_demonstrations_have_the_columns_of_the_pairs_or_the_default_ones(
    tmp_path: Path, demonstration: dict[str, str]
) -> None:
    module = data(tmp_path, demonstration)
    (record,) = module.demonstration_records()
    assert (record.prompt.raw_text, record.response) == ("R", "C")
    assert module.records("train")[0].chosen == "A"


def test_demonstrations_that_fit_neither_are_reported_with_the_columns_of_the_pairs(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"demonstrations\.jsonl:1: .* no field 'question' \(fields: text, completion\)"
    ):
        data(tmp_path, {"text": "R", "completion": "C"}).demonstration_records()


def test_split_names_of_the_pairs_do_not_apply_to_demonstrations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demonstrations are a Hub dataset, which has a split ``train`` and no split ``train_prefs``."""
    module = data(tmp_path, {})
    module.demonstrations = "owner/demonstrations"

    def read_rows(path: str, *, split: str, subset: str | None, columns: Any) -> list[dict[str, str]]:
        assert (path, split, subset) == ("owner/demonstrations", "train", None)
        return [{"prompt": "R", "completion": "C"}]

    monkeypatch.setattr("rlhf.data.reading.read_rows", read_rows)
    assert [record.response for record in module.demonstration_records()] == ["C"]
