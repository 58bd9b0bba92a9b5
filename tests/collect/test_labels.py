"""Labels of people: the stage serves the page, and waits until every pair is labeled."""

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from forked import kill_group, start_python
from harness import TINY_DATA, TINY_MODEL, run_train
from rlhf.collect import PageLabels
from rlhf.collect.candidates import Candidates
from rlhf.data import Prompt
from rlhf.errors import ConfigError, Stopped
from rlhf.files import write_json_lines
from rlhf.label.pairs import Pair, Response, read_pairs
from rlhf.label.session import Session

SCORER = "def score(prompts, responses): return [len(text) for text in responses]"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def annotator(repo: Path, folder: Path, port: int, patience: int) -> Any:
    """Start a simulated annotator, who prefers the longer response and is never wrong."""
    (folder / "length.py").write_text(SCORER)
    keys = ["--url", f"http://127.0.0.1:{port}", "--scorer", f"{folder / 'length.py'}:score", "--noise", "0"]
    return start_python(["benchmarks/simulated_annotator.py", *keys, "--patience", str(patience)], repo)


def candidates() -> list[Candidates]:
    return [
        Candidates(
            Prompt([{"role": "user", "content": f"p{n}"}], f"p{n}"), [f"{n} short", f"{n} longer", f"{n} longer"]
        )
        for n in range(8)
    ]


def label(labels: PageLabels, file: Path) -> list[dict[str, Any]]:
    """Label the candidates, as the stage does after sampling."""
    with labels.opened():
        return labels.label(candidates(), file)


def test_people_decide(repo: Path, tmp_path: Path) -> None:
    """The program of the benchmark is the annotator. The two identical responses to each prompt are one."""
    port, file = free_port(), tmp_path / "candidates.jsonl"
    write_json_lines(file, (found.row() for found in candidates()))
    process = annotator(repo, tmp_path, port, 1)
    try:
        rows = label(PageLabels(port=port, overlap=0.0), file)
        assert process.communicate(timeout=60)[0] == "8 choices\n"
    finally:
        kill_group(process.pid)
    assert [(row["prompt"], row["chosen"]) for row in rows] == [(f"p{n}", f"{n} longer") for n in range(8)]


def test_a_stopped_page_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "candidates.jsonl"
    write_json_lines(file, (found.row() for found in candidates()))
    monkeypatch.setattr("rlhf.web.server.serve", lambda *_, **__: None)
    with pytest.raises(Stopped, match=r"stopped: 0 of 8 pairs are labeled\.\n.* pipeline with resume=true"):
        label(PageLabels(port=0), file)


def test_rows_of_an_earlier_session_are_not_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same directory has a choice between other responses. Its row stays in the file of the page."""
    file, folder = tmp_path / "candidates.jsonl", tmp_path / "label"
    earlier = Session([Pair("p0", Response("old a"), Response("old b"))], folder, overlap=0.0)
    earlier.choose("Ada", next(iter(earlier.pairs)), "left")
    write_json_lines(file, (found.row() for found in candidates()))
    session = Session(read_pairs(file), folder, overlap=0.0)
    for number, pair in enumerate(session.pairs.values()):
        shown = session.left(pair, "Ada")
        longer = "left" if pair.first.text.endswith("longer") == (shown == "first") else "right"
        session.choose("Ada", pair.id, longer if number else "tie", reason="half of a pair: \ud800")
    monkeypatch.setattr("rlhf.web.server.serve", lambda *_, **__: None)
    rows = label(PageLabels(port=0, overlap=0.0), file)
    assert [row["chosen"] for row in rows] == [f"{n} longer" for n in range(1, 8)]
    write_json_lines(tmp_path / "preferences.jsonl", rows)  # as the stage does
    assert len(session.preferences.read_text().splitlines()) == 8


def test_a_short_token_is_rejected_with_its_key() -> None:
    """The constructor rejects it, before anything is loaded."""
    with pytest.raises(ConfigError, match=r"labels\.token must have .* got 3\.\n  Remove labels\.token: .*labels"):
        PageLabels(token="abc")


def test_the_page_prints_its_directory_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are not the markup of rich."""
    file = tmp_path / "exp[a1]" / "[/b]" / "candidates.jsonl"
    write_json_lines(file, (found.row() for found in candidates()))
    monkeypatch.setattr("rlhf.web.server.serve", lambda *_, **__: None)
    labels = PageLabels(port=0)
    with labels.opened(), pytest.raises(Stopped):
        labels.label(candidates(), file)
    printed = capsys.readouterr().out
    assert f"Every choice is in {file.parent}/label/journal.jsonl;" in printed
    assert f"\n  {file.parent}/label/preferences.jsonl\n" in printed


@pytest.mark.slow
def test_people_label_the_rounds_of_a_pipeline(repo: Path, tmp_path: Path) -> None:
    """Two rounds of DPO on the choices of an annotator who prefers long responses, and a reward model on the last."""
    port = free_port()
    process = annotator(repo, tmp_path, port, 90)
    watcher = threading.Thread(target=process.communicate)
    watcher.start()
    page = f"pipeline.overrides.collect=['data.num_prompts=12','labels=page','labels.port={port}']"
    tiny = [*TINY_MODEL["transformer"], *TINY_DATA]
    evaluate = "pipeline.overrides.evaluate=['data.max_rows=8']"
    try:
        run_train(
            repo, tmp_path, *tiny, "pipeline.steps=[sft]", "pipeline.rounds=2", "pipeline.report=false", page, evaluate
        )
    finally:
        kill_group(process.pid)
        watcher.join()
    files = [tmp_path / "rlhf" / f"round_{number}" / "collect" / "preferences.jsonl" for number in (1, 2)]
    for file in files:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file.open(newline="\n")]
        assert rows
        assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    data = ["data=jsonl", f"data.train={files[-1]}", "data.template='{prompt}\\nSummary:'", "data.batch_size=4"]
    run_train(repo, tmp_path, "stage=reward", "trainer=cpu", *data)
    assert (tmp_path / "rlhf" / "reward" / "reward_model_final.pt").is_file()
