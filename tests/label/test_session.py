"""Which pair comes next, what is on disk, and what survives a crash."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import Preference
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader
from rlhf.errors import ConfigError, DataError
from rlhf.label.journal import Event, Journal
from rlhf.label.pairs import Pair, Response
from rlhf.label.session import Session
from rlhf.label.summary import summarize

Open = Callable[..., Session]


def prefer(session: Session, annotator: str, pair: Pair, model: str, **keys: Any) -> bool:
    """Choose the response of a model, on whichever side it is."""
    side = "first" if pair.first.model == model else "second"
    return session.choose(annotator, pair.id, "left" if session.left(pair, annotator) == side else "right", **keys)


def preferences(folder: Path) -> list[dict[str, Any]]:
    path = folder / "preferences.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_choice_is_on_disk_as_a_preference_row(open_session: Open, pairs: list[Pair], tmp_path: Path) -> None:
    session = open_session()
    prefer(session, "Ada", pairs[0], "b", reason="shorter")
    assert preferences(tmp_path) == [
        {
            "prompt": "prompt 0",
            "chosen": "text b 0",
            "rejected": "text a 0",
            "chosen_model": "b",
            "rejected_model": "a",
            "annotators": ["Ada"],
            "reasons": ["shorter"],
        }
    ]
    prefer(session, "Ada", pairs[1], "a")
    rows = RecordReader(RecordParser()).read(str(tmp_path / "preferences.jsonl"), "train", (Preference,))
    assert [(row.prompt.raw_text, row.chosen) for row in rows] == [("prompt 0", "text b 0"), ("prompt 1", "text a 1")]


@pytest.mark.parametrize("choice", ["tie", "both_bad", "skip"])
def test_a_pair_without_a_winner_is_no_preference(
    open_session: Open, pairs: list[Pair], tmp_path: Path, choice: str
) -> None:
    session = open_session()
    session.choose("Ada", pairs[0].id, choice)
    assert preferences(tmp_path) == []
    assert session.next_pair("Ada") is pairs[1]


def test_a_session_continues_after_a_crash(open_session: Open, pairs: list[Pair], tmp_path: Path) -> None:
    """Nothing closes the files of the first session. Half a line of the journal, or of the preferences, is dropped."""
    first = open_session()
    for pair in pairs[:3]:
        prefer(first, "Ada", pair, "b")
    for name in ("journal.jsonl", "preferences.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"pair": "12')
    second = open_session()
    assert second.next_pair("Ada") is pairs[3]
    assert [row["prompt"] for row in preferences(tmp_path)] == ["prompt 0", "prompt 1", "prompt 2"]
    prefer(second, "Ada", pairs[3], "b")
    assert len(preferences(tmp_path)) == 4
    assert len(Journal(tmp_path / "journal.jsonl").events) == 4


def test_choices_between_earlier_responses_stay_in_the_file(
    open_session: Open, pairs: list[Pair], tmp_path: Path
) -> None:
    """An evaluation that is run again has other responses. A choice that is changed replaces its row only."""
    earlier = [Pair("prompt 0", Response("old a", "a"), Response("old \ud800 b", "b"))]
    prefer(Session(earlier, tmp_path, overlap=0.0), "Ada", earlier[0], "b")
    session = open_session()
    assert [row["chosen"] for row in preferences(tmp_path)] == ["old ? b"]
    prefer(session, "Ada", pairs[0], "b")
    prefer(session, "Ada", pairs[0], "a")
    assert [row["chosen"] for row in preferences(tmp_path)] == ["old ? b", "text a 0"]
    prefer(Session(earlier, tmp_path, overlap=0.0), "Ada", earlier[0], "a")
    assert [row["chosen"] for row in preferences(tmp_path)] == ["text a 0", "old a"]


def test_choices_are_those_of_the_same_responses_in_another_order(pairs: list[Pair], tmp_path: Path) -> None:
    """An evaluation that is run again may list the models in another order. The pair is not labeled again."""
    session = Session(pairs, tmp_path)
    prefer(session, "Ada", pairs[0], "b", reason="shorter")
    session.choose("Ada", pairs[1].id, "tie")
    before = preferences(tmp_path)
    others = [replace(pair, first=pair.second, second=pair.first) for pair in pairs]
    session = Session(others, tmp_path)
    assert preferences(tmp_path) == before
    assert session.progress("Ada") == {"total": 6, "labeled": 2, "skipped": 0, "own": 2}
    assert summarize(session)["win_rates"][0]["value"] == 0.25  # a wins 0 + 1/2 of 2 choices
    assert session.undo("Ada") is others[1]
    prefer(session, "Ada", others[0], "a")
    assert [row["chosen"] for row in preferences(tmp_path)] == ["text a 0"]
    assert Session(pairs, tmp_path).progress("Ada")["labeled"] == 1
    assert [row["chosen"] for row in preferences(tmp_path)] == ["text a 0"]


def test_a_request_that_is_sent_again_changes_nothing(open_session: Open, pairs: list[Pair], tmp_path: Path) -> None:
    """Another choice for the same pair replaces the first one."""
    session = open_session()
    assert prefer(session, "Ada", pairs[0], "b")
    assert not prefer(session, "Ada", pairs[0], "b")
    assert len(session.journal.events) == len(preferences(tmp_path)) == 1
    assert prefer(session, "Ada", pairs[0], "a")
    assert [row["chosen"] for row in preferences(tmp_path)] == ["text a 0"]


def test_undo_returns_to_the_last_pair(open_session: Open, pairs: list[Pair], tmp_path: Path) -> None:
    """Also after a restart, and of the own choices only."""
    session = open_session()
    prefer(session, "Ada", pairs[0], "b")
    prefer(session, "Ben", pairs[1], "b")
    session = open_session()
    assert session.undo("Ada") is pairs[0]
    assert [row["prompt"] for row in preferences(tmp_path)] == ["prompt 1"]
    assert session.next_pair("Ada") is pairs[0]
    assert session.undo("Ada") is None
    assert open_session().next_pair("Ada") is pairs[0]


def test_two_annotators_get_different_pairs(open_session: Open, pairs: list[Pair]) -> None:
    """Whoever opens a pair first labels it. At the end, a pair that somebody has left open is offered again."""
    session = open_session()
    assert session.next_pair("Ada") is pairs[0]
    assert session.next_pair("Ben") is pairs[1]
    assert session.next_pair("Ada") is pairs[0]
    for _ in range(5):
        prefer(session, "Ben", session.next_pair("Ben") or pairs[0], "a")
    assert session.next_pair("Ben") is pairs[0]


def test_shared_pairs_are_judged_by_everybody(open_session: Open, pairs: list[Pair], tmp_path: Path) -> None:
    """A majority decides; without one, the pair is no preference."""
    session = open_session(overlap=1.0)
    prefer(session, "Ada", pairs[0], "b")
    assert session.next_pair("Ben") is pairs[0]
    prefer(session, "Ben", pairs[0], "a")
    assert preferences(tmp_path) == []
    prefer(session, "Cem", pairs[0], "a")
    assert [(row["chosen"], row["annotators"]) for row in preferences(tmp_path)] == [("text a 0", ["Ben", "Cem"])]
    assert session.progress("Ada") == {"total": 6, "labeled": 1, "skipped": 0, "own": 1}


def test_a_skipped_pair_is_offered_to_others(open_session: Open, pairs: list[Pair]) -> None:
    session = open_session()
    session.choose("Ada", pairs[0].id, "skip")
    assert session.progress("Ada") == {"total": 6, "labeled": 0, "skipped": 1, "own": 1}
    assert session.next_pair("Ben") is pairs[0]
    prefer(session, "Ben", pairs[0], "a")
    assert session.progress("Ada") == {"total": 6, "labeled": 1, "skipped": 0, "own": 1}


def test_sides_are_random_but_fixed(open_session: Open, pairs: list[Pair]) -> None:
    sides = {(pair.id, name): open_session().left(pair, name) for pair in pairs for name in ("Ada", "Ben", "Cem")}
    assert set(sides.values()) == {"first", "second"}
    session = open_session()
    assert all(session.left(pair, name) == sides[pair.id, name] for pair in pairs for name in ("Ada", "Ben", "Cem"))


def test_a_session_is_complete_when_every_pair_has_a_choice(open_session: Open, pairs: list[Pair]) -> None:
    session = open_session()
    for pair in pairs:
        assert not session.is_complete
        session.choose("Ada", pair.id, "skip")
    assert session.is_complete
    assert session.next_pair("Ada") is None


def test_statistics_by_hand(open_session: Open, pairs: list[Pair]) -> None:
    """Ada prefers b, b, a, and a tie; the reward model prefers b. Ben labels the first two: b, a.

    Wins of a over b: Ada 0 + 0 + 1 + 0.5, Ben 0 + 1: 2.5 of 6. The reward model agrees with 3 of 5.
    """
    session = open_session(overlap=1.0)
    for pair, model in zip(pairs, "bba", strict=False):
        prefer(session, "Ada", pair, model)
    session.choose("Ada", pairs[3].id, "tie")
    session.choose("Ada", pairs[4].id, "skip")
    for pair, model in zip(pairs, "ba", strict=False):
        prefer(session, "Ben", pair, model)
    found = summarize(session)
    assert found["annotators"] == {"Ada": 4, "Ben": 2}
    (rate,) = found["win_rates"]
    assert (rate["model"], rate["versus"], rate["choices"]) == ("a", "b", 6)
    assert rate["value"] == pytest.approx(2.5 / 6)
    assert found["reward_model"]["value"] == pytest.approx(3 / 5)
    assert found["kappa"] == [{"annotators": ["Ada", "Ben"], "kappa": 0.0, "pairs": 2}]


def test_a_choice_counts_for_all_models_that_gave_the_responses(open_session: Open, pairs: list[Pair]) -> None:
    pairs[0] = replace(pairs[0], equal=(("c", "b"), ("b", "a")))
    session = open_session()
    prefer(session, "Ada", pairs[0], "a")
    rates = [
        tuple(rate[key] for key in ("model", "versus", "value", "choices")) for rate in summarize(session)["win_rates"]
    ]
    assert rates == [("a", "b", 0.5, 2), ("b", "c", 0.0, 1)]


def test_unknown_pairs_and_damaged_journals_are_errors(open_session: Open, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no pair 1234"):
        open_session().choose("Ada", "1234", "tie")
    (tmp_path / "journal.jsonl").write_text('{"pair": "a", "annotator": "b", "choice": "best"}\n')
    with pytest.raises(DataError, match=r"journal\.jsonl:1: the choice must be one of .*, got best\."):
        open_session()
    (tmp_path / "journal.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"journal\.jsonl:1: the line must be a choice"):
        open_session()


@pytest.mark.parametrize(
    "line", [b'{"prompt": "p", "chosen', b'{"prompt": "p"}', b'["p"]', b'"p"', b"\xff", b"[" * 100_000]
)
def test_a_damaged_preference_row_is_reported(
    open_session: Open, pairs: list[Pair], tmp_path: Path, line: bytes
) -> None:
    """Without the line, the session continues: every choice is in the journal. A blank line does no harm."""
    prefer(open_session(), "Ada", pairs[0], "b")
    path = tmp_path / "preferences.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(DataError, match=r"preferences\.jsonl:2: the line must have .*\n  Remove the line"):
        open_session()
    path.write_bytes(b"\n  \n")
    open_session()
    assert [row["chosen"] for row in preferences(tmp_path)] == ["text b 0"]


def test_choices_of_other_pairs_are_kept(open_session: Open, tmp_path: Path) -> None:
    """Another file of pairs may have been labeled in the same directory."""
    Journal(tmp_path / "journal.jsonl").append(Event("elsewhere", "Ada", "first"))
    assert open_session().progress("Ada") == {"total": 6, "labeled": 0, "skipped": 0, "own": 0}
    assert len(Journal(tmp_path / "journal.jsonl").events) == 1
