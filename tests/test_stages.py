"""The declarations in ``conf/stage/*.yaml``: names, order, inputs, groups, and a stage that is added."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.configs import hydra_command
from rlhf import stages as stages_module
from rlhf.stages import BASE_MODEL, CONF, commands, policy_stages, stages, stages_with_group

NEW_STAGE = """
# @package _global_
defaults:
  - _self_
  - /shared_base: default
  - /penalty@stage.penalty: none
stage_name: rejection
stage_info:
  exports: policy
  final: rejection_final.pt
  reads: prompts
  inputs: {policy: sft, reward_model: reward}
  position: 25
  rl_priority: 4
paths:
  output: ${paths.run}/rejection
stage:
  _target_: mine.RejectionModule
data:
  _target_: rlhf.data.PromptDataModule
"""


def test_stages_are_listed_in_the_order_of_their_positions() -> None:
    assert list(stages()) == ["sft", "reward", "ppo", "grpo", "dpo", "collect", "evaluate"]
    assert [info.position for info in stages().values()] == sorted(info.position for info in stages().values())


def test_final_files_have_the_documented_names() -> None:
    assert {name: info.final for name, info in stages().items()} == {
        "sft": "sft_final.pt",
        "reward": "reward_model_final.pt",
        "ppo": "ppo_final.pt",
        "grpo": "grpo_final.pt",
        "dpo": "dpo_final.pt",
        "collect": "preferences.jsonl",
        "evaluate": None,
    }


def test_policies_exclude_the_reward_model_and_the_evaluation() -> None:
    assert [info.name for info in policy_stages()] == ["sft", "ppo", "grpo", "dpo"]


def test_ppo_has_priority_over_grpo_and_dpo() -> None:
    """Two stages of the same priority would leave the final model of a run to chance."""
    priorities = {info.rl_priority: name for name, info in stages().items() if info.rl_priority is not None}
    assert [priorities[number] for number in sorted(priorities)] == ["ppo", "grpo", "dpo"]


def test_inputs_come_from_earlier_stages_of_the_right_kind() -> None:
    """``policy`` is made by a stage that exports a policy, ``reward_model`` by one that exports a reward model."""
    assert stages()["sft"].inputs == {"policy": BASE_MODEL}
    for info in stages().values():
        for key, made_by in info.inputs.items():
            if made_by != BASE_MODEL:
                assert stages()[made_by].exports == key
                assert stages()[made_by].position < info.position


def test_groups_include_those_of_shared_bases() -> None:
    assert stages_with_group("loss") == ["dpo"]
    assert stages_with_group("reward") == ["ppo", "grpo", "collect"]
    assert stages_with_group("nonsense") == []


def test_the_pipeline_is_not_a_stage() -> None:
    assert (CONF / "stage" / "pipeline.yaml").is_file()
    assert "pipeline" not in stages()


def test_commands_are_choices_of_stage_but_not_stages() -> None:
    assert commands() == ["chat", "doctor", "label", "report", "runs"]
    assert not stages().keys() & commands()


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of ``conf`` with one more stage, which the declarations are read from."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "stage" / "rejection.yaml").write_text(NEW_STAGE.lstrip())
    for group, content in {"shared_base": "defaults:\n  - /filter: strict\n", "penalty": "", "filter": ""}.items():
        (conf / group).mkdir()
        choice = {"shared_base": "default", "penalty": "none", "filter": "strict"}[group]
        (conf / group / f"{choice}.yaml").write_text(content or "coef: 0.0\n")
    monkeypatch.setattr(stages_module, "CONF", conf)
    stages.cache_clear()
    yield conf
    stages.cache_clear()


def test_a_new_yaml_is_a_new_stage(conf: Path) -> None:
    """Position 25 is between the reward model (20) and PPO (30). No file of the package changes."""
    assert list(stages()) == ["sft", "reward", "rejection", "ppo", "grpo", "dpo", "collect", "evaluate"]
    assert stages()["rejection"].final == "rejection_final.pt"
    assert "rejection" in [info.name for info in policy_stages()]


def test_groups_of_a_new_stage_are_found(conf: Path) -> None:
    """``/penalty@stage.penalty`` is in its defaults list, and ``/filter`` in that of the base that it includes."""
    assert stages()["rejection"].groups == ("shared_base", "filter", "penalty")
    assert stages_with_group("filter") == stages_with_group("penalty") == ["rejection"]


def test_a_new_stage_composes_with_the_files_that_it_reads(conf: Path) -> None:
    with hydra_command("stage=rejection", "run=mine", "paths.root=/r", conf=conf) as cfg:
        assert cfg.stage_name == "rejection"
        assert cfg.paths.output == "/r/mine/rejection"
        assert cfg.data.train == cfg.files.prompts.train


def test_declarations_are_read_without_torch(repo: Path) -> None:
    code = "import sys; from rlhf.stages import stages; assert stages(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
