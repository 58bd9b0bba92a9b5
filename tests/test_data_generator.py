"""The shipped data: what the generator writes, what stands in the files, and the gold score by hand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def gold(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gold", repo / "data" / "gold.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(repo: Path) -> dict[str, list[dict]]:
    """The records of every committed file, by its name without ending."""
    files = sorted((repo / "data").glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files}


def test_the_generator_writes_the_committed_files_byte_for_byte(repo: Path, tmp_path: Path) -> None:
    """All of them and no others, on any Python and whatever its hash seed."""
    command = [sys.executable, str(repo / "data" / "generate.py"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PYTHONHASHSEED": "42"})
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    committed = {file.name: file.read_bytes() for file in (repo / "data").glob("*.jsonl")}
    assert written.keys() == committed.keys()
    assert [name for name, content in written.items() if content != committed[name]] == []


def test_no_held_out_document_is_trained_on(rows: dict[str, list[dict]]) -> None:
    """Documents of *_val and *_test stand in no *_train file, of any kind, and only once."""
    documents = {name: [row["document"] for row in records] for name, records in rows.items()}
    trained = {document for name, some in documents.items() if name.endswith("_train") for document in some}
    held_out = [document for name, some in documents.items() if not name.endswith("_train") for document in some]
    assert trained
    assert len(set(held_out)) == len(held_out) > 0
    assert trained.isdisjoint(held_out)


def test_one_preference_label_in_ten_is_flipped(rows: dict[str, list[dict]], gold: ModuleType) -> None:
    """Where the gold score calls 'rejected' the better answer. 4000 labels at 10 %: a standard error of 0.5 %."""
    flipped = [
        gold.score([row["document"]], [row["chosen"]])[0] < gold.score([row["document"]], [row["rejected"]])[0]
        for row in rows["prefs_train"]
    ]
    assert 0.08 < sum(flipped) / len(flipped) < 0.12


def test_records_have_the_documented_fields(rows: dict[str, list[dict]]) -> None:
    fields = {
        "rl": {"document", "target"},
        "prefs": {"document", "chosen", "rejected"},
        "rewards": {"document", "response", "reward"},
    }
    for name, records in rows.items():
        assert {frozenset(row) for row in records} == {frozenset(fields[name.split("_")[0]])}, name


def test_gold_score_by_hand(gold: ModuleType) -> None:
    """The document holds 5 facts: Nadia, camera, Dunmore, May, 90.

    all five in 6 words:           5/5              - 0.02 x 6 = 0.88
    two of them in 2 words:        2/5              - 0.02 x 2
    one, and two invented (Ada, 80) in 3 words: 1/5 - 0.25 x 2 - 0.02 x 3
    a fact said twice counts once: 1/5              - 0.02 x 2
    case matters to names (may is a word, May a month): 0 - 0.02;  nothing said: 0
    """
    document = "A camera from Dunmore is on its way to the shops. It costs 90 euros. Nadia sells it from May."
    answers = ["Nadia, camera, Dunmore, May, 90 euros.", "camera, May.", "camera, Ada, 80", "camera, camera", "may", ""]
    expected = [0.88, 2 / 5 - 0.04, 1 / 5 - 0.56, 1 / 5 - 0.04, -0.02, 0.0]
    assert gold.score([document] * 6, answers) == pytest.approx(expected)


def test_gold_score_needs_an_answer_for_each_document(gold: ModuleType) -> None:
    with pytest.raises(ValueError):
        gold.score(["one", "two"], ["answer"])
