"""What the message for an unknown configuration key suggests."""

import pytest
from omegaconf import OmegaConf

from contract.configs import compose_config
from rlhf.stages import CONF
from rlhf.suggestions import OTHER_NAMES, suggestion

MISSING = object()


@pytest.mark.parametrize(
    ("key", "stage", "expected"),
    [
        ("learning_rate", "sft", "Did you mean stage.learning_rate?"),
        ("stage.bta", "dpo", "Did you mean stage.beta?"),
        ("trainer.max_epoch", "dpo", "Did you mean trainer.max_epochs?"),
        ("stage.num_train_epochs", "sft", "Did you mean trainer.max_epochs?"),
        ("num_epochs", "sft", "Did you mean trainer.max_epochs?"),
        ("num_iterations", "grpo", "Did you mean stage.ppo_epochs?"),
        ("beta", "dpo", "Did you mean stage.beta?"),
        ("beta", "grpo", "Did you mean stage.kl_coef?"),
        ("label_smoothing", "dpo", "Did you mean stage.loss.label_smoothing?"),
        ("label_smoothing", "grpo", ""),
        ("temperature", "grpo", "Did you mean stage.sampling.temperature?"),
        ("temperature", "reward", ""),
        ("adapter.r", "sft", "adapter.r belongs to adapter=lora."),
        ("stage.clip_range", "sft", "stage.clip_range belongs to stage=ppo and stage=grpo."),
        ("stage.qqq", "sft", ""),
        ("", "sft", ""),
    ],
)
def test_a_key_is_suggested(key: str, stage: str, expected: str) -> None:
    assert suggestion(key, [f"stage={stage}", f"{key}=1"]) == expected


@pytest.mark.parametrize("key", sorted(set(OTHER_NAMES.values())))
def test_keys_for_arguments_of_transformers_exist(key: str) -> None:
    """In one of the stages. A group counts as a key: ``loss``, ``adapter``."""
    stages = ("stage=ppo", "reward=weighted_sum"), ("stage=reward",), ("stage=sft",)
    composed = [compose_config(*stage, "model=pretrained", "model.path=folder", "adapter=lora") for stage in stages]
    exists = any(OmegaConf.select(cfg, key, default=MISSING) is not MISSING for cfg in composed)
    assert exists or (CONF / key).is_dir()
