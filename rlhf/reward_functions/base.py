"""The interface of reward functions."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Prompt
from rlhf.models import ModelSource
from rlhf.reward_functions.endings import end_as_in_training
from rlhf.sampling import Rollout, SamplingParams


@dataclass(frozen=True)
class ScoringBatch:
    """Responses to be scored, as token ids and as text.

    Args:
        input_ids: [batch, time] prompt and response, padded on the right.
        attention_mask: [batch, time] bool, True on real tokens.
        prompts: Raw text of each prompt, as in the data.
        responses: Each response as text, without special tokens.
        targets: Reference response of each prompt in the data; None where there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: Sequence[str]
    responses: Sequence[str]
    targets: Sequence[str | None]

    @classmethod
    def of(
        cls, rollout: Rollout, prompts: Sequence[Prompt], sampling: SamplingParams, tokenizer: PreTrainedTokenizerBase
    ) -> "ScoringBatch":
        """Return the responses of a rollout, which end as those that reward models are trained on.

        Args:
            rollout: Prompts with sampled responses.
            prompts: The prompt of each response.
            sampling: The settings that the responses were sampled with.
            tokenizer: Tokenizer of the policy.
        """
        return cls(
            *end_as_in_training(rollout, tokenizer, sampling.stop_ids(tokenizer)),
            [prompt.raw_text for prompt in prompts],
            rollout.decode(tokenizer),
            [prompt.target for prompt in prompts],
        )


class RewardFunction(nn.Module):
    """Base class of reward functions: a module that maps a ``ScoringBatch`` to one reward per response.

    Attributes:
        needs_model: True if the reward function uses the reward models of ``stage.reward_model``.
        needs_targets: True if it requires reference responses. ``check_target`` is then called with those of all
            prompts before training.
    """

    needs_model: bool = False
    needs_targets: bool = False

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
