"""The interface of reward functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Prompt
from rlhf.errors import ConfigError
from rlhf.models import ModelSource
from rlhf.reward_functions.endings import end_as_in_training
from rlhf.sampling import Rollout
from rlhf.tensors import shape_of


@dataclass(frozen=True)
class ScoringBatch:
    """Responses to be scored, as token ids and as text.

    Args:
        input_ids: [batch, time] prompt and response, padded on the right.
        attention_mask: [batch, time] bool, True on real tokens.
        prompts: Raw text of each prompt, as in the data.
        responses: Each response as text, without special tokens.
        targets: Reference response of each prompt in the data; None where there is none.
        columns: Value of each prompt in further columns of the data, by column; None where its row has none. These are
            the ``columns`` of the reward function that the data have.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: Sequence[str]
    responses: Sequence[str]
    targets: Sequence[str | None]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, rollout: Rollout, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> "ScoringBatch":
        """Return the responses of a rollout, which end as those that reward models are trained on.

        Args:
            rollout: Prompts with sampled responses.
            prompts: The prompt of each response.
            tokenizer: Tokenizer of the policy.
        """
        return cls(
            *end_as_in_training(rollout, tokenizer),
            [prompt.raw_text for prompt in prompts],
            rollout.decode(tokenizer),
            [prompt.target for prompt in prompts],
            columns_of(prompts),
        )


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Return the values of prompts in further columns of the data, by column."""
    names = prompts[0].columns if prompts else ()
    return {name: [prompt.columns[name] for prompt in prompts] for name in names}


def check_rewards(reward: nn.Module, result: Any, responses: int) -> None:
    """Check that a reward function has returned one reward per response.

    Args:
        reward: The reward function.
        result: What it has returned.
        responses: Number of responses.

    Raises:
        ConfigError: It has returned something else.
    """
    if not isinstance(result, Tensor) or result.shape != (responses,):
        raise ConfigError(
            f"The reward function {type(reward).__name__} must return a tensor of shape [{responses}], got "
            f"{shape_of(result)}.",
            "Return one number per response, [batch].",
        )


class RewardFunction(nn.Module):
    """Base class of reward functions: a module that maps a ``ScoringBatch`` to one reward per response.

    Attributes:
        needs_model: True if the reward function uses the reward models of ``stage.reward_model``.
        needs_targets: True if it requires reference responses. ``check_target`` is then called with those of all
            prompts before training.
        columns: Further columns of the data that it reads, each with whether it requires that column. The name
            ``EVERY_COLUMN`` stands for all columns.
    """

    needs_model: bool = False
    needs_targets: bool = False
    columns: Mapping[str, bool] = MappingProxyType({})

    def load(self, sources: Sequence[ModelSource], tokenizer: PreTrainedTokenizerBase) -> None:
        """Load everything that scoring requires. A stage calls this once, before training.

        Args:
            sources: Sources of the reward models; empty if ``needs_model`` is False.
            tokenizer: Tokenizer of the policy.
        """

    def check_target(self, target: str | None) -> None:
        """Check that responses to a prompt can be scored.

        Args:
            target: The reference response of the prompt; None if the data have none.

        Raises:
            DataError: They cannot, because of the reference response.
        """

    def forward(self, batch: ScoringBatch) -> Tensor:
        """Return the reward of each response: [batch], in reward units; higher is better."""
        raise NotImplementedError

    def score_with_components(self, batch: ScoringBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rewards, [batch], and the components to log with them, [batch] each, by name."""
        return self(batch), {}
