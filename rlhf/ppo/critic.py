"""The critic of PPO: where it comes from, and its values."""

from typing import TypeAlias

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf.models import ModelSource, PolicyOutput, ScalarHead, ScalarModel, disable_dropout, state_width
from rlhf.rl import ModelInputs
from rlhf.tensors import scatter

Critic: TypeAlias = ScalarModel | ScalarHead  # a separate model, or a head on the policy


def open_critic(
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
        lm = AutoModelForCausalLM.from_config(lm.config, trust_remote_code=False)
    return disable_dropout(ScalarModel(lm.base_model, ScalarHead(state_width(lm))))


def critic_width(critic: Critic, policy_width: int) -> int:
    """Return the width of the hidden states that the critic reads."""
    return policy_width if isinstance(critic, ScalarHead) else critic.head.settings["input_dim"]


def critic_values(
    critic: Critic,
    output: PolicyOutput,
    inputs: ModelInputs,
    *,
    states: Tensor | None = None,
    detach: bool = False,
) -> Tensor:
    """Compute the critic's value before each response token.

    Args:
        critic: A separate model, or a head on the policy.
        output: Output of the policy, whose hidden states a head reads.
        inputs: Prompts with responses.
        states: States of a separate critic, see ``PolicyWithReference.states_with_critic``. None: they are computed
            here.
        detach: Do not propagate the gradient of a head into the policy.

    Returns:
        [batch, time] values, in reward units; 0 on masked tokens.
    """
    if isinstance(critic, ScalarHead):
        return scatter(critic(output.states.detach() if detach else output.states), inputs.response_mask)
    if states is not None:
        return scatter(critic.values(states), inputs.response_mask)
    return critic.token_values(*inputs)
