"""The cache of reference log-probs: computed once per model and data, and never used for other models or data."""

import json
import logging
import math
import weakref
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from transformers import PreTrainedModel

from harness import EXACT, PAIRS, FakeSource, TinyRun, one_architecture, run_train
from ranks import in_ranks
from rlhf.data import EncodedResponse, SequenceBatch
from rlhf.dpo.base import PreferenceModule
from rlhf.dpo.ref_logprobs import ReferenceLogprobs, model_key
from rlhf.errors import ConfigError
from rlhf.export import save_result
from rlhf.models import Transformer
from rlhf.stage import Result

RESPONSES = [EncodedResponse([1, 5, 6, 2], 2), EncodedResponse([1, 7, 8, 9, 2], 3), EncodedResponse([1, 5, 2], 1)]


@dataclass
class Row:
    """An encoded row with one response."""

    response: EncodedResponse
    ref_logprobs: tuple[float, ...] | None = None

    @property
    def responses(self) -> tuple[EncodedResponse]:
        return (self.response,)


class Scorer:
    """Returns minus the sum of the token ids of each response, and counts the responses."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, sequences: SequenceBatch) -> torch.Tensor:
        self.count += len(sequences.input_ids)
        return -(sequences.input_ids * sequences.response_mask).sum(dim=1).float()


def compute(
    directory: Path | None, responses: list[EncodedResponse] = RESPONSES, key: str = "model"
) -> tuple[list[float], int]:
    """The log-probs of the responses, and how many were computed rather than read from the cache."""
    scorer, rows = Scorer(), [Row(response) for response in responses]
    ReferenceLogprobs(scorer, batch_size=2, directory=directory, model_key=key).fill(rows, "train")
    return [row.ref_logprobs[0] for row in rows], scorer.count


def test_log_probs_are_in_the_order_of_the_responses() -> None:
    """6 + 2, 9 + 2 and 5 + 2, although the longest sequences are scored first, in batches of two."""
    assert compute(None) == ([-8.0, -11.0, -7.0], 3)


def test_the_second_call_reads_the_cache(tmp_path: Path) -> None:
    """There is one file, in a directory that is created, and no temporary file."""
    directory = tmp_path / "cache"
    assert compute(directory) == ([-8.0, -11.0, -7.0], 3)
    assert compute(directory) == ([-8.0, -11.0, -7.0], 0)
    (file,) = directory.iterdir()
    assert file.suffix == ".pt"
    assert torch.load(file, weights_only=True)["logprobs"].tolist() == [-8.0, -11.0, -7.0]


@pytest.mark.parametrize(
    "responses",
    [
        RESPONSES[:2],
        [RESPONSES[1], RESPONSES[0], RESPONSES[2]],
        [EncodedResponse([1, 5, 6, 3], 2), *RESPONSES[1:]],
        [EncodedResponse([1, 5, 6, 2], 3), *RESPONSES[1:]],  # another boundary between prompt and response
        [
            EncodedResponse([1, 5, 6, 2, 1], 2),
            EncodedResponse([7, 8, 9, 2], 3),
            RESPONSES[2],
        ],  # another boundary of rows
    ],
)
def test_other_responses_are_not_read_from_the_cache(tmp_path: Path, responses: list[EncodedResponse]) -> None:
    compute(tmp_path)
    assert compute(tmp_path, responses) == (compute(None, responses)[0], len(responses))


def test_another_model_does_not_read_the_cache(tmp_path: Path) -> None:
    compute(tmp_path)
    assert compute(tmp_path, key="other")[1] == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive",
        {"logprobs": torch.zeros(2)},
        {"logprobs": torch.full((3,), torch.inf)},
        {"something": 1},
        {"logprobs": Scorer},
    ],
    ids=["empty", "garbage", "too few", "not finite", "another file", "code"],
)
def test_an_invalid_file_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: Any) -> None:
    """A warning names the file, and code in it is not run."""
    compute(tmp_path)
    (file,) = tmp_path.iterdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with caplog.at_level(logging.WARNING):
        assert compute(tmp_path) == ([-8.0, -11.0, -7.0], 3)
    assert str(file) in caplog.text
    assert compute(tmp_path)[1] == 0


def test_the_key_depends_on_weights_configuration_and_arithmetic(lm: PreTrainedModel) -> None:
    """The key does not depend on the path, but on every weight, every setting, the dtype and the precision."""
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
def test_runs_that_share_model_and_data_compute_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Three values of beta share one file. KTO, which has mismatched sequences, makes another one.

    Training with the cache is the same as without it. Another model, another length and other data each make a file.
    """
    directory = tmp_path / "cache"

    def files(stage: str = "dpo", **keys: Any) -> int:
        tiny_run.train(stage, ref_logprobs_cache=str(directory), trainer={"max_steps": 1}, **keys)
        return len(list(directory.glob("*.pt")))

    assert [files(beta=beta) for beta in (0.05, 0.1, 0.3)] == [1, 1, 1]
    assert [files("kto"), files("kto")] == [2, 2]
    uncached, cached = (
        tiny_run.train("dpo", ref_logprobs_cache=cache, trainer={"max_epochs": 2}).curve("train/loss")
        for cache in (None, str(directory))
    )
    assert uncached == cached
    changed = deepcopy(tiny_run.lm)
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(1.01)
    assert files(policy=FakeSource(changed)) == 3
    assert files(data={"max_length": 30}) == 4
    rows = [{**pair, "chosen": pair["chosen"].replace("May", "June")} for pair in PAIRS]
    assert files(data={"train": tiny_run.write("changed", rows)}) == 5


@one_architecture
def test_fast_dev_run_stores_nothing(tiny_run: TinyRun, tmp_path: Path) -> None:
    tiny_run.train("dpo", ref_logprobs_cache=str(tmp_path / "cache"), trainer={"fast_dev_run": True})
    assert not (tmp_path / "cache").exists()


class WatchedSource(FakeSource):
    """A source that keeps weak references to the models that it has opened."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.opened: list[weakref.ref[torch.nn.Module]] = []

    def language_model(self, tokenizer: Any) -> Any:
        model = super().language_model(tokenizer)
        self.opened.append(weakref.ref(model))
        return model


@one_architecture
@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("precompute", [True, False])
def test_the_reference_model_is_freed_when_its_log_probs_are_known(
    tiny_run: TinyRun, stage: str, precompute: bool
) -> None:
    """Nothing refers to it during training, and validation uses precomputed log-probs as well."""
    source, alive = WatchedSource(tiny_run.lm), []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            policy, reference = source.opened
            alive.append((policy() is not None, reference() is not None))

    val = tiny_run.write("val", PAIRS[:3])
    run = tiny_run.train(
        stage, policy=source, precompute_ref_logprobs=precompute, data={"val": val}, callbacks=[Watch()]
    )
    assert set(alive) == {(True, not precompute)}
    assert "val/loss" in run.trainer.callback_metrics


@one_architecture
def test_a_resumed_run_frees_the_reference_model_and_ends_with_the_same_weights(tiny_run: TinyRun) -> None:
    whole = tiny_run.train("dpo", trainer={"max_epochs": 2})
    first = tiny_run.train("dpo", trainer={"max_epochs": 1})
    path = tiny_run.folder / "first.ckpt"
    first.trainer.save_checkpoint(path)
    second = tiny_run.train("dpo", trainer={"max_epochs": 2}, resume=path)
    assert second.module.reference is None
    torch.testing.assert_close(second.weights, whole.weights, **EXACT)


@one_architecture
def test_data_without_precomputed_log_probs_are_rejected_after_the_model_is_freed(tiny_run: TinyRun) -> None:
    run = tiny_run.train("dpo", precompute_ref_logprobs=True, trainer={"max_steps": 1})
    with pytest.raises(ConfigError, match=r"Set stage\.precompute_ref_logprobs=false"):
        run.trainer.validate(run.module, tiny_run.datamodule("dpo", val=tiny_run.write("other", PAIRS)), verbose=False)


@one_architecture
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_log_probs_are_computed_with_the_first_batch_that_needs_them(
    tiny_run: TinyRun, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second epoch computes none, and training is the same as with log-probs that are computed at each step."""
    counts: list[int] = []
    compute = PreferenceModule.compute_ref_logprobs

    def count(module: Any, sequences: SequenceBatch) -> torch.Tensor:
        counts.append(len(sequences.input_ids))
        return compute(module, sequences)

    monkeypatch.setattr(PreferenceModule, "compute_ref_logprobs", count)
    keys = {"trainer": {"max_epochs": 2}, "data": {"val": tiny_run.write("val", PAIRS[:3])}}
    found = tiny_run.train(stage, **keys)
    assert sum(counts) == sum(
        len(row.responses) for split in ("train", "val") for row in found.datamodule.encoded(split)
    )
    assert found.module.reference is None
    expected = tiny_run.train(stage, precompute_ref_logprobs=False, **keys)
    assert found.curve("train/loss") == pytest.approx(expected.curve("train/loss"), rel=1e-4)


@one_architecture
def test_a_run_that_is_resumed_within_an_epoch_computes_only_the_rest(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The checkpoint contains the log-probs of two of four batches; the other two are computed after resuming."""
    path = tmp_path / "step2.ckpt"

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(path)

    keys = {"trainer": {"max_epochs": 2}}
    whole = tiny_run.train("dpo", callbacks=[Save()], **keys)
    stored = torch.load(path, weights_only=True)["ref_logprobs"]["train"]["logprobs"]
    assert int(stored.isnan().any(dim=1).sum()) == len(stored) // 2
    second = tiny_run.train("dpo", resume=path, **keys)
    torch.testing.assert_close(second.weights, whole.weights, **EXACT)


@one_architecture
def test_a_run_that_is_resumed_with_other_rows_computes_their_log_probs(tiny_run: TinyRun, tmp_path: Path) -> None:
    """As many rows, in another order, as another seed of the split leads to. The first loss is log 2 again."""
    path = tmp_path / "epoch1.ckpt"
    keys = {"trainer": {"max_epochs": 1}, "learning_rate": 1e-9}
    tiny_run.train("dpo", **keys).trainer.save_checkpoint(path)
    train = tiny_run.write("other", PAIRS[::-1])
    run = tiny_run.train("dpo", resume=path, data={"train": train}, **{**keys, "trainer": {"max_epochs": 2}})
    assert run.curve("train/loss")[0] == pytest.approx(math.log(2), rel=1e-4)


@one_architecture
def test_other_validation_data_do_not_change_what_is_known(tiny_run: TinyRun) -> None:
    run = tiny_run.train("dpo", trainer={"max_steps": 1}, data={"val": tiny_run.write("val", PAIRS[:3])})
    before = run.module._known.state_dict()["val"]["logprobs"].clone()
    other = tiny_run.datamodule("dpo", val=tiny_run.write("other", PAIRS[3:6]))
    run.trainer.validate(run.module, other, verbose=False)
    after = run.module._known.state_dict()["val"]["logprobs"]
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def add_on_a_rank(rank: int, directory: Path) -> list[float]:
    """Each rank adds the log-prob of one of three rows; the third one stays unknown."""
    rows = [Row(response) for response in RESPONSES]
    known = ReferenceLogprobs(Scorer(), batch_size=2, directory=directory, model_key="model")
    known.attach(rows, "train")
    known.add("train", [rank], torch.tensor([[-10.0 - rank]]))
    known.share()
    assert not known.complete
    return [torch.nan if row.ref_logprobs is None else row.ref_logprobs[0] for row in rows]


def test_ranks_share_what_they_have_computed(tmp_path: Path) -> None:
    """What was stored is not computed again: of three rows, one is missing."""
    for values in in_ranks(add_on_a_rank, tmp_path / "cache"):
        assert values[:2] == [-10.0, -11.0]
        assert values[2] != values[2]
    assert compute(tmp_path / "cache") == ([-10.0, -11.0, -7.0], 1)


def compute_on_a_rank(rank: int, directory: Path) -> list[tuple[list[float], int]]:
    """Log-probs without a cache, with an empty one, and with a full one, each with the number of computed responses."""
    many = [*RESPONSES, EncodedResponse([1, 4, 2], 1), EncodedResponse([1, 3, 2], 1)]
    return [compute(where, many) for where in (None, directory, directory)]


def test_ranks_share_the_work_and_get_all_log_probs(tmp_path: Path) -> None:
    """5 responses are 3 chunks of 2, 2 and 1. Rank 0 computes two of them; rank 1 one, and repeats the last one.

    A sharded model needs the same number of forward passes on every rank. There is one file, from rank 0.
    """
    ranks = in_ranks(compute_on_a_rank, tmp_path / "cache")
    expected = [-8.0, -11.0, -7.0, -6.0, -5.0]
    assert [[values for values, _ in calls] for calls in ranks] == [[expected] * 3] * 2
    assert [[count for _, count in calls] for calls in ranks] == [[3, 3, 0], [3, 3, 0]]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_a_sweep_over_losses_computes_once(repo: Path, tmp_path: Path, tokenizer: Any) -> None:
    """``-m loss=sigmoid,ipo,hinge`` makes three results. The log-probs of train and val are computed once."""
    lm = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32).language_model(tokenizer)
    save_result(Result(lm, tokenizer), tmp_path / "sft.pt", {})
    overrides = [
        "-m",
        "stage=dpo",
        "loss=sigmoid,ipo,hinge",
        f"stage.policy={tmp_path / 'sft.pt'}",
        "data.max_rows=40",
        "trainer=cpu",
        "trainer.max_steps=2",
        "trainer.limit_val_batches=1",
    ]
    run_train(repo, tmp_path, *overrides)
    results = sorted((tmp_path / "rlhf" / "sweeps").rglob("dpo_final.pt"))
    losses = [
        json.loads(torch.load(path, weights_only=True)["provenance"])["config"]["stage"]["loss"]["_target_"]
        for path in results
    ]
    assert {loss.rsplit(".", 1)[1] for loss in losses} == {"sigmoid_loss", "ipo_loss", "hinge_loss"}
    assert len(list((tmp_path / "rlhf" / "ref_logprobs").iterdir())) == 2
    logs = "".join((path.parent / "dpo.log").read_text() for path in results)
    assert logs.count(": read from ") == 4  # train and val of the second and third job
