"""A run with tiny models, and chats with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contract.configs import compose_config
from harness import make_eos_likely, tiny_reward_model
from rlhf.chat.command import open_chat
from rlhf.chat.session import Chat
from rlhf.export import save_result
from rlhf.sampling import SamplingParams
from rlhf.stage import Result

SETTINGS: dict[str, Any] = dict.fromkeys(
    ("models", "reward_model", "system", "template", "multi_turn", "max_length"), None
)
CONVERSATIONS = (
    "{% for m in messages %}{{ '<bos>' + m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ '<eos>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant:' }}{% endif %}"
)
OpenChat = Callable[..., Chat]


@pytest.fixture
def run_root(tmp_path: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The directory of a run with an SFT model, a PPO model of other weights and a reward model."""
    reward_model = tiny_reward_model(lm)
    make_eos_likely(lm, tokenizer.eos_token_id)
    root = tmp_path / "outputs"
    provenance = {"config": {"data": {"max_length": 96}}}
    save_result(Result(lm, tokenizer), root / "rlhf" / "sft" / "sft_final.pt", provenance)
    save_result(Result(reward_model, tokenizer), root / "rlhf" / "reward" / "reward_model_final.pt", {})
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(1.5)
    save_result(Result(lm, tokenizer), root / "rlhf" / "ppo" / "ppo_final.pt", provenance)
    return root


@pytest.fixture
def opened(run_root: Path) -> OpenChat:
    """Opens chats with the models of the run; keywords as in ``conf/stage/chat.yaml``."""

    def build(*overrides: str, **keys: Any) -> Chat:
        cfg = compose_config("stage=chat", "trainer=cpu", f"paths.root={run_root}", *overrides)
        keys = {"sampling": SamplingParams(max_new_tokens=12, temperature=1.0), **keys}
        return open_chat(cfg, **{**SETTINGS, **keys})

    return build


@pytest.fixture
def chat(opened: OpenChat) -> Chat:
    """A chat with the two policies and the reward model of the run."""
    return opened()
