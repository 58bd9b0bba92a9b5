"""Files that pairs are read from, and the order of the pairs."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from contract.configs import compose_config, hydra_command
from rlhf.errors import ConfigError, DataError
from rlhf.label import label
from rlhf.label.pairs import Pair, Response, in_order, read_pairs

SAMPLE = {
    "prompt": "p",
    "target": "t",
    "responses": {"sft": {"text": "x", "reward": 0.5}, "ppo": {"text": "y", "reward": 1.5}, "dpo": {"text": "x"}},
}
MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_two_different_responses_of_an_evaluation_form_a_pair(tmp_path: Path) -> None:
    """The responses of SFT and DPO are identical, and so are the two pairs with that of PPO: one of them is kept."""
    (pair,) = read_pairs(write(tmp_path, SAMPLE))
    assert (pair.prompt, pair.first, pair.second) == ("p", Response("x", "sft", 0.5), Response("y", "ppo", 1.5))
    assert pair.equal == (("dpo", "ppo"),)


def test_models_can_be_chosen(tmp_path: Path) -> None:
    (pair,) = read_pairs(write(tmp_path, SAMPLE), ["ppo", "dpo"])
    assert {pair.first.model, pair.second.model} == {"ppo", "dpo"}
    with pytest.raises(ConfigError, match=r"command\.models contains kto, but .* has responses of dpo, ppo, sft\."):
        read_pairs(write(tmp_path, SAMPLE), ["kto", "sft"])


def test_candidates_of_one_policy_form_pairs(tmp_path: Path) -> None:
    row = {"prompt": MESSAGES, "responses": [{"text": "x", "scores": [1, 2]}, {"text": "y", "scores": [0, 3]}]}
    (pair,) = read_pairs(write(tmp_path, row))
    assert pair.prompt_text() == "user: one\n\nassistant: two"
    assert pair.disagreement == 1.0  # The differences are 1 and -1.


def test_the_id_depends_on_the_texts_only() -> None:
    pair = Pair("p", Response("x", "a", 1.0), Response("y", "b"))
    assert pair.id == Pair("p", Response("x"), Response("y")).id
    assert len({pair.id, Pair("p", Response("y"), Response("x")).id, Pair("q", Response("x"), Response("y")).id}) == 3


def test_orders() -> None:
    """With disagreement, the largest one comes first."""
    pairs = [
        Pair(f"p{n}", Response("x", scores=(n, 0.0)), Response("y", scores=(0.0, 0.0))) for n in (1.0, 3.0, 2.0, 0.0)
    ]
    prompts = {select: [pair.prompt for pair in in_order(pairs, select, 1)] for select in ("order", "disagreement")}
    assert prompts == {"order": ["p1.0", "p3.0", "p2.0", "p0.0"], "disagreement": ["p3.0", "p2.0", "p1.0", "p0.0"]}
    assert in_order(pairs, "random", 1) == in_order(pairs, "random", 1)
    assert sorted(pair.prompt for pair in in_order(pairs, "random", 1)) == sorted(pair.prompt for pair in pairs)
    with pytest.raises(ConfigError, match=r"command\.select=disagreement requires the scores of an ensemble"):
        in_order([Pair("p", Response("x"), Response("y"))], "disagreement", 1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p"},
        {"prompt": 5, "responses": []},
        {"prompt": [{"role": "user"}], "responses": []},
        {"prompt": "p", "responses": [{"text": 1}, {"text": "y"}]},
        {"prompt": "p", "responses": [{"text": "\ud800"}, {"text": "y"}]},
        {"prompt": "p", "responses": {"sft": "x"}},
        {"prompt": "p", "responses": [{"text": "x", "score": "high"}]},
        [1],
    ],
)
def test_other_rows_are_located(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match=r"samples\.jsonl:2: the row must have a prompt and responses"):
        read_pairs(write(tmp_path, SAMPLE, row))


def test_a_file_without_pairs_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains no prompt with two different responses"):
        read_pairs(write(tmp_path, {"prompt": "p", "responses": [{"text": "x"}, {"text": "x"}]}))


def test_the_suggested_command_evaluates_the_run(tmp_path: Path) -> None:
    cfg = compose_config("stage=label", f"paths.root={tmp_path}", "run=my run")
    with pytest.raises(ConfigError, match="there is no such file, or it is empty") as error:
        label(cfg)
    (command,) = re.findall(r"\n  Run python train\.py (.*), or set command\.pairs=", str(error.value))
    with hydra_command(*shlex.split(command)) as evaluation:
        assert (evaluation.stage_name, evaluation.paths.run) == ("evaluate", f"{tmp_path}/my run")
