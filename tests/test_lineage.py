"""What files of a run were made from: checkpoints of other inputs, outdated outputs, policies of different parents."""

import logging
import re
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contract.configs import compose_config
from rlhf.artifacts import describe_provenance, export_result, open_sources
from rlhf.errors import ConfigError
from rlhf.export import Export, save_result
from rlhf.export.huggingface import save_huggingface
from rlhf.files import sha256_of_file
from rlhf.lineage import check_resumable, outdated_stages, warn_about_parents
from rlhf.models import Pretrained
from rlhf.overrides import quote
from rlhf.stage import Result


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


class Outputs:
    """Exports results of stages to the run ``rlhf`` in a directory.

    Args:
        root: Directory of all runs.
        result: The result of every stage.
    """

    def __init__(self, root: Path, result: Result) -> None:
        self.root, self.run, self.result = root, root / "rlhf", result

    def path(self, stage: str) -> Path:
        return self.run / stage / f"{stage}_final.pt"

    def provenance(self, stage: str, policy: Path | None, **data: str) -> dict[str, Any]:
        cfg = compose_config(f"stage={stage}", f"paths.root={self.root}", *(f"data.{k}={v}" for k, v in data.items()))
        return describe_provenance(cfg, {} if policy is None else {"policy": open_sources(cfg, str(policy))})

    def export(self, stage: str, policy: Path | None = None, *, change: float = 0.0, seed: int = 1) -> Path:
        """Export a result that was trained from ``policy``, with weights that are changed by a constant."""
        cfg = compose_config(f"stage={stage}", f"paths.root={self.root}", f"seed={seed}")
        inputs = {} if policy is None else {"policy": open_sources(cfg, str(policy))}
        model: Any = deepcopy(self.result.model)
        model.get_input_embeddings().weight.data += change
        export_result(cfg, self.run / stage, Result(model, self.result.tokenizer), describe_provenance(cfg, inputs))
        return self.path(stage)


@pytest.fixture
def outputs(tmp_path: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Outputs:
    return Outputs(tmp_path, Result(lm, tokenizer))


# Resuming


@pytest.fixture
def recorded(outputs: Outputs, tmp_path: Path) -> dict[str, Any]:
    """The provenance in a checkpoint of DPO, with its SFT model and its training data."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return outputs.provenance("dpo", outputs.export("sft"), train=str(tmp_path / "rows.jsonl"))


def test_equal_inputs_and_data_can_be_resumed(outputs: Outputs, recorded: dict[str, Any], tmp_path: Path) -> None:
    """The files may have moved, and the model may have been written again, as by a resumed run of SFT."""
    before = sha256_of_file(outputs.path("sft"))
    outputs.export("sft", seed=2)
    assert sha256_of_file(outputs.path("sft")) != before
    moved = {"policy": tmp_path / "moved.pt", "train": tmp_path / "moved.jsonl"}
    outputs.path("sft").rename(moved["policy"])
    (tmp_path / "rows.jsonl").rename(moved["train"])
    check_resumable("last.ckpt", recorded, outputs.provenance("dpo", moved["policy"], train=str(moved["train"])))


@pytest.mark.parametrize(("changed", "key"), [("sft", "stage.policy"), ("rows", "data.train")])
def test_changed_inputs_and_data_cannot_be_resumed(
    outputs: Outputs, recorded: dict[str, Any], tmp_path: Path, changed: str, key: str
) -> None:
    """A new SFT model under the same path would be a reference model other than the one that training started with."""
    if changed == "sft":
        outputs.export("sft", change=0.1)
    else:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "other"}\n')
    provenance = outputs.provenance("dpo", outputs.path("sft"), train=str(tmp_path / "rows.jsonl"))
    message = rf"^resume: {key} is not what last\.ckpt was trained with: .*\n  Restore the previous file, or start over"
    with pytest.raises(ConfigError, match=message):
        check_resumable("last.ckpt", recorded, provenance, force=True)


def test_a_changed_reward_function_cannot_be_resumed_without_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a component of a weighted sum as well. A file that has not changed, and one that has moved, can."""
    rewards = tmp_path / "rewards.py"

    def provenance() -> dict[str, Any]:
        components = ("reward.weights.python=1.0", f"reward.components.python.path={rewards}:score")
        return describe_provenance(compose_config("stage=grpo", "reward=weighted_sum", *components), {})

    rewards.write_text("def score(prompts, responses): return [1.0] * len(responses)")
    recorded = provenance()
    check_resumable("last.ckpt", recorded, provenance())
    rewards.write_text("def score(prompts, responses): return [2.0] * len(responses)")
    message = r"rewards\.py is not what last\.ckpt was trained with: .*\n  Restore the previous file, .*resume=force"
    with pytest.raises(ConfigError, match=message):
        check_resumable("last.ckpt", recorded, provenance())
    check_resumable("last.ckpt", recorded, provenance(), force=True)
    assert "stage.reward.components.python.path=" in caplog.text


@pytest.fixture
def folder(outputs: Outputs, tmp_path: Path) -> Path:
    """The SFT model as a Hugging Face folder."""
    save_huggingface(str(outputs.export("sft")), str(tmp_path / "folder"))
    return tmp_path / "folder"


def test_changed_weights_in_a_folder_cannot_be_resumed(outputs: Outputs, folder: Path, tmp_path: Path) -> None:
    """A moved folder with equal weights can. Other files in it do not matter."""
    recorded = outputs.provenance("dpo", folder)
    (folder / "README.md").touch()
    folder = folder.rename(tmp_path / "moved")
    check_resumable("last.ckpt", recorded, outputs.provenance("dpo", folder))
    save_huggingface(str(outputs.export("sft", change=0.1)), str(folder))
    with pytest.raises(ConfigError, match=r"^resume: stage\.policy is not what last\.ckpt was trained with: "):
        check_resumable("last.ckpt", recorded, outputs.provenance("dpo", folder), force=True)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_inputs_without_a_digest_are_compared_by_their_path(
    outputs: Outputs, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    """Such as a model on the Hub, or a folder in a checkpoint of an earlier version."""
    recorded = outputs.provenance(stage, Path("owner/name"))
    check_resumable("last.ckpt", recorded, outputs.provenance(stage, Path("owner/name")))
    other = outputs.provenance(stage, outputs.export("sft"))
    with pytest.raises(ConfigError, match=r"stage\.policy was owner/name and is sft/sft_final\.pt\.\n  Restore them "):
        check_resumable("last.ckpt", recorded, other)
    check_resumable("last.ckpt", recorded, other, force=True)
    assert "stage.policy was owner/name and is sft/sft_final.pt" in caplog.text


def test_data_without_a_digest_are_compared_by_their_path(outputs: Outputs, tmp_path: Path) -> None:
    """Such as a dataset on the Hub. The test data do not matter, and neither does where a file with a digest is."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "moved.jsonl").write_text("{}\n")
    hub = {"train": "owner/data", "val": "owner/data"}
    local = {**hub, "train": str(tmp_path / "rows.jsonl")}
    before, of_file = (outputs.provenance("dpo", None, **data) for data in (hub, local))
    check_resumable("last.ckpt", before, outputs.provenance("dpo", None, **hub, test="owner/other"))
    check_resumable(
        "last.ckpt", of_file, outputs.provenance("dpo", None, **{**local, "train": f"{tmp_path}/moved.jsonl"})
    )
    for recorded, split, data in (
        (before, "train", "other/data"),
        (before, "val", "other/data"),
        (of_file, "train", "a/b"),
    ):
        changed = outputs.provenance("dpo", None, **{**local, **hub, split: data})
        with pytest.raises(
            ConfigError, match=rf"other settings: data\.{split} was .* and is {data}\.\n  Restore them "
        ):
            check_resumable("last.ckpt", recorded, changed)
        check_resumable("last.ckpt", recorded, changed, force=True)


def test_another_base_model_is_reported_once() -> None:
    def provenance(path: str) -> dict[str, Any]:
        cfg = compose_config("stage=sft", "model=pretrained", f"model.path={path}")
        return describe_provenance(cfg, {"policy": Pretrained(path)})

    with pytest.raises(ConfigError, match=r"other settings: model\.path was a/b and is c/d\.\n"):
        check_resumable("last.ckpt", provenance("a/b"), provenance("c/d"))


def provenance_of(*overrides: str) -> dict[str, Any]:
    return describe_provenance(compose_config("stage=dpo", *overrides), {})


def test_changed_settings_are_named_key_by_key(caplog: pytest.LogCaptureFixture) -> None:
    """The message restores them as they are typed, and ``force`` accepts them with a warning."""
    recorded = provenance_of("stage.beta=0.2")
    changed = provenance_of("seed=7", "stage.beta=0.3", "trainer.gradient_clip_val=null", "stage.reference_free=true")
    with pytest.raises(ConfigError) as error:
        check_resumable("last.ckpt", recorded, changed)
    assert str(error.value) == (
        "resume: last.ckpt was trained with other settings: data.seed was 1 and is 7, seed was 1 and is 7, "
        "stage.beta was 0.2 and is 0.3, stage.reference_free was false and is true, trainer.gradient_clip_val was 1.0 "
        "and is null.\n  Restore them (data.seed=1 seed=1 stage.beta=0.2 stage.reference_free=false "
        "trainer.gradient_clip_val=1.0), start over (overwrite=true), or continue with the new ones: resume=force"
    )
    check_resumable("last.ckpt", recorded, changed, force=True)
    assert "resume=force: stage.beta was 0.2 and is 0.3 from now on." in caplog.text


def test_the_suggested_command_restores_the_settings(tmp_path: Path) -> None:
    """Read as a shell reads it, with a line feed, quotes and lists in the values, and for a run that was renamed."""
    template = '{prompt}\n"Summary": '
    cases = [f"data.template={quote(template)}", "stage.betas=[0.9,0.999]", 'data.columns.prompt="it\'s"']
    recorded = provenance_of(*cases, f"stage.policy={tmp_path}/a/sft/x.pt", f"paths.run={tmp_path}/a")
    run = f"paths.run={tmp_path}/b"
    with pytest.raises(ConfigError) as error:
        check_resumable("last.ckpt", recorded, provenance_of(run, "data.columns.prompt=other"))
    (suggestion,) = re.findall(r"\n  Restore them \((.*)\), start over", str(error.value), re.DOTALL)
    cfg = compose_config("stage=dpo", run, *shlex.split(suggestion))
    assert (cfg.data.template, cfg.data.columns.prompt, list(cfg.stage.betas)) == (template, "it's", [0.9, 0.999])
    assert cfg.stage.policy == f"{tmp_path}/b/sft/x.pt"


SHORT = ("+reward.components.short.path=short.py:score", "+reward.weights.short=1")


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            (),
            SHORT,
            "reward.components.short.path was not set and is short.py:score, reward.weights.short was not set and is "
            "1.\n  Restore them (without reward.components.short.path and reward.weights.short), ",
        ),
        (
            SHORT,
            ("reward.weights.model=3",),
            "reward.components.short.path was short.py:score and is not set, reward.weights.model was 1.0 and is 3, "
            "reward.weights.short was 1 and is not set.\n  Restore them (+reward.components.short.path="
            "short.py:score reward.weights.model=1.0 +reward.weights.short=1), ",
        ),
        (
            ("+data.splits.val=test",),
            ("+data.splits.train=other",),
            "data.splits.train was not set and is other, data.splits.val was test and is not set.\n  Restore them "
            "(+data.splits.val=test, without data.splits.train), ",
        ),
    ],
)
def test_components_and_splits_may_neither_be_added_nor_removed(
    before: tuple[str, ...], now: tuple[str, ...], message: str
) -> None:
    """The keys of these mappings are names that the user chooses. Keys of the reward are named as they are typed."""
    recorded, changed = (
        describe_provenance(compose_config("stage=grpo", "reward=weighted_sum", *overrides), {})
        for overrides in (before, now)
    )
    with pytest.raises(ConfigError) as error:
        check_resumable("last.ckpt", recorded, changed)
    assert str(error.value).startswith(f"resume: last.ckpt was trained with other settings: {message}start over")


def test_a_key_of_another_version_is_not_compared() -> None:
    recorded = provenance_of()
    changed = deepcopy(recorded)
    changed["config"]["stage"]["new"] = changed["config"]["trainer"]["overfit_batches"] = 1
    changed["config"]["data"]["columns"]["new"] = None
    del recorded["config"]["trainer"]["overfit_batches"], recorded["config"]["stage"]["beta"]
    check_resumable("last.ckpt", recorded, changed)
    assert recorded["config"] != changed["config"]


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_epochs=7",
        "trainer=cpu",
        "trainer.log_every_n_steps=5",
        "callbacks.checkpoint.every_n_minutes=1",
        "save_hf=true",
        "run=renamed",
        "paths.root=elsewhere",
    ],
)
def test_settings_that_do_not_affect_training_may_change(override: str) -> None:
    """The length of training may change as well: it extends the run."""
    check_resumable("last.ckpt", provenance_of(), provenance_of(override))


# Outputs


def test_an_output_of_an_earlier_sft_model_is_outdated(outputs: Outputs, caplog: pytest.LogCaptureFixture) -> None:
    """It no longer makes the final model, and the log names it."""
    sft = outputs.export("sft")
    outputs.export("ppo", sft)
    outputs.export("dpo", sft)
    final = outputs.run / "final_rl_model.pt"
    assert outdated_stages(outputs.run) == {}
    assert Export(str(final)).provenance["stage"] == "ppo"
    with caplog.at_level(logging.WARNING, "rlhf"):
        outputs.export("sft", change=0.1)
    assert outdated_stages(outputs.run) == {"ppo": "sft", "dpo": "sft"}
    assert "stage=ppo and of stage=dpo was trained from an earlier result of stage=sft." in caplog.text
    own = f"overwrite=true run=rlhf paths.root={outputs.root}"
    assert f"To train again: python train.py stage=ppo {own}; python train.py stage=dpo {own}" in caplog.text
    outputs.export("dpo", sft)
    assert Export(str(final)).provenance["stage"] == "dpo"


def test_an_output_of_a_chosen_model_is_not_outdated(outputs: Outputs, tmp_path: Path) -> None:
    """``stage.policy=<path>`` does not name the run's own SFT model."""
    other = tmp_path / "other.pt"
    save_result(outputs.result, other, {})
    outputs.export("ppo", other)
    outputs.export("sft")
    assert outdated_stages(outputs.run) == {}


@pytest.mark.parametrize(("again", "warns"), [(False, False), (True, True)])
def test_policies_of_different_parents_are_reported(
    outputs: Outputs, caplog: pytest.LogCaptureFixture, again: bool, warns: bool
) -> None:
    """PPO on the result of DPO has the same SFT model. A folder of transformers has no known parent."""
    sft = outputs.export("sft")
    dpo = outputs.export("dpo", sft)
    if again:
        outputs.export("sft", change=0.1)
    ppo = outputs.export("ppo", dpo)
    policies = {"sft": Export(str(sft)), "dpo": Export(str(dpo)), "ppo": Export(str(ppo)), "hub": Pretrained("a/b")}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rlhf"):
        warn_about_parents(policies)
    assert ("different models" in caplog.text) == warns
    assert not warns or "sft; dpo, ppo" in caplog.text


@pytest.mark.parametrize(("before", "now"), [("none", "lora"), ("lora", "none")])
def test_a_run_does_not_continue_with_or_without_an_adapter(before: str, now: str) -> None:
    recorded, changed = (provenance_of(f"adapter={name}") for name in (before, now))
    with pytest.raises(ConfigError, match=f"adapter was {before} and is {now}"):
        check_resumable("last.ckpt", recorded, changed)
