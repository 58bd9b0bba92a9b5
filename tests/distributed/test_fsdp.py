"""FSDP2: two ranks that share the weights train what one process trains, and continue each other's checkpoints."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distributed.test_ddp import EPS, LIMIT, FixedResponses, largest_difference, settings
from harness import TinyRun, make_eos_likely
from ranks import in_ranks
from rlhf.checkpoint import RunCheckpoint
from rlhf.data import PromptBatch
from rlhf.fsdp import FSDP2Strategy, replace_checkpoint
from rlhf.models import full_state_dict, local_tensor
from rlhf.reward_functions import ScoringBatch
from rlhf.rl import KLController
from rlhf.sampling import LocalSampler, SamplingParams
from rlhf.speed import speed

# "ppo_shared" has a value head on the policy, the exact KL and gradient checkpointing.
STAGES = ("sft", "reward", "dpo", "kto", "ppo", "ppo_shared", "grpo")
PAD = 0  # id of a token that no model samples


def strategy(ranks: int, *, directory: bool = False) -> dict[str, Any]:
    """Return the flags of ``lightning.Trainer`` for sharded training on the CPU."""
    shards = FSDP2Strategy(save_distributed_checkpoint=directory)
    return {"accelerator": "cpu", "devices": ranks, "strategy": shards}


def stage_keys(stage: str, ranks: int) -> dict[str, Any]:
    """Return the keywords of a run whose global batch does not depend on the number of ranks."""
    if stage != "ppo_shared":
        return settings(stage, ranks)
    kl = KLController(apply_to="loss", estimator="full")
    return {**settings("ppo", ranks), "critic": "shared", "kl": kl, "gradient_checkpointing": True}


def train(rank: int, tiny_run: TinyRun, ranks: int) -> dict[str, Any]:
    """Train each stage, sharded if there are several ranks, and describe what comes out."""
    results = {}
    for stage in STAGES:
        keys = stage_keys(stage, ranks)
        flags = {**keys.pop("trainer"), **(strategy(ranks) if ranks > 1 else {}), "default_root_dir": tiny_run.folder}
        run = tiny_run.train(stage.split("_")[0], trainer=flags, **keys)
        names = {name for call in run.logger.calls for name in call if not name.startswith("throughput/")}
        results[stage] = {
            "weights": full_state_dict(run.module),
            "metrics": {name: run.curve(name) for name in names},
            "shards": describe_shards(run.module),
        }
        if stage == "sft":
            results["samples"] = sample(run.module, 16 if rank else 2)
        if stage == "ppo":
            results["uneven"] = uneven(run.module, rank)
    if ranks > 1:
        results["mixed"] = mixed_precision(tiny_run, ranks)
    return results


def mixed_precision(tiny_run: TinyRun, ranks: int) -> dict[str, Any]:
    """Train one step of DPO under bf16-mixed, and count the bytes of the reference model."""
    flags = {**strategy(ranks), "max_steps": 1, "precision": "bf16-mixed", "default_root_dir": tiny_run.folder}
    run = tiny_run.train("dpo", trainer=flags, precompute_ref_logprobs=False)
    parameters = [local_tensor(parameter) for parameter in run.module.reference.model.parameters()]
    return {
        "margin": run.curve("rewards/margins")[0],
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "parameters": sum(parameter.numel() for parameter in parameters),
    }


def describe_shards(module: nn.Module) -> dict[str, Any]:
    """Count the parameters of all models of a stage, also of frozen ones."""
    parts = [module, *(getattr(part, "model", part) for part in module.modules() if type(part).__name__ == "Frozen")]
    parameters = {parameter for part in parts for parameter in part.parameters()}
    lm = getattr(getattr(module, "policy", None), "lm", None)
    return {
        "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters),
        "parameters": len(parameters),
        "local": sum(local_tensor(parameter).numel() for parameter in parameters),
        "total": sum(parameter.numel() for parameter in parameters),
        "tied": lm is None or lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
    }


def sample(module: Any, length: int) -> list[list[int]]:
    """Sample with the trained policy, the same draws on every rank. No response ends before ``length`` tokens."""
    never = module.tokenizer.convert_ids_to_tokens(PAD)
    sampler = LocalSampler()
    sampler.sync(module.policy.lm, module.tokenizer)
    torch.manual_seed(0)
    params = SamplingParams(max_new_tokens=length, stop_tokens=[never])
    return sampler.sample([[1, 5, 6], [1, 7]], params).response_ids()


def uneven(module: Any, rank: int) -> list[int]:
    """Sample, evaluate and score 5 prompts on rank 0 and 2 on rank 1, in batches of 2.

    Ranks need different numbers of batches.
    """
    prompts = PromptBatch([[1, 5 + row] for row in range(5 if rank == 0 else 2)], [])
    module.collector.rollout_batch_size = module.reward.batch_size = 2
    module.collector.sampler = LocalSampler()
    rollout = module.collector.sample(prompts)
    batch = ScoringBatch(rollout.input_ids, rollout.attention_mask, [], [], [])
    experience = module.collector.evaluate_in_order(rollout, 2)
    return [*module.reward(batch).shape, *experience.kl_per_sequence.shape]


@pytest.fixture(scope="session")
def architecture() -> str:
    """The stages do the same with every architecture."""
    return "transformer"


@pytest.fixture(scope="module")
def new_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, source: Any) -> Callable[[], TinyRun]:
    """A function that returns runs in a new directory, always from the same model."""

    def build() -> TinyRun:
        torch.manual_seed(0)
        lm = make_eos_likely(source.language_model(tokenizer).eval(), tokenizer.eos_token_id)
        return TinyRun(Path(tmp_path_factory.mktemp("runs")), tokenizer, lm)

    return build


@pytest.fixture(scope="module")
def results(new_run: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The results of ``train``: of one process, of rank 0 and of rank 1."""
    return (train(0, new_run(), 1), *in_ranks(train, new_run(), 2))


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_the_weights_of_one_process(results: Any, stage: str) -> None:
    one, first, second = (result[stage]["weights"] for result in results)
    assert second == {}  # Only rank 0 receives the complete weights.
    assert largest_difference(one, first) <= LIMIT
    assert extra_state(first) == {name: pytest.approx(state) for name, state in extra_state(one).items()}


def extra_state(weights: dict[str, Any]) -> dict[str, Any]:
    """Return what a state dict holds in addition to tensors, such as running moments of scores."""
    return {name: value for name, value in weights.items() if not torch.is_tensor(value)}


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_log_the_metrics_of_one_process(results: Any, stage: str) -> None:
    one, first, second = (result[stage]["metrics"] for result in results)
    assert one.keys() == first.keys()
    assert "grad_norm" in one
    for name, values in one.items():
        # A reward is the small difference of two log-probs of a whole response.
        assert first[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
        assert second[name] == first[name], name


@pytest.mark.parametrize("stage", STAGES)
def test_every_model_is_sharded_and_embeddings_stay_tied(results: Any, stage: str) -> None:
    _, first, second = (result[stage]["shards"] for result in results)
    for rank in (first, second):
        assert rank["sharded"] == rank["parameters"]
        assert rank["tied"]
    assert first["local"] + second["local"] == first["total"]
    assert first["local"] < 0.6 * first["total"]


def test_ranks_sample_different_numbers_of_tokens_from_the_gathered_policy(results: Any) -> None:
    """Rank 0 samples 2 tokens, rank 1 samples 16, and no rank waits for the other meanwhile."""
    one, first, second = (result["samples"] for result in results)
    assert [len(ids) for ids in (*one, *first, *second)] == [2, 2, 2, 2, 16, 16]
    assert first == one == [ids[:2] for ids in second]


def test_ranks_sample_evaluate_and_score_different_numbers_of_batches(results: Any) -> None:
    assert [result["uneven"] for result in results] == [[5, 5], [5, 5], [2, 2]]


def test_frozen_matrices_are_sharded_in_the_dtype_of_autocast(results: Any) -> None:
    """They take 2 bytes instead of 4. Before the first step, log-probs of policy and reference model are equal."""
    for result in results[1:]:
        found = result["mixed"]
        assert 2 * found["parameters"] < found["bytes"] < 3 * found["parameters"]
        assert found["margin"] == 0


# Checkpoints


def fit(
    tiny_run: TinyRun, stage: str, ranks: int, epochs: int, *, kind: str, save: Path | None, resume: Path | None = None
) -> dict[str, Any]:
    """Train some epochs with or without sharding (``kind`` is directory, file or plain) and return the result."""
    size = 4 // ranks
    keys: dict[str, Any] = {"data": {"batch_size": size}, "eps": EPS}
    if stage == "ppo":  # In the first iterations only the critic is trained: the policy has no moments yet.
        keys |= {"sampler": FixedResponses(), "minibatch_size": size, "ppo_epochs": 1, "critic_warmup": 2}
    callbacks = [] if save is None else [RunCheckpoint(None, dirpath=save, save_last=True, save_top_k=0)]
    flags = {} if kind == "plain" else strategy(ranks, directory=kind == "directory")
    flags |= {"max_epochs": epochs, "enable_checkpointing": save is not None, "default_root_dir": tiny_run.folder}
    run = tiny_run.train(stage, resume=resume and resume / "last.ckpt", trainer=flags, callbacks=callbacks, **keys)
    return {"weights": full_state_dict(run.module), "steps": run.trainer.global_step}


def save_checkpoints(rank: int, tiny_run: TinyRun, ranks: int, folder: Path) -> None:
    """Train one epoch and write a directory and a file."""
    for stage in ("sft", "ppo"):
        for kind in ("directory", "file"):
            fit(tiny_run, stage, ranks, 1, kind=kind, save=folder / f"{stage}-{kind}-{ranks}")


def resume_checkpoints(rank: int, tiny_run: TinyRun, ranks: int, folder: Path, written_by: int) -> dict[str, Any]:
    """Continue from the directory and from the file for one epoch more."""
    return {
        (stage, kind): fit(
            tiny_run, stage, ranks, 2, kind=kind, save=None, resume=folder / f"{stage}-{kind}-{written_by}"
        )
        for stage in ("sft", "ppo")
        for kind in ("directory", "file")
    }


def save_and_resume(rank: int, tiny_run: TinyRun, folder: Path) -> dict[str, Any]:
    """Write checkpoints on two ranks, and continue those of one rank."""
    save_checkpoints(rank, tiny_run, 2, folder)
    return resume_checkpoints(rank, tiny_run, 2, folder, 1)


@pytest.fixture(scope="module")
def resumed(new_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """Results of resumed runs by (stage, kind, ranks that wrote the checkpoint, ranks that continued)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    in_ranks(save_checkpoints, new_run(), 1, folder, ranks=1)
    on_two, _ = in_ranks(save_and_resume, new_run(), folder)
    (on_one,) = in_ranks(resume_checkpoints, new_run(), 1, folder, 2, ranks=1)
    results = {(*key, 1, 2): value for key, value in on_two.items()}
    results |= {(*key, 2, 1): value for key, value in on_one.items()}
    for stage in ("sft", "ppo"):  # Without trainer=fsdp, and a checkpoint that was written without it.
        path = folder / f"{stage}-file-2"
        with speed(
            packed_rows=False, row_groups=1, shared_prompts=False, lean_decoding=False
        ):  # as sharded models are computed
            results[stage, "plain", 2, 0] = fit(new_run(), stage, 1, 2, kind="plain", save=None, resume=path)
    return results


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_checkpoints_continue_on_another_number_of_ranks(resumed: Any, stage: str) -> None:
    """Directories and files, from 1 rank to 2, from 2 ranks to 1, and from 2 ranks to a run that is not sharded.

    In PPO, AdamW turns rounding errors of tiny gradients into larger ones, at a learning rate of 3e-4.
    """
    limit = 1e-4 if stage == "ppo" else LIMIT
    runs = {key: value for key, value in resumed.items() if key[0] == stage}
    assert len(runs) == 5
    expected = runs.pop((stage, "plain", 2, 0))
    for key, run in runs.items():
        assert run["steps"] == expected["steps"] == 4, key
        assert largest_difference(expected["weights"], run["weights"]) <= limit, key
        states = {name: pytest.approx(state) for name, state in extra_state(expected["weights"]).items()}
        assert extra_state(run["weights"]) == states, key
        assert bool(states) == (stage == "ppo")


def test_a_file_and_a_directory_continue_alike(resumed: Any) -> None:
    for stage in ("sft", "ppo"):
        for written, read in ((1, 2), (2, 1)):
            one, other = (resumed[stage, kind, written, read]["weights"] for kind in ("directory", "file"))
            assert largest_difference(one, other) == 0


def test_a_checkpoint_of_another_strategy_restores_the_moments(new_run: Any, tmp_path: Path) -> None:
    """Lightning numbers the parameters of a sharded optimizer in a different order from PyTorch."""
    tiny_run = new_run()
    uninterrupted = fit(tiny_run, "sft", 1, 2, kind="plain", save=None)
    fit(tiny_run, "sft", 1, 1, kind="plain", save=tmp_path / "sft-file-0")
    (resumed,) = in_ranks(resume_file, new_run(), tmp_path, ranks=1)
    assert largest_difference(uninterrupted["weights"], resumed["weights"]) <= LIMIT


def test_a_sharded_run_continues_within_an_epoch(new_run: Any, tmp_path: Path) -> None:
    """Lightning restores it after the data have been loaded. Every row is trained on once."""
    (rows,) = in_ranks(end_and_extend, new_run(), tmp_path, ranks=1)
    assert sorted(row for batch in rows for row in batch) == list(range(8))


def end_and_extend(rank: int, tiny_run: TinyRun, folder: Path) -> list[list[int]]:
    """Train on one of four batches, and on the others in a second run. Return the rows of all batches."""
    flags = {"max_epochs": 1, "default_root_dir": tiny_run.folder}
    keys: dict[str, Any] = {"data": {"batch_size": 2}}
    callback = RunCheckpoint(None, dirpath=folder, save_last=True, save_top_k=0)
    limits = {"max_steps": 1, "enable_checkpointing": True}
    first = tiny_run.train("sft", trainer={**strategy(1), **flags, **limits}, callbacks=[callback], **keys)
    second = tiny_run.train("sft", trainer={**strategy(1), **flags}, resume=folder / "last.ckpt", **keys)
    return [batch.indices for run in (first, second) for batch in run.batches]


def resume_file(rank: int, tiny_run: TinyRun, folder: Path) -> dict[str, Any]:
    """Continue a run that was not sharded."""
    return fit(tiny_run, "sft", 1, 2, kind="file", save=None, resume=folder / "sft-file-0")


def test_a_file_takes_the_place_of_a_directory(new_run: Any, tmp_path: Path) -> None:
    """The directory that the run continues from becomes ``previous.ckpt``, and is complete."""
    assert in_ranks(replace_by_file, new_run(), tmp_path) == [[2, 4]] * 2
    paths = [tmp_path / "previous.ckpt" / "meta.pt", tmp_path / "last.ckpt"]
    assert [torch.load(path, weights_only=True)["global_step"] for path in paths] == [2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def replace_by_file(rank: int, tiny_run: TinyRun, folder: Path) -> list[int]:
    """Write a directory after the first epoch and a file after the second one. Return the steps of both runs."""
    first = fit(tiny_run, "sft", 2, 1, kind="directory", save=folder)
    second = fit(tiny_run, "sft", 2, 2, kind="file", save=folder, resume=folder)
    return [first["steps"], second["steps"]]


def test_a_killed_run_keeps_a_complete_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed after the newest directory has been renamed and before the new one takes its place."""
    last, previous, part = (tmp_path / name for name in ("last.ckpt", "previous.ckpt", "last.ckpt.part"))
    for directory in (last, previous, part):
        directory.mkdir()
        (directory / "name").write_text(directory.name)
    renames = iter([os.replace])
    monkeypatch.setattr("rlhf.fsdp.os.replace", lambda old, new: next(renames)(old, new))
    with pytest.raises(StopIteration):
        replace_checkpoint(last, part)
    monkeypatch.undo()
    assert not last.exists()
    assert (previous / "name").read_text() == "last.ckpt"
    replace_checkpoint(last, part)
    assert (last / "name").read_text() == "last.ckpt.part"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_numbered_checkpoint_directory_is_replaced(tmp_path: Path) -> None:
    path, part = tmp_path / "step3.ckpt", tmp_path / "step3.ckpt.part"
    for directory in (path, part):
        directory.mkdir()
        (directory / "name").write_text(directory.name)
    replace_checkpoint(path, part)
    assert (path / "name").read_text() == "step3.ckpt.part"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step3.ckpt"]
