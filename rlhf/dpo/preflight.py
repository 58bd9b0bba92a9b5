"""Pre-flight checks (``check=true``) of the modules that train on preferences."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.data import Batch, RecordDataModule, UnpairedBatch
from rlhf.dpo.objective import sigmoid_loss
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
    extreme_sequences,
    full_precision_gradient,
    logprob_measure,
    micro_batches,
    sample_rows,
    unpadded_rows,
)
from rlhf.stage import Mean, Metrics


def checks(module: Any, datamodule: RecordDataModule) -> Iterator[Check]:
    """Check a ``PreferenceModule`` on its models and data.

    Args:
        module: The module, on its device and with its models, before the first step.
        datamodule: Its data. The checks work on copies of its rows.
    """
    rows = [replace(row) for row in sample_rows(datamodule, 4)]
    batch: Any = datamodule.collate(rows).to(module.device)
    extremes = extreme_sequences(datamodule).to(module.device)
    sequences, policy, reference = batch.sequences, module.policy, module.reference
    yield check_single_bos(module.tokenizer, [*unpadded_rows(sequences), *unpadded_rows(extremes)])
    yield check_eos_in_loss(module, policy, batch, datamodule.max_length)
    yield check_no_dropout(module, "policy", policy, logprob_measure(policy), sequences)
    if reference is not None:
        yield check_frozen_models(module)
        yield check_no_dropout(module, "reference", reference.model, logprob_measure(reference), sequences)
    if reference is not None and module.trainer.ckpt_path is None:  # A resumed policy differs from its reference model.
        metrics = _training_metrics(module, batch)
        yield check_first_rewards(metrics)
        if module.loss_function is sigmoid_loss and not module.sft_coef:
            yield check_first_loss(metrics)
    yield from check_padding_invariance(module, "log-probs", logprob_measure(policy), extremes, policy.lm)
    if reference is not None:  # Every batch below must see the same reference log-probs, to the last bit.
        ReferenceLogprobs(module.compute_ref_logprobs, len(rows)).fill(rows, "check")
    whole: Batch = datamodule.collate(rows).to(module.device)
    gradient = full_precision_gradient(module, [whole])
    yield check_padding_is_ignored(module, whole, gradient)
    if not isinstance(whole, UnpairedBatch):  # The KL baseline of unpaired losses is a statistic of the batch.
        yield check_accumulation_equivalence(module, whole, micro_batches(rows, datamodule), gradient)


def check_first_rewards(metrics: Mapping[str, Tensor | float]) -> Check:
    """Check that all rewards are 0 while the policy equals the reference model.

    Both models see the same tensors, so their log-probs are equal to the last bit.

    Args:
        metrics: Metrics of a training step.
    """
    rewards = max(abs(float(metrics[name])) for name in ("rewards/chosen", "rewards/rejected") if name in metrics)
    return Check(
        "first rewards exactly 0",
        rewards == 0,
        f"largest mean reward {rewards:.1e}",
        "0",
        "Policy and reference model differ in their weights or in their state (dropout, precision), so rewards are not "
        "measured from the point where training starts.",
    )


def check_first_loss(metrics: Mapping[str, Tensor | float]) -> Check:
    """Check that the sigmoid loss is ln 2 while the policy equals the reference model.

    Args:
        metrics: Metrics of a training step.
    """
    loss = float(metrics["train/loss"])
    return Check(
        "first loss ln 2",
        abs(loss - math.log(2)) < 1e-6,
        f"{loss:.7f}",
        f"{math.log(2):.7f} +- 1e-6",
        "Policy and reference model have different log-probs for the same responses, or the loss reads something other "
        "than their difference.",
    )


@torch.no_grad()
def _training_metrics(module: Any, batch: Batch) -> dict[str, Tensor | float]:
    """Return the metrics of a training step in train mode, where dropout is active, and in the training precision."""
    module.train()
    with module.trainer.precision_plugin.forward_context():
        metrics: Metrics = module.training_loss(batch)[1]
    module.eval()
    return {name: value.value if isinstance(value, Mean) else value for name, value in metrics.items()}
