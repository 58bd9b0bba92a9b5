"""``python train.py`` on the command line: complete runs, user errors, sweeps and resuming."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import run_python
from harness import EXACT, TINY_DATA, TINY_MODEL, run_train

# Two optimizer steps per stage.
SHORT = [*TINY_DATA, "trainer.max_steps=2", "trainer.limit_val_batches=1"]
STAGES = ("sft", "reward", "ppo", "dpo")
OUTPUTS = [
    "sft/sft_final.pt",
    "sft/sft.log",
    "reward/reward_model_final.pt",
    "reward/reward.log",
    "ppo/ppo_final.pt",
    "ppo/ppo.log",
    "dpo/dpo_final.pt",
    "dpo/dpo.log",
    "final_rl_model.pt",
    "evaluation/metrics.json",
    "evaluation/samples.jsonl",
    *(f"{stage}/checkpoints/last.ckpt" for stage in STAGES),
    *(f"{stage}/.hydra/config.yaml" for stage in STAGES),
]


def events(folder: Path) -> list[Path]:
    return list(folder.glob("tensorboard/**/events.out.tfevents.*"))


@pytest.mark.slow
def test_the_pipeline_writes_all_outputs(repo: Path, tmp_path: Path) -> None:
    """One command prints the table, writes all files of each stage, and exports PPO's model.

    The commands of the README run the same pipeline with a transformer, and write its report.
    """
    overrides = [
        "pipeline.report=false",
        "pipeline.overrides.dpo=['stage.beta=0.25']",
        "pipeline.overrides.ppo=['stage.ppo_epochs=1','stage.minibatch_size=20']",  # One iteration takes 2 steps.
    ]
    done = run_train(repo, tmp_path, *TINY_MODEL["mamba"], *SHORT, "run=all", *overrides)
    assert "Outputs; " in done.stdout
    assert "held-out prompts; 95% bootstrap intervals" in done.stdout
    assert [name for name in OUTPUTS if not (tmp_path / "all" / name).is_file()] == []
    assert all(events(tmp_path / "all" / stage) for stage in (*STAGES, "evaluation"))
    metrics = json.loads((tmp_path / "all" / "evaluation" / "metrics.json").read_text())
    assert metrics["prompts"] == 40
    assert {"sft", "ppo", "dpo"} <= metrics["models"].keys()
    for name in ("ppo", "dpo"):
        rate = metrics["models"][name]["win_rate_vs_sft"]["gold"]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
        expected = {"gold", "reward", "kl_to_sft", "length", "rougeL", "win_rate_vs_target"}
        assert expected <= metrics["models"][name].keys()
    samples = (tmp_path / "all" / "evaluation" / "samples.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert len(samples) == 40
    final, ppo, dpo = (
        torch.load(tmp_path / "all" / name, weights_only=True)
        for name in ("final_rl_model.pt", "ppo/ppo_final.pt", "dpo/dpo_final.pt")
    )
    torch.testing.assert_close(final["weights"], ppo["weights"], **EXACT)
    assert json.loads(dpo["provenance"])["config"]["stage"]["beta"] == 0.25
    for stage in STAGES:
        assert "train/loss=" in (tmp_path / "all" / stage / f"{stage}.log").read_text()


@pytest.mark.slow
def test_variants_of_a_stage_have_their_own_directories(repo: Path, tmp_path: Path) -> None:
    """Three methods in a job of a sweep: the directory of the job has one per method, all in one evaluation."""
    steps = ["pipeline.steps=[sft,reward,rloo,dpo,ipo,evaluate]", "pipeline.report=false"]
    tiny = [*TINY_MODEL["transformer"], *SHORT]
    run_train(repo, tmp_path, "-m", "experiment=compare", "seed=2", "run=all", *steps, *tiny)
    (folder,) = (path for path in (tmp_path / "all" / "sweeps" / "pipeline").iterdir() if path.is_dir())
    for name, target in {"rloo": "rloo", "dpo": "sigmoid_loss", "ipo": "ipo_loss"}.items():
        (path,) = (folder / name).glob("*_final.pt")
        config = json.loads(torch.load(path, weights_only=True)["provenance"])["config"]
        assert (config["seed"], config["paths"]["run"]) == (2, str(folder))
        chosen = config["stage"]["advantage" if name == "rloo" else "loss"]["_target_"]
        assert chosen.endswith(target)
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert metrics["models"].keys() == {"sft", "rloo", "dpo", "ipo", "target"}
    assert (folder / "final_rl_model.pt").is_file()


def test_help_does_not_import_torch(repo: Path) -> None:
    """The help lists the stages and loads no heavy library."""
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert imported.isdisjoint({"torch", "transformers", "lightning", "datasets"})
    for word in ("python train.py", "stage", "sft", "ppo", "pretrained"):
        assert word in done.stdout


def test_a_user_error_exits_with_code_2(repo: Path, tmp_path: Path) -> None:
    """In a separate process: plain text on stderr, and nothing is written to disk."""
    done = run_train(repo, tmp_path / "out", "stage=ppo", "stage.clip_rnage=0.1", check=False)
    assert done.returncode == 2
    assert "stage.clip_rnage" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# The argument holds the arguments of each ``python train.py``. One process runs all of them and loads torch only once.
RUN_COMMANDS = """
import contextlib, io, json, runpy, sys, traceback
for command in json.loads(sys.argv[1]):
    sys.argv, streams, code = ["train.py", *command], (io.StringIO(), io.StringIO()), 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, *(stream.getvalue() for stream in streams)]))
"""
RECORD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
# name: (command-line arguments, parts of the message)
USER_ERRORS: dict[str, tuple[list[str], list[str]]] = {
    "a key of a stage in the pipeline": (
        ["stage.clip_range=0.1"],
        ["stage.clip_range", "stage=ppo", "pipeline.overrides"],
    ),
    "an unknown key in the pipeline": (
        ["+nonsense=1", "pipeline.overrides.ppo=['stage.nonsense=1']"],
        ["stage.nonsense"],
    ),
    "an unknown step": (["pipeline.steps=[sft,pop]"], ["pop", "sft, reward, ppo, grpo, dpo, collect, evaluate"]),
    "overrides of a step that does not run": (
        ["pipeline.steps=[sft]", "pipeline.overrides.ppo=['stage.kl_coef=0.1']"],
        ["pipeline.overrides.ppo", "pipeline.steps"],
    ),
    "an unknown stage": (["stage=popo"], ["popo", "ppo", "reward"]),
    "a missing input": (
        ["stage=ppo", "run=new"],
        ["stage=ppo requires the output of stage=sft", "python train.py stage=sft run=new"],
    ),
    "nothing to evaluate": (["stage=evaluate", "run=new"], ["found no model in", "python train.py run=new"]),
    "nothing to resume": (["stage=sft", "resume=true"], ["resume=true", "last.ckpt"]),
    "an input file that does not exist": (
        ["stage=dpo", "stage.policy=nowhere.pt"],
        ["nowhere.pt", "python train.py stage="],
    ),
    "a data file that does not exist": (
        ["stage=sft", "data.train=nowhere.jsonl"],
        ["nowhere.jsonl: there is no such file"],
    ),
    "no data file": (["stage=sft", "data=jsonl"], ["data.train", "data.train=<"]),
    "no base model": (["stage=sft", "model=pretrained"], ["model.path", "model.path=<"]),
    "a base model that does not exist": (
        ["stage=sft", "model=pretrained", "model.path=/nowhere"],
        ["/nowhere", "tokenizer"],
    ),
    "a missing field": (
        ["stage=sft", "data=jsonl", "data.train={tmp}/prefs.jsonl"],
        ["prefs.jsonl:1: ", "read by stage=reward", "data.on_error=skip", "Expected: "],
    ),
    "a line that is not JSON": (
        ["stage=dpo", "data=jsonl", "data.train={tmp}/broken.jsonl", "stage.policy={tmp}/sft.pt"],
        ["broken.jsonl:2: ", "not JSON"],
    ),
    "a response longer than the maximum length": (
        [
            "stage=ppo",
            "stage.policy={tmp}/sft.pt",
            "stage.reward_model={tmp}/reward.pt",
            "stage.sampling.max_new_tokens=256",
            "data.max_rows=40",
        ],
        ["data.max_length", "stage.sampling.max_new_tokens", "256", "data.max_length=512"],
    ),
    "an unknown schedule": (
        ["stage=sft", "stage.schedule=stairs"],
        ["stage.schedule", "stairs", "cosine, linear, or constant", "stage.schedule=cosine"],
    ),
    "a loss in a stage without a choice of losses": (["stage=sft", "loss=ipo"], ["loss", "stage=dpo"]),
    "a reward function in a stage that does not sample": (["stage=dpo", "reward=python"], ["reward", "stage=grpo"]),
    "an advantage estimator in a stage without advantages": (
        ["stage=sft", "advantage=rloo"],
        ["advantage", "stage=grpo"],
    ),
    "a KL penalty in the loss by k1": (
        ["stage=ppo", "stage.policy={tmp}/sft.pt", "stage.reward_model={tmp}/reward.pt", "stage.kl.apply_to=loss"],
        ["stage.kl.apply_to", "stage.kl.estimator=k3"],
    ),
    "a reward function that does not exist": (
        ["stage=ppo", "stage.policy={tmp}/sft.pt", "reward=python", "reward.path=none.py:score", "data.max_rows=40"],
        ["reward.path", "none.py:score", "no such file"],
    ),
    "an unknown loss": (["stage=dpo", "loss=magic"], ["loss/magic", "sigmoid"]),
    "a loss and an option that exclude each other": (
        ["stage=dpo", "stage.policy={tmp}/sft.pt", "loss=simpo", "stage.reference_free=false"],
        ["stage.reference_free", "simpo", "stage.reference_free=true"],
    ),
    "more than half of the labels wrong": (
        ["stage=dpo", "stage.policy={tmp}/sft.pt", "loss=robust", "stage.loss.label_smoothing=0.6"],
        ["stage.loss.label_smoothing", "0.6", "stage.loss.label_smoothing=0.1"],
    ),
    "text for a number of a loss": (
        ["stage=dpo", "stage.policy={tmp}/sft.pt", "loss=simpo", "stage.loss.target_margin=wide"],
        ["stage.loss.target_margin must be a number of at least 0, got 'wide'"],
    ),
    "greedy PPO": (
        [
            "stage=ppo",
            "stage.policy={tmp}/sft.pt",
            "stage.reward_model={tmp}/reward.pt",
            "stage.sampling.temperature=0",
        ],
        ["stage.sampling.temperature", "stage.sampling.temperature=0.7"],
    ),
    "keys that exclude each other": (
        [
            "stage=ppo",
            "stage.policy={tmp}/sft.pt",
            "stage.reward_model={tmp}/reward.pt",
            "stage.critic=shared",
            "stage.critic_learning_rate=1e-4",
        ],
        ["stage.critic_learning_rate", "stage.critic=separate"],
    ),
    "accumulation that does not divide an iteration": (
        [
            "stage=ppo",
            "stage.policy={tmp}/sft.pt",
            "stage.reward_model={tmp}/reward.pt",
            "data.batch_size=16",
            "data.max_rows=40",
            "stage.minibatch_size=8",
            "stage.ppo_epochs=1",
            "trainer.accumulate_grad_batches=4",
        ],
        ["trainer.accumulate_grad_batches", "stage.minibatch_size"],
    ),
    "a wrong width": (
        ["stage=reward", "stage.policy={tmp}/sft.pt", "stage.input_dim=77", "data.max_rows=40"],
        ["stage.input_dim", "77", "stage.input_dim=32"],
    ),
    "a reward model for a policy": (
        ["stage=dpo", "stage.policy={tmp}/reward.pt", "data.max_rows=40"],
        ["reward.pt", "contains a reward model"],
    ),
    "a wrong value of a Trainer key": (
        ["stage=sft", "trainer.precision=17-true", "data.max_rows=40"],
        ["trainer", "17-true"],
    ),
    "text for a number": (
        ["stage=sft", "stage.learning_rate=fast", "data.max_rows=40"],
        ["stage.learning_rate", "fast"],
    ),
    "an override that does not parse": (["stage=sft", "data.columns={"], ["data.columns={"]),
}


def run_commands(repo: Path, commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Run several commands in one process; return exit code, stdout and stderr of each.

    Args:
        repo: Root of the repository.
        commands: The arguments of each ``python train.py``.
    """
    done = run_python(["-c", RUN_COMMANDS, json.dumps(commands)], repo)
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in map(json.loads, done.stdout.splitlines())]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A directory with sft.pt, reward.pt and two data files, one of them broken."""
    from rlhf.export import save_result
    from rlhf.models import ScalarHead, ScalarModel, Transformer
    from rlhf.stage import Result

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prefs.jsonl").write_text(RECORD * 3)
    (folder / "broken.jsonl").write_text(RECORD + "{oops\n")
    lm = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32).language_model(tokenizer)
    save_result(Result(lm, tokenizer), folder / "sft.pt", {})
    save_result(Result(ScalarModel(lm.base_model, ScalarHead(32)), tokenizer), folder / "reward.pt", {})
    return folder


@pytest.fixture(scope="module")
def outcomes(repo: Path, inputs: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each of USER_ERRORS."""
    commands = [
        [
            f"paths.root={inputs / 'out'}",
            "trainer=cpu",
            *(override.replace("{tmp}", str(inputs)) for override in overrides),
        ]
        for overrides, _ in USER_ERRORS.values()
    ]
    return dict(zip(USER_ERRORS, run_commands(repo, commands), strict=True))


@pytest.mark.parametrize("name", USER_ERRORS)
def test_a_user_error_is_explained(outcomes: dict[str, tuple[int, str, str]], name: str) -> None:
    """Exit code 2, no traceback, and a message that names the key, the value and the fix."""
    code, _, stderr = outcomes[name]
    assert "Traceback" not in stderr, stderr[-2000:]
    assert code == 2, stderr
    assert [word for word in USER_ERRORS[name][1] if word not in stderr] == [], stderr


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(repo: Path, tmp_path: Path) -> None:
    """Two epochs give the same weights, bit for bit, as one epoch and a second one with resume=true.

    40 rows in batches of 16 make 3 steps per epoch. The schedule is constant because others depend on the epochs.
    """
    keys = [
        "stage=sft",
        *TINY_MODEL["transformer"],
        *TINY_DATA,
        "data.batch_size=16",
        "stage.samples=1",
        "stage.schedule=constant",
        "stage.warmup_ratio=0",
    ]
    first = [["run=whole", "trainer.max_epochs=2"], ["run=halves", "trainer.max_epochs=1"]]
    outcomes = run_commands(repo, [[*keys, f"paths.root={tmp_path}", *overrides] for overrides in first])
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    run_train(repo, tmp_path, *keys, "run=halves", "trainer.max_epochs=2", "resume=true")
    whole, halves = (
        torch.load(tmp_path / run / "sft" / "sft_final.pt", weights_only=True) for run in ("whole", "halves")
    )
    torch.testing.assert_close(halves["weights"], whole["weights"], **EXACT)
    last = torch.load(tmp_path / "halves" / "sft" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    log = (tmp_path / "halves" / "sft" / "sft.log").read_text().splitlines()
    steps = [int(line.split("step=")[1].split()[0]) for line in log if "train/loss=" in line]
    assert steps == [0, 1, 2, 3, 4, 5], "the log continues, too"


@pytest.mark.slow
def test_jobs_of_a_sweep_have_their_own_directories(repo: Path, tmp_path: Path, inputs: Path) -> None:
    """Two values of beta give two directories, each with a result, a log and TensorBoard events."""
    run_train(repo, tmp_path, "-m", "stage=dpo", "stage.beta=0.05,0.1", f"stage.policy={inputs / 'sft.pt'}", *SHORT)
    results = sorted((tmp_path / "rlhf" / "sweeps").rglob("dpo_final.pt"))
    assert len(results) == 2
    provenances = [json.loads(torch.load(path, weights_only=True)["provenance"]) for path in results]
    assert {provenance["config"]["stage"]["beta"] for provenance in provenances} == {0.05, 0.1}
    for path in results:
        assert len(events(path.parent)) > 0
        assert (path.parent / "dpo.log").is_file()
    assert not (tmp_path / "rlhf" / "final_rl_model.pt").exists(), (
        "a job of a sweep does not make the result of the run"
    )


@pytest.mark.slow
def test_sft_trains_in_bfloat16_mixed_precision(repo: Path, tmp_path: Path) -> None:
    run_train(repo, tmp_path, *TINY_MODEL["transformer"], *SHORT, "stage=sft", "trainer.precision=bf16-mixed")
    assert (tmp_path / "rlhf" / "sft" / "sft_final.pt").is_file()


@pytest.mark.slow
def test_resuming_a_finished_reward_model_exports_it_unchanged(repo: Path, tmp_path: Path) -> None:
    """``resume=true`` on a finished run: all weights and the stored mean are bit-for-bit equal."""
    tiny = [*TINY_MODEL["transformer"], *SHORT]
    path = tmp_path / "rlhf" / "reward" / "reward_model_final.pt"
    run_train(repo, tmp_path, *tiny, "stage=sft")
    run_train(repo, tmp_path, *tiny, "stage=reward")
    first = torch.load(path, weights_only=True)["weights"]
    assert float(first["reward_mean"].abs()) > 1e-3
    path.unlink()
    run_train(repo, tmp_path, *tiny, "stage=reward", "resume=true")
    second = torch.load(path, weights_only=True)["weights"]
    torch.testing.assert_close(second, first, **EXACT)
