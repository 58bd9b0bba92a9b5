"""The reference's log-probs on disk: computed once for a model and data, never taken for those of others."""

import json
import logging
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers import Fixed
from rlhf.data import EncodedResponse, SequenceBatch
from rlhf.dpo.ref_logprobs import ReferenceLogprobs, model_key
from rlhf.export import save_result
from rlhf.models import Transformer
from rlhf.stage import Result

ANSWERS = [EncodedResponse([1, 5, 6, 2], 2), EncodedResponse([1, 7, 8, 9, 2], 3), EncodedResponse([1, 5, 2], 1)]
one_architecture = pytest.mark.parametrize("architecture", ["transformer"], indirect=True)


class Scorer:
    """Says of a text the sum of its answer's token ids, below 0, and counts how many texts it was asked for."""

    def __init__(self) -> None:
        self.texts = 0

    def __call__(self, texts: SequenceBatch) -> torch.Tensor:
        self.texts += len(texts.input_ids)
        return -(texts.input_ids * texts.response_mask).sum(dim=1).float()


def ask(folder: Path | None, answers: list[EncodedResponse] = ANSWERS, key: str = "model") -> tuple[list[float], int]:
    """The log-probs of the answers, and how many were computed for that."""
    scorer = Scorer()
    found = ReferenceLogprobs(scorer, batch_size=2, directory=folder, model_key=key).logprobs(answers, "train")
    return found.tolist(), scorer.texts


def test_each_answer_gets_its_own_number() -> None:
    """6 + 2, 9 + 2 and 5 + 2, although the longest are scored first and two at a time."""
    assert ask(None) == ([-8.0, -11.0, -7.0], 3)


def test_the_second_time_they_come_from_disk(tmp_path: Path) -> None:
    """One file, in a folder that is made, and nothing left beside it."""
    folder = tmp_path / "kept"
    assert ask(folder) == ([-8.0, -11.0, -7.0], 3)
    assert ask(folder) == ([-8.0, -11.0, -7.0], 0)
    (file,) = folder.iterdir()
    assert file.suffix == ".pt"
    assert torch.load(file, weights_only=True)["logprobs"].tolist() == [-8.0, -11.0, -7.0]


@pytest.mark.parametrize(
    "answers",
    [
        ANSWERS[:2],
        [ANSWERS[1], ANSWERS[0], ANSWERS[2]],
        [EncodedResponse([1, 5, 6, 3], 2), *ANSWERS[1:]],
        [EncodedResponse([1, 5, 6, 2], 3), *ANSWERS[1:]],  # another boundary between prompt and answer
        [EncodedResponse([1, 5, 6, 2, 1], 2), EncodedResponse([7, 8, 9, 2], 3), ANSWERS[2]],  # the same tokens in a row
    ],
)
def test_other_rows_are_computed_anew(tmp_path: Path, answers: list[EncodedResponse]) -> None:
    ask(tmp_path)
    assert ask(tmp_path, answers) == (ask(None, answers)[0], len(answers))


def test_another_model_is_computed_anew(tmp_path: Path) -> None:
    ask(tmp_path)
    assert ask(tmp_path, key="other")[1] == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        {"logprobs": torch.zeros(2)},
        {"logprobs": torch.full((3,), torch.nan)},
        {"something": 1},
        {"logprobs": Scorer},
    ],
    ids=["empty", "garbage", "too few", "not finite", "another file", "code"],
)
def test_a_broken_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: Any) -> None:
    """With a warning that names it; code in it is not run; afterwards the file is whole."""
    ask(tmp_path)
    (file,) = tmp_path.iterdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with caplog.at_level(logging.WARNING):
        assert ask(tmp_path) == ([-8.0, -11.0, -7.0], 3)
    assert str(file) in caplog.text
    assert ask(tmp_path)[1] == 0


def test_a_key_names_weights_settings_and_arithmetic(lm: PreTrainedModel) -> None:
    """The same model from another place has the same key; one other weight, setting, type or precision has not."""
    key = model_key(lm, "32-true")
    same = deepcopy(lm)
    same.config._name_or_path = "elsewhere"
    assert model_key(same, "32-true") == key
    other_weight = deepcopy(lm)
    with torch.no_grad():
        other_weight.get_input_embeddings().weight[5, 3] += 1e-6
    other_setting = deepcopy(lm)
    other_setting.config.rope_theta_of_a_test = 7
    others = {
        model_key(other_weight, "32-true"),
        model_key(other_setting, "32-true"),
        model_key(lm, "bf16-mixed"),
        model_key(deepcopy(lm).bfloat16(), "32-true"),
    }
    assert len(others | {key}) == 5


@one_architecture
def test_runs_that_share_model_and_data_compute_once(setting: Any, tmp_path: Path) -> None:
    """Three values of beta and KTO, whose 16 answers are those of the 8 pairs: one file, and the same numbers as
    without it; another model, length or file of data makes another."""
    folder = tmp_path / "kept"

    def files(**keys: Any) -> int:
        setting.train(ref_logprobs_cache=str(folder), trainer={"max_steps": 1}, **keys)
        return len(list(folder.glob("*.pt")))

    assert [files(beta=beta) for beta in (0.05, 0.1, 0.3)] == [1, 1, 1]
    assert files(kto=True) == 1
    plain, kept = (
        setting.train(ref_logprobs_cache=cache, trainer={"max_epochs": 2})[1].curve("train/loss")
        for cache in (None, str(folder))
    )
    assert plain == kept
    changed = deepcopy(setting.lm)
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(1.01)
    assert files(policy=Fixed(changed)) == 2
    assert files(data={"max_length": 30}) == 3
    setting.pairs.write_text(setting.pairs.read_text().replace("Monday", "Tuesday"))
    assert files() == 4


@one_architecture
def test_a_trial_run_keeps_nothing(setting: Any, tmp_path: Path) -> None:
    """trainer.fast_dev_run writes nothing."""
    setting.train(ref_logprobs_cache=str(tmp_path / "kept"), trainer={"fast_dev_run": True})
    assert not (tmp_path / "kept").exists()


@pytest.mark.slow
def test_a_sweep_over_objectives_computes_once(repo: Path, tmp_path: Path, tokenizer: Any) -> None:
    """``-m loss=sigmoid,ipo,hinge``: three results, and of train and val log-probs one file each, written once."""
    lm = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32).language_model(tokenizer)
    save_result(Result(lm, tokenizer), tmp_path / "sft.pt", {})
    typed = [
        "-m",
        "stage=dpo",
        "loss=sigmoid,ipo,hinge",
        f"stage.policy={tmp_path / 'sft.pt'}",
        "data.max_rows=40",
        "trainer=cpu",
        "trainer.max_steps=2",
        "trainer.limit_val_batches=1",
        f"paths.root={tmp_path}",
    ]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "train.py", *typed], cwd=repo, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = sorted((tmp_path / "rlhf" / "sweeps").rglob("dpo_final.pt"))
    losses = [
        json.loads(torch.load(path, weights_only=True)["provenance"])["config"]["stage"]["loss"]["_target_"]
        for path in results
    ]
    assert {loss.rsplit(".", 1)[1] for loss in losses} == {"sigmoid_loss", "ipo_loss", "hinge_loss"}
    assert len(list((tmp_path / "rlhf" / "ref_logprobs").iterdir())) == 2
    logs = "".join((path.parent / "dpo.log").read_text() for path in results)
    assert (logs.count(": computed and stored in "), logs.count(": read from ")) == (2, 4)
