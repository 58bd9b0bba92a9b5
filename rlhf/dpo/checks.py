"""What DPO proves of itself with ``check=true``."""

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
from rlhf.data import PairBatch


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of a DPOModule on its own data."""
    rows = few_rows(datamodule)
    batch = datamodule.collate(rows).to(module.device)
    texts, policy, reference = batch.texts, module.policy, module.reference
    yield one_bos(module.tokenizer, real_rows(texts), datamodule.max_length)
    yield eos_carries_loss(module, policy, batch, datamodule.max_length)
    yield frozen_parts(module)
    yield no_dropout(module, "policy", policy, reads_logprobs(policy), texts)
    yield no_dropout(module, "reference", reference.model, reads_logprobs(reference), texts)
    if module.trainer.ckpt_path is None:  # a resumed policy has left the reference
        yield first_loss(module, batch)
    yield from same_whatever_the_padding(module, "log-probs", reads_logprobs(policy), texts, policy.lm)
    rows = _with_reference(module, rows, batch)
    yield padding_reaches_no_loss(module, datamodule.collate(rows).to(module.device))
    whole = datamodule.collate(rows).to(module.device)
    yield accumulation_is_the_big_batch(module, whole, micro_batches(rows, datamodule))


@torch.no_grad()
def first_loss(module: Any, batch: PairBatch) -> Check:
    """While the policy is the reference, no answer has a reward yet, and the loss is ln 2 whatever the data.

    Policy and reference see the same tensors, so their log-probs are equal to the last bit.
    """
    module.train()  # as in training
    with module.trainer.precision_plugin.forward_context():
        loss, numbers = loss_of(module, batch)
    module.eval()
    rewards = max(abs(float(numbers["rewards/chosen"])), abs(float(numbers["rewards/rejected"])))
    return Check(
        "first loss ln 2, first rewards 0",
        rewards == 0 and abs(float(loss) - math.log(2)) < 1e-6,
        f"loss {float(loss):.7f}, rewards {rewards:.1e}",
        f"{math.log(2):.7f} +- 1e-6; 0",
        "policy and reference are not the same model, or not in the same state (dropout, precision): rewards would be "
        "measured from somewhere else than where training starts",
    )


def _with_reference(module: Any, rows: list[Any], batch: PairBatch) -> list[Any]:
    """The rows with their log-probs under the reference, so that the same are used however the rows are batched."""
    chosen, rejected = batch.halves(module._reference_logprobs(batch))
    known = zip(chosen.tolist(), rejected.tolist(), strict=True)
    return [replace(row, reference=pair) for row, pair in zip(rows, known, strict=True)]
