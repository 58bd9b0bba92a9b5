"""The critic of PPO: where it comes from."""

from transformers import PreTrainedTokenizerBase

from rlhf.models import ModelSource, ScalarHead, ScalarModel, disable_dropout, state_width
from rlhf.models.opening import language_model_class
from rlhf.rl.models import Critic


def open_separate_critic(
    init: str, *, policy: ModelSource, reward_model: ModelSource | None, tokenizer: PreTrainedTokenizerBase
) -> ScalarModel:
    """Open a separate critic, without dropout.

    Args:
        init: ``reward_model``, ``sft`` (the trunk of the policy under a new head) or ``random``.
        policy: Source of the policy.
        reward_model: Source of the reward model; required for ``reward_model`` only.
        tokenizer: Tokenizer of the policy.
    """
    if init == "reward_model":
        assert reward_model is not None
        return disable_dropout(reward_model.scalar_model(tokenizer))
    lm = policy.language_model(tokenizer)
    if init == "random":
        lm = language_model_class(lm.config).from_config(lm.config, trust_remote_code=False)
    return disable_dropout(ScalarModel(lm.base_model, ScalarHead(state_width(lm))))


def critic_width(critic: Critic, policy_width: int) -> int:
    """Return the width of the hidden states that the critic reads."""
    return policy_width if isinstance(critic, ScalarHead) else critic.head.settings["input_dim"]
