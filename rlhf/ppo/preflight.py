"""Pre-flight checks of PPO's critic (``check=true``)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rlhf.data import RecordDataModule, SequenceBatch
from rlhf.ppo.critic import Critic, critic_values
from rlhf.preflight import Check, check_no_dropout, check_padding_invariance, sample_rows
from rlhf.rl.collector import Collector
from rlhf.stage import StageModule


def critic_checks(
    module: StageModule, datamodule: RecordDataModule, collector: Collector, critic: Critic
) -> Iterator[Check]:
    """Check the critic on responses to the stage's own prompts.

    Args:
        module: The stage.
        datamodule: Its prompts.
        collector: Its collector.
        critic: Its critic.
    """
    policy = collector.policies.policy
    prompts: Any = datamodule.collate(sample_rows(datamodule))
    rollout = collector.sample(prompts)
    sequences = SequenceBatch(rollout.input_ids, rollout.attention_mask, rollout.response_mask)

    def measure_values(input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        output = policy(input_ids, attention_mask, response_mask)
        return critic_values(critic, output, input_ids, attention_mask, response_mask)

    yield check_no_dropout(module, "critic", critic, measure_values, sequences)
    yield from check_padding_invariance(module, "values", measure_values, sequences, policy.lm)
