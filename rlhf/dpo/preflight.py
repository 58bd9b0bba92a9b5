"""What the stages that learn from preferences prove of themselves with ``check=true``."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from rlhf.data import Batch
from rlhf.dpo.objective import kto_loss, sigmoid_loss
from rlhf.dpo.ref_logprobs import ReferenceLogprobs
from rlhf.preflight import (
    Check,
    check_accumulation_equivalence,
    check_eos_in_loss,
    check_frozen_models,
    check_no_dropout,
    check_padding_invariance,
    check_padding_is_ignored,
    check_single_bos,
    logprob_measure,
    micro_batches,
    sample_rows,
    training_loss,
    unpadded_rows,
)


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of a PreferenceModule on its own data."""
    rows = [replace(row) for row in sample_rows(datamodule)]  # so that the data's own learn nothing of this
    batch = datamodule.collate(rows).to(module.device)
    texts, policy, reference = batch.sequences, module.policy, module.reference
    loss = getattr(module.loss, "func", module.loss)  # without its numbers
    yield check_single_bos(module.tokenizer, unpadded_rows(texts))
    yield check_eos_in_loss(module, policy, batch, datamodule.max_length)
    yield check_no_dropout(module, "policy", policy, logprob_measure(policy), texts)
    if reference is not None:
        yield check_frozen_models(module)
        yield check_no_dropout(module, "reference", reference.model, logprob_measure(reference), texts)
    if reference is not None and module.trainer.ckpt_path is None:  # a resumed policy has left the reference
        yield check_first_rewards(module, batch)
        if loss is sigmoid_loss and not module.sft_coef:
            yield check_first_loss(module, batch)
    yield from check_padding_invariance(module, "log-probs", logprob_measure(policy), texts, policy.lm)
    if reference is not None:  # the same numbers however the rows are batched
        ReferenceLogprobs(module._score_by_reference, len(rows)).fill(rows, "check")
    whole = datamodule.collate(rows).to(module.device)
    yield check_padding_is_ignored(module, whole)
    if loss is not kto_loss:  # its baseline is a statistic of the batch
        yield check_accumulation_equivalence(module, whole, micro_batches(rows, datamodule))


@torch.no_grad()
def check_first_rewards(module: Any, batch: Batch) -> Check:
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
def check_first_loss(module: Any, batch: Batch) -> Check:
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
        numbers = training_loss(module, batch)[1]
    module.eval()
    return numbers
