"""What PPO proves of its critic with ``check=true``."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rlhf.data import SequenceBatch
from rlhf.preflight import Check, check_no_dropout, check_padding_invariance, sample_rows


def critic_preflight(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of a PPOModule's critic on answers to its own prompts."""
    rollout = module.sample(datamodule.collate(sample_rows(datamodule)))
    texts = SequenceBatch(rollout.input_ids, rollout.attention_mask, rollout.response_mask)

    def read(input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        return module.values_of(
            module.policy(input_ids, attention_mask, response_mask), input_ids, attention_mask, response_mask
        )

    yield check_no_dropout(module, "critic", module.critic, read, texts)
    yield from check_padding_invariance(module, "values", read, texts, module.policy.lm)
