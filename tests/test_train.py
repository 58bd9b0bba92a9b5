"""``python train.py`` as a user types it: whole runs, mistakes, sweeps, resuming. Each start costs seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TINY = {
    "transformer": ["model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.intermediate_size=32"],
    "mamba": ["model=mamba", "model.hidden_size=32", "model.num_layers=1", "model.head_dim=16", "model.state_size=8"],
}
BUDGET = [
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
    "data.max_rows=40",
    "model.vocab_size=300",
    "trainer=cpu",
]
STAGES = ("sft", "reward", "ppo", "dpo")
LEFT_BEHIND = [
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


def train(repo: Path, root: Path, *typed: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command from the repository's root, with everything written under ``root``."""
    command = [sys.executable, "train.py", *typed, f"paths.root={root}"]
    wide = {**os.environ, "COLUMNS": "200"}  # what is printed as a table does not depend on the terminal
    done = subprocess.run(command, cwd=repo, env=wide, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def events(folder: Path) -> list[Path]:
    return list(folder.glob("tensorboard/**/events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "mamba"])
def test_the_whole_pipeline_leaves_everything_it_promises(repo: Path, tmp_path: Path, model: str) -> None:
    """One command: the table, the files of each stage, metrics of every model, and a result that is PPO's."""
    own = [
        "pipeline.overrides.dpo=['stage.beta=0.25']",
        "pipeline.overrides.ppo=['stage.ppo_epochs=1','stage.minibatch_size=20']",  # a whole iteration in 2 steps
    ]
    done = train(repo, tmp_path, *TINY[model], *BUDGET, "run=all", *own)
    assert "where everything lies" in done.stdout
    assert "held-out prompts; 95 % bootstrap intervals" in done.stdout
    assert [name for name in LEFT_BEHIND if not (tmp_path / "all" / name).is_file()] == []
    assert all(events(tmp_path / "all" / stage) for stage in (*STAGES, "evaluation"))
    metrics = json.loads((tmp_path / "all" / "evaluation" / "metrics.json").read_text())
    assert metrics["prompts"] == 40
    assert {"sft", "ppo", "dpo"} <= metrics["models"].keys()
    for name in ("ppo", "dpo"):
        rate = metrics["models"][name]["win_rate_vs_sft"]["gold"]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
        assert {"gold", "reward", "kl_to_sft", "length", "rougeL", "win_rate_vs_target"} <= metrics["models"][
            name
        ].keys()
    samples = (tmp_path / "all" / "evaluation" / "samples.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert len(samples) == 40
    final, ppo, dpo = (
        torch.load(tmp_path / "all" / name, weights_only=True)
        for name in ("final_rl_model.pt", "ppo/ppo_final.pt", "dpo/dpo_final.pt")
    )
    torch.testing.assert_close(final["weights"], ppo["weights"], rtol=0.0, atol=0.0)
    assert json.loads(dpo["provenance"])["config"]["stage"]["beta"] == 0.25
    for stage in STAGES:
        assert "train/loss=" in (tmp_path / "all" / stage / f"{stage}.log").read_text()


@pytest.mark.slow
def test_variants_of_a_stage_stand_beside_each_other(repo: Path, tmp_path: Path) -> None:
    """Three of experiment=compare, two seeds: a folder a seed, in it one a method, all in one evaluation."""
    steps = "pipeline.steps=[sft,reward,rloo,dpo,ipo,evaluate]"
    train(repo, tmp_path, "-m", "experiment=compare", "seed=1,2", "run=all", steps, *TINY["transformer"], *BUDGET)
    (first, second) = sorted((tmp_path / "all" / "sweeps" / "pipeline").glob("*seed=*/"))
    for folder, seed in ((first, 1), (second, 2)):
        for name, target in {"rloo": "rloo", "dpo": "sigmoid_loss", "ipo": "ipo_loss"}.items():
            (path,) = (folder / name).glob("*_final.pt")
            config = json.loads(torch.load(path, weights_only=True)["provenance"])["config"]
            assert (config["seed"], config["paths"]["run"]) == (seed, str(folder))
            chosen = config["stage"]["advantage" if name == "rloo" else "loss"]["_target_"]
            assert chosen.endswith(target)
        metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
        assert metrics["models"].keys() == {"sft", "rloo", "dpo", "ipo", "target"}
        assert (folder / "final_rl_model.pt").is_file()


def test_help_does_not_wait_for_torch(repo: Path) -> None:
    """The help names the stages, and nothing heavy is imported for it."""
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert imported.isdisjoint({"torch", "transformers", "lightning", "datasets"})
    for word in ("python train.py", "stage", "sft", "ppo", "pretrained"):
        assert word in done.stdout


def test_a_mistake_ends_with_exit_code_2(repo: Path, tmp_path: Path) -> None:
    """As the shell sees it: plain words on stderr, nothing on disk."""
    done = train(repo, tmp_path / "out", "stage=ppo", "stage.clip_rnage=0.1", check=False)
    assert done.returncode == 2
    assert "stage.clip_rnage" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# Each line of standard input is the arguments of one ``python train.py``, run in one process that loads torch once.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, runpy, sys, traceback
for line in sys.stdin:
    sys.argv, streams, code = ["train.py", *json.loads(line)], (io.StringIO(), io.StringIO()), 0
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
# name: (what is typed, what the message has to say)
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "a stage's key typed for the pipeline": (
        ["stage.clip_range=0.1"],
        ["stage.clip_range", "stage=ppo", "pipeline.overrides"],
    ),
    "an unknown key in the pipeline": (
        ["+nonsense=1", "pipeline.overrides.ppo=['stage.nonsense=1']"],
        ["stage.nonsense"],
    ),
    "an unknown step": (["pipeline.steps=[sft,pop]"], ["pop", "sft, reward, ppo, grpo, dpo, evaluate"]),
    "overrides of a step that is left out": (
        ["pipeline.steps=[sft]", "pipeline.overrides.ppo=['stage.kl_coef=0.1']"],
        ["pipeline.overrides.ppo", "pipeline.steps"],
    ),
    "an unknown stage": (["stage=popo"], ["popo", "ppo", "reward"]),
    "no earlier stage": (
        ["stage=ppo", "run=new"],
        ["stage=ppo needs the result of stage=sft", "python train.py stage=sft run=new"],
    ),
    "nothing to evaluate": (["stage=evaluate", "run=new"], ["no model to evaluate", "python train.py run=new"]),
    "nothing to resume": (["stage=sft", "resume=true"], ["resume=true", "last.ckpt"]),
    "a parent that is not there": (["stage=dpo", "stage.policy=nowhere.pt"], ["nowhere.pt", "python train.py stage="]),
    "no file of data": (["stage=sft", "data.train=nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
    "no file of data named": (["stage=sft", "data=jsonl"], ["data.train", "data.train=<"]),
    "no base model named": (["stage=sft", "model=pretrained"], ["model.path", "model.path=<"]),
    "no base model there": (
        ["stage=sft", "model=pretrained", "model.path=/nowhere"],
        ["model.path=/nowhere", "no tokenizer"],
    ),
    "a field that is missing": (
        ["stage=sft", "data=jsonl", "data.train={tmp}/prefs.jsonl"],
        ["prefs.jsonl:1: ", "data.columns.", "data.on_error=skip", "Expected form: "],
    ),
    "a line that is no JSON": (
        ["stage=dpo", "data=jsonl", "data.train={tmp}/broken.jsonl", "stage.policy={tmp}/sft.pt"],
        ["broken.jsonl:2: not JSON"],
    ),
    "an answer longer than the text": (
        [
            "stage=ppo",
            "stage.policy={tmp}/sft.pt",
            "stage.reward_model={tmp}/reward.pt",
            "stage.sampling.max_new_tokens=256",
            "data.max_rows=40",
        ],
        ["data.max_length=256", "stage.sampling.max_new_tokens=256"],
    ),
    "a schedule nobody knows": (
        ["stage=sft", "stage.schedule=stairs"],
        ["stage.schedule=stairs", "cosine, linear, constant"],
    ),
    "a loss for a stage that has none to choose": (["stage=sft", "loss=ipo"], ["objective", "stage=dpo"]),
    "a reward for a stage that samples nothing": (["stage=dpo", "reward=python"], ["reward", "stage=grpo"]),
    "an estimator for a stage with a critic": (["stage=ppo", "advantage=rloo"], ["estimator", "stage=grpo"]),
    "k1 in the loss": (
        ["stage=ppo", "stage.policy={tmp}/sft.pt", "stage.reward_model={tmp}/reward.pt", "stage.kl.apply_to=loss"],
        ["stage.kl.apply_to=loss", "stage.kl.estimator=k3"],
    ),
    "a reward function that is not there": (
        ["stage=ppo", "stage.policy={tmp}/sft.pt", "reward=python", "reward.path=none.py:score", "data.max_rows=40"],
        ["reward.path=none.py:score", "no such file"],
    ),
    "a loss nobody knows": (["stage=dpo", "loss=magic"], ["objective/magic", "sigmoid"]),
    "a loss and a switch that exclude each other": (
        ["stage=dpo", "stage.policy={tmp}/sft.pt", "loss=simpo", "stage.reference_free=false"],
        ["stage.reference_free=false", "simpo_loss", "stage.reference_free=true"],
    ),
    "more wrong labels than right ones": (
        ["stage=dpo", "stage.policy={tmp}/sft.pt", "loss=robust", "stage.loss.label_smoothing=0.6"],
        ["stage.loss.label_smoothing=0.6", "stage.loss.label_smoothing=0.1"],
    ),
    "a number of a loss that is none": (
        ["stage=dpo", "stage.policy={tmp}/sft.pt", "loss=simpo", "stage.loss.target_margin=wide"],
        ["stage.loss.target_margin=wide is not a number"],
    ),
    "greedy PPO": (
        [
            "stage=ppo",
            "stage.policy={tmp}/sft.pt",
            "stage.reward_model={tmp}/reward.pt",
            "stage.sampling.temperature=0",
        ],
        ["stage.sampling.temperature=0", "stage.sampling.temperature=0.7"],
    ),
    "keys that exclude each other": (
        [
            "stage=ppo",
            "stage.policy={tmp}/sft.pt",
            "stage.reward_model={tmp}/reward.pt",
            "stage.critic=shared",
            "stage.critic_learning_rate=1e-4",
        ],
        ["stage.critic_learning_rate", "stage.critic=shared", "stage.critic=separate"],
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
        ["trainer.accumulate_grad_batches=4", "stage.minibatch_size"],
    ),
    "the wrong width": (
        ["stage=reward", "stage.policy={tmp}/sft.pt", "stage.input_dim=77", "data.max_rows=40"],
        ["stage.input_dim=77", "stage.input_dim=32"],
    ),
    "a reward model for a policy": (
        ["stage=dpo", "stage.policy={tmp}/reward.pt"],
        ["reward.pt", "holds a scalar model"],
    ),
    "a Trainer's key with a wrong value": (
        ["stage=sft", "trainer.precision=17-true", "data.max_rows=40"],
        ["trainer", "17-true"],
    ),
    "a text that is no number": (
        ["stage=sft", "stage.learning_rate=fast", "data.max_rows=40"],
        ["stage.learning_rate", "fast"],
    ),
    "an override that does not parse": (["stage=sft", "data.columns={"], ["data.columns={"]),
}


def one_after_another(repo: Path, commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Several commands in one process: exit code, stdout and stderr of each."""
    typed = "\n".join(map(json.dumps, commands))
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER]
    done = subprocess.run(command, input=typed, cwd=repo, capture_output=True, text=True, check=True)
    return [(code, out, err) for code, out, err in map(json.loads, done.stdout.splitlines())]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with sft.pt and reward.pt to start from, and two files of data, one of them broken."""
    from rlhf.export import save_result
    from rlhf.models import ScalarHead, ScalarModel, Transformer
    from rlhf.stage import Result

    folder = tmp_path_factory.mktemp("parents")
    (folder / "prefs.jsonl").write_text(RECORD * 3)
    (folder / "broken.jsonl").write_text(RECORD + "{oops\n")
    lm = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32).language_model(tokenizer)
    save_result(Result(lm, tokenizer), folder / "sft.pt", {})
    save_result(Result(ScalarModel(lm.base_model, ScalarHead(32)), tokenizer), folder / "reward.pt", {})
    return folder


@pytest.fixture(scope="module")
def replies(repo: Path, parents: Path) -> dict[str, tuple[int, str, str]]:
    """What each of MISTAKES is answered with."""
    commands = [
        [f"paths.root={parents / 'out'}", "trainer=cpu", *(word.replace("{tmp}", str(parents)) for word in typed)]
        for typed, _ in MISTAKES.values()
    ]
    return dict(zip(MISTAKES, one_after_another(repo, commands), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(replies: dict[str, tuple[int, str, str]], name: str) -> None:
    """Exit code 2, no traceback, and a message that names the key, the place and what to type instead."""
    code, _, stderr = replies[name]
    assert "Traceback" not in stderr, stderr[-2000:]
    assert code == 2, stderr
    assert [word for word in MISTAKES[name][1] if word not in stderr] == [], stderr


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(repo: Path, tmp_path: Path) -> None:
    """Two epochs in one go, against one epoch and then a second with resume=true: the same weights, to the last bit.

    40 rows in batches of 16 are 3 steps an epoch. The schedule is constant, since it depends on the number of epochs.
    """
    keys = [
        "stage=sft",
        "trainer=cpu",
        *TINY["transformer"],
        "model.vocab_size=300",
        "data.max_rows=40",
        "data.batch_size=16",
        "stage.samples=1",
        "stage.schedule=constant",
        "stage.warmup_ratio=0",
    ]
    first = [["run=whole", "trainer.max_epochs=2"], ["run=halves", "trainer.max_epochs=1"]]
    replied = one_after_another(repo, [[*keys, f"paths.root={tmp_path}", *typed] for typed in first])
    assert [code for code, *_ in replied] == [0, 0], replied
    train(repo, tmp_path, *keys, "run=halves", "trainer.max_epochs=2", "resume=true")
    whole, halves = (
        torch.load(tmp_path / run / "sft" / "sft_final.pt", weights_only=True) for run in ("whole", "halves")
    )
    torch.testing.assert_close(halves["weights"], whole["weights"], rtol=0.0, atol=0.0)
    last = torch.load(tmp_path / "halves" / "sft" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    log = (tmp_path / "halves" / "sft" / "sft.log").read_text().splitlines()
    steps = [int(line.split("step=")[1].split()[0]) for line in log if "train/loss=" in line]
    assert steps == [0, 1, 2, 3, 4, 5], "the log goes on too"


@pytest.mark.slow
def test_a_sweep_keeps_its_runs_apart(repo: Path, tmp_path: Path, parents: Path) -> None:
    """Two values of beta: two folders, each with its own result, log and TensorBoard events."""
    train(repo, tmp_path, "-m", "stage=dpo", "stage.beta=0.05,0.1", f"stage.policy={parents / 'sft.pt'}", *BUDGET)
    results = sorted((tmp_path / "rlhf" / "sweeps").rglob("dpo_final.pt"))
    assert len(results) == 2
    provenances = [json.loads(torch.load(path, weights_only=True)["provenance"]) for path in results]
    assert {provenance["config"]["stage"]["beta"] for provenance in provenances} == {0.05, 0.1}
    for path in results:
        assert len(events(path.parent)) > 0
        assert (path.parent / "dpo.log").is_file()
    assert not (tmp_path / "rlhf" / "final_rl_model.pt").exists(), "a trial of a sweep is not the run's result"
