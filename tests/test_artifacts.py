"""Where the inputs of a stage come from, what a run exports, and how that is described."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contract.configs import compose_config
from harness import tiny_reward_model
from rlhf.artifacts import (
    describe_provenance,
    export_result,
    policies_of_run,
    policies_to_evaluate,
    resolve_input,
)
from rlhf.errors import ConfigError
from rlhf.export import Export
from rlhf.models import Pretrained, Transformer
from rlhf.stage import Result
from rlhf.stages import stages


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def config(root: Path, *overrides: str) -> Any:
    """Compose a configuration whose run is the directory ``rlhf`` in ``root``."""
    return compose_config(f"paths.root={root}", *overrides)


def touch(root: Path, *names: str) -> None:
    """Make empty files in the run. An export is only read when it is used."""
    for name in names:
        path = root / "rlhf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# Inputs


def test_a_configured_path_comes_first(tmp_path: Path) -> None:
    """Even if the run has an output of the stage that usually makes the input."""
    touch(tmp_path, "sft/sft_final.pt", "other.pt")
    cfg = config(tmp_path, "stage=dpo", f"stage.policy={tmp_path}/rlhf/other.pt")
    assert resolve_input(cfg, "policy") == Export(f"{tmp_path}/rlhf/other.pt")


def test_a_configured_folder_is_opened_by_transformers(tmp_path: Path) -> None:
    cfg = config(tmp_path, "stage=dpo", f"stage.policy={tmp_path}")
    assert resolve_input(cfg, "policy") == Pretrained(str(tmp_path))


def test_several_configured_paths_are_an_ensemble(tmp_path: Path) -> None:
    touch(tmp_path, "a.pt", "b.pt")
    paths = [f"{tmp_path}/rlhf/{name}.pt" for name in "ab"]
    cfg = config(tmp_path, "stage=ppo", f"stage.reward_model=[{','.join(paths)}]")
    assert resolve_input(cfg, "reward_model") == [Export(path) for path in paths]


def test_a_configured_file_must_exist(tmp_path: Path) -> None:
    cfg = config(tmp_path, "stage=dpo", f"stage.policy={tmp_path}/nowhere.pt")
    with pytest.raises(ConfigError, match=r"nowhere\.pt: there is no such file\.\n  .*python train\.py stage="):
        resolve_input(cfg, "policy")


def test_the_output_of_the_run_comes_second(tmp_path: Path) -> None:
    touch(tmp_path, "sft/sft_final.pt", "reward/reward_model_final.pt")
    cfg = config(tmp_path, "stage=ppo", "model=pretrained", "model.path=unused")
    assert resolve_input(cfg, "policy") == Export(f"{tmp_path}/rlhf/sft/sft_final.pt")
    assert resolve_input(cfg, "reward_model") == Export(f"{tmp_path}/rlhf/reward/reward_model_final.pt")


@pytest.mark.parametrize(("model", "kind"), [("transformer", Transformer), ("pretrained", Pretrained)])
def test_sft_starts_from_the_base_model(tmp_path: Path, model: str, kind: type) -> None:
    assert isinstance(resolve_input(config(tmp_path, "stage=sft", f"model={model}"), "policy"), kind)


def test_a_pretrained_base_model_replaces_a_missing_policy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A downloaded model is often instruction-tuned already. The log says that SFT was not run."""
    cfg = config(tmp_path, "stage=dpo", "model=pretrained", "model.path=owner/name")
    with caplog.at_level(logging.WARNING, "rlhf"):
        source = resolve_input(cfg, "policy")
    assert isinstance(source, Pretrained)
    assert source.path == "owner/name"
    assert "run=rlhf has no sft model. The stage starts from model.path=owner/name." in caplog.text


@pytest.mark.parametrize(
    ("key", "made_by", "final", "model"),
    [
        ("policy", "sft", "sft_final.pt", []),  # A base model with random weights replaces no policy,
        ("reward_model", "reward", "reward_model_final.pt", ["model=pretrained"]),  # and no base model a reward model.
    ],
)
def test_a_missing_input_names_the_command_and_the_key(
    tmp_path: Path, key: str, made_by: str, final: str, model: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_input(config(tmp_path, "stage=ppo", *model), key)
    assert str(error.value) == (
        f"stage=ppo requires the output of stage={made_by}, but run=rlhf has no {tmp_path}/rlhf/{made_by}/{final}.\n"
        f"  Run python train.py stage={made_by} run=rlhf paths.root={tmp_path}, or set stage.{key}=<path>"
    )


# Policies to evaluate

RUN = [
    "reward/reward_model_final.pt",
    "ipo/dpo_final.pt",
    "dpo/dpo_final.pt",
    "rloo/grpo_final.pt",
    "ppo/ppo_final.pt",
    "sft/sft_final.pt",
]


def test_policies_are_listed_by_stage_and_then_by_variant(tmp_path: Path) -> None:
    """SFT, PPO and DPO in the order of the stages, then the variants of GRPO and of DPO; no reward model."""
    touch(tmp_path, *RUN)
    found = policies_of_run(tmp_path / "rlhf")
    assert list(found) == ["sft", "ppo", "dpo", "rloo", "ipo"]
    assert found["ipo"] == f"{tmp_path}/rlhf/ipo/dpo_final.pt"


def test_all_policies_are_evaluated_by_default(tmp_path: Path) -> None:
    touch(tmp_path, *RUN)
    found = policies_to_evaluate(config(tmp_path, "stage=evaluate"))
    assert {name: source.path for name, source in found.items()} == policies_of_run(tmp_path / "rlhf")


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ("[dpo,sft]", {"dpo": "dpo/dpo_final.pt", "sft": "sft/sft_final.pt"}),
        ("[rloo]", {"rloo": "rloo/grpo_final.pt"}),
        ("{mine: other.pt, before: sft}", {"mine": "other.pt", "before": "sft/sft_final.pt"}),
    ],
)
def test_chosen_policies_are_stages_variants_or_paths(tmp_path: Path, models: str, expected: dict[str, str]) -> None:
    """In the order in which they are listed."""
    touch(tmp_path, *RUN, "other.pt")
    models = models.replace("other.pt", f"{tmp_path}/rlhf/other.pt")
    found = policies_to_evaluate(config(tmp_path, "stage=evaluate", f"stage.models={models}"))
    assert list(found.items()) == [(name, Export(f"{tmp_path}/rlhf/{path}")) for name, path in expected.items()]


def test_a_run_without_policies_cannot_be_evaluated(tmp_path: Path) -> None:
    command = rf"python train\.py run=rlhf paths\.root={tmp_path}"
    with pytest.raises(ConfigError, match=rf"found no model in .*\n  Run {command}$"):
        policies_to_evaluate(config(tmp_path, "stage=evaluate"))


def test_a_chosen_stage_must_have_an_output(tmp_path: Path) -> None:
    touch(tmp_path, "sft/sft_final.pt")
    with pytest.raises(ConfigError, match=r"stage\.models contains dpo, but run=rlhf has no dpo model\.") as error:
        policies_to_evaluate(config(tmp_path, "stage=evaluate", "stage.models=[sft,dpo]"))
    assert str(error.value).endswith(f"  Run python train.py stage=dpo run=rlhf paths.root={tmp_path}")


# Outputs


@pytest.fixture
def result(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Result:
    return Result(lm, tokenizer)


def export(root: Path, stage: str, result: Result, *overrides: str, directory: str | None = None) -> Path:
    """Export a result as the given stage; the provenance names the stage."""
    output = root / "rlhf" / (directory or stage)
    export_result(config(root, f"stage={stage}", *overrides), output, result, {"stage": stage})
    return output / str(stages()[stage].final)


@pytest.mark.parametrize(
    ("order", "owners"),
    [
        (["dpo", "grpo", "ppo"], ["dpo", "grpo", "ppo"]),  # Each has a higher priority than those before.
        (["ppo", "dpo", "grpo"], ["ppo", "ppo", "ppo"]),  # PPO has the highest.
        (["grpo", "dpo", "grpo"], ["grpo", "grpo", "grpo"]),
    ],
)
def test_the_final_model_is_that_of_the_preferred_stage(
    tmp_path: Path, result: Result, order: list[str], owners: list[str]
) -> None:
    """PPO, then GRPO, then DPO, in whatever order the stages run; ``owners`` after each stage."""
    final = tmp_path / "rlhf" / "final_rl_model.pt"
    for stage, owner in zip(order, owners, strict=True):
        assert Export(str(export(tmp_path, stage, result))).provenance == {"stage": stage}
        assert Export(str(final)).provenance == {"stage": owner}


def test_other_exports_do_not_make_the_final_model(tmp_path: Path, result: Result) -> None:
    """SFT and the reward model never do; nor do a variant, a job of a sweep or an experiment with its own directory."""
    export(tmp_path, "sft", result)
    export(tmp_path, "reward", Result(tiny_reward_model(result.model), result.tokenizer))
    export(tmp_path, "ppo", result, directory="overoptimization")
    export(tmp_path, "dpo", result, directory="sweeps/dpo/stage.beta=0.1")
    assert not (tmp_path / "rlhf" / "final_rl_model.pt").exists()


@pytest.mark.parametrize(("stage", "kind"), [("sft", "CausalLM"), ("reward", "SequenceClassification")])
def test_save_hf_writes_a_folder(tmp_path: Path, result: Result, stage: str, kind: str) -> None:
    """Of a policy, and of a reward model."""
    if stage == "reward":
        result = Result(tiny_reward_model(result.model), result.tokenizer)
    export(tmp_path, stage, result, "save_hf=true")
    folder = tmp_path / "rlhf" / stage / "hf"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["architectures"] == [f"LlamaFor{kind}"]


def test_a_folder_of_an_earlier_result_is_reported(
    tmp_path: Path, result: Result, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that is extended without ``save_hf`` replaces its ``*_final.pt`` only."""
    export(tmp_path, "sft", result, "save_hf=true")
    assert "holds the earlier result" not in caplog.text
    export(tmp_path, "sft", result)
    assert f"{tmp_path}/rlhf/sft/hf holds the earlier result. To replace it, repeat the command with" in caplog.text


def test_provenance_describes_inputs_data_and_configuration(tmp_path: Path) -> None:
    """Files have a SHA-256; a hub id and a base model with random weights have none. All of it is JSON."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "model.pt").write_bytes(b"weights")
    cfg = config(
        tmp_path, "stage=ppo", "data=jsonl", f"data.train={tmp_path}/rows.jsonl", "data.val=owner/name", "seed=5"
    )
    inputs = {
        "policy": Export(f"{tmp_path}/model.pt"),
        "reward_model": [Export(f"{tmp_path}/model.pt"), Transformer()],
        "unused": None,
    }
    found = json.loads(json.dumps(describe_provenance(cfg, inputs)))
    digest = hashlib.sha256(b"weights").hexdigest()
    assert found["stage"] == "ppo"
    assert [entry["sha256"] for entry in found["inputs"]["policy"]] == [digest]
    assert f"{tmp_path}/model.pt" in found["inputs"]["policy"][0]["source"]
    assert [entry["sha256"] for entry in found["inputs"]["reward_model"]] == [digest, None]
    assert "unused" not in found["inputs"]
    assert found["data"] == {
        "train": {"path": f"{tmp_path}/rows.jsonl", "sha256": hashlib.sha256(b"{}\n").hexdigest()},
        "val": {"path": "owner/name", "sha256": None},
    }
    assert (found["config"]["seed"], found["config"]["data"]["seed"]) == (5, 5)  # Interpolations are resolved.
    assert found["versions"].keys() == {"rlhf", "python", "torch", "transformers", "lightning"}
