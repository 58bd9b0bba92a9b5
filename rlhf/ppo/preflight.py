"""Pre-flight checks of PPO's critic (``check=true``)."""

from collections.abc import Iterator

from torch import Tensor

from rlhf.data import RecordDataModule
from rlhf.preflight import Check, check_no_dropout, check_padding_invariance, shortest_and_longest
from rlhf.rl import ModelInputs
from rlhf.rl.collector import Collector
from rlhf.rl.models import Critic
from rlhf.rl.preflight import sampled_responses
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

    def measure_values(input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        inputs = ModelInputs(input_ids, attention_mask, response_mask, int(response_mask.sum()))
        _, values = collector.models.update_outputs(inputs)
        assert values is not None
        return values

    with sampled_responses(datamodule, collector) as (_, _, sequences):
        yield check_no_dropout(module, "critic", critic, measure_values, sequences)
        extremes = shortest_and_longest(sequences)
        yield from check_padding_invariance(module, "values", measure_values, extremes, collector.models.policy.lm)
