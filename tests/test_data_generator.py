"""The bundled data: the generator, the content of the files, and the gold score by hand."""

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
    """The rows of every committed file, by the name of the file."""
    files = sorted((repo / "data").glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files}


def test_the_generator_writes_the_committed_files_byte_for_byte(repo: Path, tmp_path: Path) -> None:
    """All of them and no others, for any hash seed of Python."""
    command = [sys.executable, str(repo / "data" / "generate.py"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PYTHONHASHSEED": "42"})
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    committed = {file.name: file.read_bytes() for file in (repo / "data").glob("*.jsonl")}
    assert written.keys() == committed.keys()
    assert [name for name, content in written.items() if content != committed[name]] == []


def test_held_out_documents_are_not_in_the_training_data(rows: dict[str, list[dict]]) -> None:
    """Documents of ``*_val`` and ``*_test`` are in no ``*_train`` file and occur only once."""
    documents = {name: [row["document"] for row in records] for name, records in rows.items()}
    trained = {document for name, some in documents.items() if name.endswith("_train") for document in some}
    held_out = [document for name, some in documents.items() if not name.endswith("_train") for document in some]
    assert trained
    assert len(set(held_out)) == len(held_out) > 0
    assert trained.isdisjoint(held_out)


def test_one_preference_label_in_ten_is_flipped(rows: dict[str, list[dict]], gold: ModuleType) -> None:
    """A label is flipped if 'rejected' has the higher gold score. The standard error for 4000 labels is 0.5 %."""
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
    """The document contains 5 facts: Nadia, camera, Dunmore, May, 90.

    all five in 6 words                      5/5            - 0.02 * 6 = 0.88
    two of them in 2 words                   2/5            - 0.02 * 2
    one, and two invented ones (Ada, 80)     1/5 - 0.25 * 2 - 0.02 * 3
    a repeated fact counts once              1/5            - 0.02 * 2
    'may' is not the month May               0              - 0.02 * 1
    an empty response                        0
    """
    document = "A camera from Dunmore is on its way to the shops. It costs 90 euros. Nadia sells it from May."
    responses = [
        "Nadia, camera, Dunmore, May, 90 euros.",
        "camera, May.",
        "camera, Ada, 80",
        "camera, camera",
        "may",
        "",
    ]
    expected = [0.88, 2 / 5 - 0.04, 1 / 5 - 0.56, 1 / 5 - 0.04, -0.02, 0.0]
    assert gold.score([document] * 6, responses) == pytest.approx(expected)


def test_gold_score_needs_one_response_per_document(gold: ModuleType) -> None:
    with pytest.raises(ValueError):
        gold.score(["one", "two"], ["response"])
