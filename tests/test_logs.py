"""The plain-text log of a stage."""

import io
import logging
from pathlib import Path

import pytest

from rlhf.logs import TextLogger, log_file, metrics_log


def test_messages_and_metrics_are_appended(tmp_path: Path) -> None:
    """A resumed run continues the file. Nothing is written to it outside of the context."""
    path, log = tmp_path / "sft" / "sft.log", logging.getLogger("rlhf.data")
    for message in ("first run", "second run"):
        with log_file(path):
            log.info(message)
        log.warning("between the runs")
    lines = path.read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["first run", "second run"]


def test_a_step_is_one_line_with_sorted_names(tmp_path: Path) -> None:
    with log_file(tmp_path / "log"):
        TextLogger().log_metrics({"train/loss": 0.123456789, "lr": 1e-4, "epoch": 0}, step=7)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.endswith(" INFO step=7 lr=0.0001 train/loss=0.123457")


def test_metrics_are_not_printed(tmp_path: Path) -> None:
    """They are written to the file once, and do not reach the handlers of the root logger, such as Hydra's."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger().addHandler(handler)
    try:
        with log_file(tmp_path / "log"):
            TextLogger().log_metrics({"train/loss": 1.0}, step=0)
            logging.getLogger("rlhf.run").info("a message")
    finally:
        logging.getLogger().removeHandler(handler)
    assert printed.getvalue() == "a message\n"
    assert (tmp_path / "log").read_text().count("train/loss=1") == 1


def test_only_this_package_is_logged(tmp_path: Path) -> None:
    with log_file(tmp_path / "log"):
        logging.getLogger("other").warning("from another library")
    assert (tmp_path / "log").read_text() == ""


def test_handlers_are_removed_after_an_error(tmp_path: Path) -> None:
    loggers = [logging.getLogger("rlhf"), metrics_log]
    before = [list(logger.handlers) for logger in loggers]
    with pytest.raises(ValueError, match="a bug"), log_file(tmp_path / "log"):
        raise ValueError("a bug")
    assert [list(logger.handlers) for logger in loggers] == before
