"""Every stage with a model that projects its last hidden states to a width other than its ``hidden_size``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedTokenizerFast

from harness import TinyRun


@pytest.fixture
def opt_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TinyRun:
    """Tiny runs of a model like OPT-350M: its layers have width 32, and its last hidden states have width 16."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return TinyRun(tmp_path, tokenizer, AutoModelForCausalLM.from_config(config).eval())


def test_the_head_of_a_reward_model_reads_the_projected_states(opt_run: TinyRun) -> None:
    module = opt_run.train("reward", input_dim=16).module
    assert module.model.head.layers[0].in_features == 16


@pytest.mark.parametrize(
    "keys",
    [{"critic": "shared"}, {"critic_init": "sft"}, {"critic_init": "random"}, {"critic_init": "reward_model"}],
    ids=str,
)
def test_the_critic_reads_the_projected_states(opt_run: TinyRun, keys: dict[str, Any]) -> None:
    critic = opt_run.train("ppo", obs_dim=16, **keys).module.critic
    head = critic if "critic" in keys else critic.head
    assert head.layers[0].in_features == 16
