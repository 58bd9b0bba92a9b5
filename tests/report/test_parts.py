"""Parts of a report: thinned curves, differences of words, alerts, text logs, provenance, rounding."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from report.conftest import write_events
from rlhf.report.comparison import short_names
from rlhf.report.curves import identifier
from rlhf.report.events import Alert, Curve, TextLog, find_alerts, read_events, read_text_log
from rlhf.report.figures import thin
from rlhf.report.page import json_data
from rlhf.report.plots import is_noisy, running_mean
from rlhf.report.samples import MAX_COMPARED, read_samples, word_segments
from rlhf.report.settings import differing_settings
from rlhf.report.tables import duration, rounded, size
from rlhf.runs.provenance import read_provenance

SAME, ADDED, REMOVED = 0, 1, 2


def test_a_thinned_curve_keeps_logged_points_and_spikes() -> None:
    steps, values = list(range(10_000)), [float(step % 7) for step in range(10_000)]
    values[5003], values[7777] = 99.0, -99.0
    values[123] = math.nan
    kept_steps, kept = thin(steps, values)
    assert len(kept_steps) <= 500
    assert kept_steps == sorted(set(kept_steps))
    assert all(values[step] == value for step, value in zip(kept_steps, kept, strict=True))
    assert {0, 5003, 7777, 9999} <= set(kept_steps)
    assert thin([1, 2], [0.5, 0.25]) == ([1, 2], [0.5, 0.25])


def test_a_point_is_in_the_middle_of_its_running_mean() -> None:
    """A window of 5 points, of 3 and 4 at the ends: (0 + 10 + 20) / 3 = 10, (0 + 10 + 20 + 30) / 4 = 15."""
    assert running_mean([0.0, 10.0, 20.0, 30.0, 40.0]) == [10.0, 15.0, 20.0, 25.0, 30.0]
    assert running_mean([0.0, 0.0, 6.0, 0.0, math.nan]) == [2.0, 1.5, 1.5, 2.0, 3.0]
    assert running_mean([]) == []
    spiked = running_mean([1e30, *[1.0] * 9, math.inf, *[math.nan] * 5])
    assert spiked[3:11] == [1.0] * 8
    assert math.isnan(spiked[-1])


def test_a_schedule_is_not_noisy() -> None:
    """Its path is twice its range. That of a curve which alternates between two values is many times its range."""
    assert not is_noisy([0.0, 1.0, 2.0, 1.0, 0.0])
    assert is_noisy([0.0, 1.0] * 5)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("the old word", "the new word", [(SAME, "the "), (REMOVED, "old"), (ADDED, "new"), (SAME, " word")]),
        ("same", "same", [(SAME, "same")]),
        ("", "new", [(ADDED, "new")]),
        ("old", "", [(REMOVED, "old")]),
        ("on Monday.", "on Monday, here.", [(SAME, "on Monday"), (ADDED, ", here"), (SAME, ".")]),
    ],
)
def test_differences_of_words(old: str, new: str, expected: list[tuple[int, str]]) -> None:
    assert word_segments(old, new) == expected


def test_very_long_texts_are_compared_as_a_whole() -> None:
    long = "a " * MAX_COMPARED
    assert word_segments("short", long) == [(REMOVED, "short"), (ADDED, long)]


def test_samples_beyond_the_limit_are_counted(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "p", "target": None, "responses": {"sft": {"text": "t", "reward": math.nan}}})
    (tmp_path / "samples.jsonl").write_text(f"{row}\n" * 5 + "[]\n")
    samples = read_samples(tmp_path / "samples.jsonl", "sft", 2)
    assert (len(samples.rows), samples.total, samples.metrics) == (2, 6, [])
    assert samples.rows[0]["responses"]["sft"] == {"segments": [(SAME, "t")], "metrics": {}}
    assert "1 lines are damaged" in samples.problems[0]


def test_alerts_are_intervals_of_steps() -> None:
    """One that ends and fires again, one that is still active, and one that is only in the text log."""
    curves = {
        "alerts/kl": Curve([1, 2, 3, 4, 5], [0.0, 1.0, 1.0, 0.0, 1.0]),
        "alerts/length": Curve([1, 2], [0.0, 0.0]),
    }
    log = TextLog(alerts={("kl", 2): "too far", ("entropy", 4): "collapsed"})
    assert find_alerts(curves, log) == [
        Alert("kl", 2, 3, "too far"),
        Alert("entropy", 4, None, "collapsed"),
        Alert("kl", 5, 5, ""),
    ]


def test_a_resumed_run_replaces_the_steps_since_its_checkpoint(tmp_path: Path) -> None:
    write_events(tmp_path / "version_2", {"x": [(1, 1.0), (2, 2.0), (3, 3.0)], "y": [(1, 9.0)]})
    write_events(tmp_path / "version_10", {"x": [(2, 5.0), (4, 6.0)]})
    curves, problems = read_events(tmp_path)
    assert curves == {"x": Curve([1, 2, 4], [1.0, 5.0, 6.0]), "y": Curve([1], [9.0])}
    assert problems == []


def test_a_run_that_starts_over_replaces_all_curves(tmp_path: Path) -> None:
    """The second run has not validated yet, and has dropped a metric. The checkpoint of a resumed one was at step 3."""
    write_events(tmp_path / "version_0", {"x": [(1, 1.0), (2, 2.0)], "val/x": [(2, 9.0)], "old": [(1, 7.0)]})
    write_events(tmp_path / "version_1", {"x": [(1, 5.0), (3, 6.0), (4, 6.5)], "val/x": [(3, 8.0), (5, 8.5)]})
    write_events(tmp_path / "version_2", {"x": [(4, 4.0)]})
    curves, problems = read_events(tmp_path)
    assert curves == {"x": Curve([1, 3, 4], [5.0, 6.0, 4.0]), "val/x": Curve([3], [8.0])}
    assert problems == []


def test_a_text_log_has_metrics_alerts_and_times(tmp_path: Path) -> None:
    (tmp_path / "ppo.log").write_text(
        "2026-01-01 10:00:00,000 INFO step=1 grad_norm=nan train/loss=0.5\n"
        "2026-01-01 10:00:01,000 INFO step=1 samples of this step\n"
        "2026-01-01 10:00:02,000 WARNING alert kl at step 1: it is far. Do this.\n"
        "2026-01-01 10:00:02,000 WARNING other\n"
        "2026-01-01 10:00:02,000 WARNING other\n"
        "a line of a sample step=9 x=1\n"
        "2026-01-01 10:00:03,000 INFO stage=ppo took 61 s; its outputs are in o\n"
    )
    log = read_text_log(tmp_path / "ppo.log")
    assert log.curves["train/loss"] == Curve([1], [0.5])
    assert math.isnan(log.curves["grad_norm"].last)
    assert log.alerts == {("kl", 1): "it is far. Do this."}
    assert (log.warnings, log.started, log.seconds) == (["other"], "2026-01-01 10:00:00", 61.0)
    assert read_text_log(tmp_path / "none.log") == TextLog()


def test_provenance_is_read_without_unpickling(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return pytest.fail, ("the file must not be executed",)

    path = tmp_path / "a_final.pt"
    torch.save({"first": Hostile(), "provenance": json.dumps({"stage": "sft"}), "weights": torch.zeros(2)}, path)
    assert read_provenance(path) == {"stage": "sft"}


@pytest.mark.parametrize("content", [{"provenance": 3}, {"provenance": "[]"}, {"provenance": "{"}, {}])
def test_a_file_without_provenance(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "a_final.pt")
    with pytest.raises(ValueError):
        read_provenance(tmp_path / "a_final.pt")


def test_json_cannot_end_a_script() -> None:
    text = f"</script>&{chr(0x2028)}\ud800"
    encoded = str(json_data([text]))
    assert json.loads(encoded) == [text]
    assert not set("<>&") & set(encoded)
    assert encoded.isascii()


def test_settings_that_differ() -> None:
    """Paths and the name of the run are left out. A key that one configuration lacks differs."""
    first = {"run": "a", "paths": {"root": "x"}, "stage": {"beta": 0.1, "loss": {"_target_": "f"}, "same": [1]}}
    second = {
        "run": "b",
        "paths": {"root": "y"},
        "stage": {"beta": 0.2, "loss": {"_target_": "f"}, "same": [1], "k": None},
    }
    assert differing_settings({"a": first, "b": second}) == {
        "stage.beta": {"a": "0.1", "b": "0.2"},
        "stage.k": {"b": "null"},
    }


def test_names_of_jobs_are_shortened_to_what_differs() -> None:
    assert short_names(["loss=ipo,seed=1", "loss=hinge,seed=1"]) == ["loss=ipo", "loss=hinge"]
    assert short_names(["a", "a,b"]) == ["a", "a,b"]  # nothing would be left of the first one
    assert short_names(["a,b"]) == ["a,b"]


def test_identifiers_of_different_names_differ() -> None:
    assert identifier("train/loss") == "train_2floss"
    assert identifier("a_b") != identifier("a b") != identifier("a/b")


def test_rounding() -> None:
    values = (0.85667, -0.0265, 12.3456, 0.0, 300.0, 12345.0, 1e-7, math.nan)
    assert [rounded(value) for value in values] == [
        *("0.857", "\u22120.0265", "12.35", "0", "300", "12,345", "1e-07", "nan"),
    ]
    assert [duration(value) for value in (None, 9.4, 61.0, 7384.0)] == ["", "9 s", "1 min 1 s", "2 h 3 min"]
    assert [size(value).text for value in (7, 2048, 5_095_591, 123_456_789)] == ["7 B", "2.0 kB", "5.1 MB", "123 MB"]
