"""Configuration keys that a user may have meant by one that does not exist."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from rlhf.overrides import leaves
from rlhf.stages import CONF, stages_with_group

# Arguments of transformers and TRL, and keys of the original documentation, for users who know those.
OTHER_NAMES = {
    "assistant_only_loss": "data.loss_on",
    "base_model": "model.path",
    "beta": "stage.kl_coef",  # of GRPO; the losses of DPO have a key of this name
    "bf16": "trainer.precision",
    "center_rewards_coefficient": "stage.centering_coef",
    "cliprange": "stage.clip_range",
    "completion_only_loss": "data.loss_on",
    "dataset_name": "data.train",
    "epochs": "trainer.max_epochs",
    "epsilon": "stage.clip_range",
    "epsilon_high": "stage.clip_range_high",
    "eval_steps": "trainer.val_check_interval",
    "fp16": "trainer.precision",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "logging_steps": "trainer.log_every_n_steps",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.r",
    "loss_type": "loss",
    "lr": "stage.learning_rate",
    "lr_scheduler_type": "stage.schedule",
    "max_completion_length": "stage.sampling.max_new_tokens",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.path",
    "num_epochs": "trainer.max_epochs",
    "num_iterations": "stage.ppo_epochs",
    "num_ppo_epochs": "stage.ppo_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "output_dir": "paths.root",
    "per_device_eval_batch_size": "data.eval_batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "response_length": "stage.sampling.max_new_tokens",
    "reward_funcs": "reward",
    "reward_weights": "reward.weights",
    "save_steps": "callbacks.checkpoint.every_n_train_steps",
    "use_peft": "adapter",
    "vf_coef": "stage.value_coef",
    "warmup_steps": "stage.warmup_ratio",
}


def suggestion(key: str, overrides: Sequence[str]) -> str:
    """Return a sentence about the key that an unknown one may stand for; empty if none is similar.

    Args:
        key: A key that the composed configuration does not have.
        overrides: The overrides of the command, of which ``stage=<name>`` selects the keys of one stage.
    """
    chosen = {name: choice for name, _, choice in (text.partition("=") for text in overrides)}
    known = _known_keys()
    if key in known:
        choices = [f"{group}={choice}" for group, choice in known[key] if group]
        return f"{key} belongs to {_enumerated(choices)}." if choices else ""
    last = key.split(".")[-1]
    available = [full for full, places in known.items() if any(_is_available(place, chosen) for place in places)]
    by_name = {full: full.split(".")[-1] for full in available}
    if last in OTHER_NAMES and last not in by_name.values():
        return f"Did you mean {OTHER_NAMES[last]}?"
    alike = get_close_matches(last, set(by_name.values()), n=1, cutoff=0.75)
    meant = sorted((full for full, name in by_name.items() if name in alike), key=lambda full: (full.count("."), full))
    meant = [full for full in meant if full.split(".")[0] == key.split(".")[0]] or meant
    return f"Did you mean {_enumerated(meant[:3], 'or')}?" if meant else ""


@cache
def _known_keys() -> dict[str, list[tuple[str, str]]]:
    """Return every key of ``conf/`` with the groups and choices that have it; no group for ``config.yaml``."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(CONF.glob("**/*.yaml")):
        group = "" if path.parent == CONF else path.parent.name
        if group in ("experiment", "help", "sweep"):
            continue
        places = [("stage", name) for name in stages_with_group("rl")] if group == "rl" else [(group, path.stem)]
        package = re.search(r"^# @package (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        prefix = (package[1] if package else group).replace("_global_", "")
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for key, _ in leaves(content or {}, prefix):
            if key.split(".")[0] not in ("defaults", "hydra", "published", "stage_info"):
                found.setdefault(key, []).extend(places)
    return found


def _is_available(place: tuple[str, str], chosen: dict[str, str]) -> bool:
    """Return whether a key of a choice can be set in this command, whose stage may not be the one with the key."""
    group, choice = place
    stages = [choice] if group == "stage" else stages_with_group(group)
    return not stages or chosen.get("stage", stages[0]) in stages


def _enumerated(items: Sequence[str], conjunction: str = "and") -> str:
    return f" {conjunction} ".join(filter(None, [", ".join(items[:-1]), items[-1]]))
