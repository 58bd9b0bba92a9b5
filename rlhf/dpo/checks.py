"""What the stages that learn from preferences prove of themselves with ``check=true``."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from rlhf.checks import (
    Check,
    accumulation_is_the_big_batch,
    eos_carries_loss,
    few_rows,
    frozen_parts,
    loss_of,
    micro_batches,
    no_dropout,
    one_bos,
    padding_reaches_no_loss,
    reads_logprobs,
    real_rows,
    same_whatever_the_padding,
)
from rlhf.data import Batch
from rlhf.dpo.objective import kto_loss, sigmoid_loss
from rlhf.dpo.reference import ReferenceLogprobs


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of a PreferenceModule on its own data."""
    rows = [replace(row) for row in few_rows(datamodule)]  # so that the data's own learn nothing of this
    batch = datamodule.collate(rows).to(module.device)
    texts, policy, reference = batch.texts, module.policy, module.reference
    loss = getattr(module.objective, "func", module.objective)  # without its numbers
    yield one_bos(module.tokenizer, real_rows(texts))
    yield eos_carries_loss(module, policy, batch, datamodule.max_length)
    yield no_dropout(module, "policy", policy, reads_logprobs(policy), texts)
    if reference is not None:
        yield frozen_parts(module)
        yield no_dropout(module, "reference", reference.model, reads_logprobs(reference), texts)
    if reference is not None and module.trainer.ckpt_path is None:  # a resumed policy has left the reference
        yield first_rewards(module, batch)
        if loss is sigmoid_loss and not module.sft_coef:
            yield first_loss(module, batch)
    yield from same_whatever_the_padding(module, "log-probs", reads_logprobs(policy), texts, policy.lm)
    if reference is not None:  # the same numbers however the rows are batched
        ReferenceLogprobs(module._score_by_reference, len(rows)).fill(rows, "check")
    whole = datamodule.collate(rows).to(module.device)
    yield padding_reaches_no_loss(module, whole)
    if loss is not kto_loss:  # its baseline is a statistic of the batch
        yield accumulation_is_the_big_batch(module, whole, micro_batches(rows, datamodule))


@torch.no_grad()
def first_rewards(module: Any, batch: Batch) -> Check:
    """While the policy is the reference, no answer has a reward yet.

    Both see the same tensors, so their log-probs are equal to the last bit.
    """
    numbers = _as_in_training(module, batch)
    rewards = max(abs(float(numbers[name])) for name in ("rewards/chosen", "rewards/rejected") if name in numbers)
    return Check(
        "first rewards exactly 0",
        rewards == 0,
        f"largest mean reward {rewards:.1e}",
        "0",
        "policy and reference are not the same model, or not in the same state (dropout, precision): rewards would be "
        "measured from somewhere else than where training starts",
    )


@torch.no_grad()
def first_loss(module: Any, batch: Batch) -> Check:
    """While the policy is the reference, the sigmoid loss is ln 2 whatever the data."""
    loss = float(_as_in_training(module, batch)["train/loss"])
    return Check(
        "first loss ln 2",
        abs(loss - math.log(2)) < 1e-6,
        f"{loss:.7f}",
        f"{math.log(2):.7f} +- 1e-6",
        "policy and reference say different things of the same answers, or the loss reads something else than their "
        "difference",
    )


def _as_in_training(module: Any, batch: Batch) -> dict[str, Any]:
    """The numbers of a training step in train mode, where dropout would show, and in the Trainer's precision."""
    module.train()
    with module.trainer.precision_plugin.forward_context():
        numbers = loss_of(module, batch)[1]
    module.eval()
    return numbers
