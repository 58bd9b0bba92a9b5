"""What PPO proves of its critic with ``check=true``."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rlhf.checks import Check, few_rows, no_dropout, same_whatever_the_padding
from rlhf.data import TextBatch


def critic_checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of a PPOModule's critic on answers to its own prompts."""
    rollout = module.answer(datamodule.collate(few_rows(datamodule)))
    texts = TextBatch(rollout.tokens, rollout.mask, rollout.answer)

    def read(tokens: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
        return module.values_of(module.policy(tokens, mask, answer), tokens, mask, answer)

    yield no_dropout(module, "critic", module.critic, read, texts)
    yield from same_whatever_the_padding(module, "values", read, texts, module.policy.lm)
