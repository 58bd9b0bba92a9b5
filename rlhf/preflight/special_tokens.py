"""Pre-flight checks of BOS and EOS."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, SequenceBatch
from rlhf.models import Policy
from rlhf.preflight.measurements import full_precision
from rlhf.stage import StageModule
from rlhf.stage.check import Check
from rlhf.tensors import last_true


def check_single_bos(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> Check:
    """Check that every sequence begins with exactly one BOS, if the tokenizer adds one.

    Args:
        tokenizer: The tokenizer of the stage.
        rows: Token ids of each sequence, without padding.
    """
    bos = tokenizer.bos_token_id
    counts = sorted({_leading_count(row, bos) for row in rows})
    adds_bos = bos is not None and list(tokenizer("x")["input_ids"])[:1] == [bos]
    return Check(
        "every sequence begins with one BOS",
        counts == [1] or (counts == [0] and not adds_bos),
        "the tokenizer has no BOS" if bos is None else f"BOS tokens at the beginning: {', '.join(map(str, counts))}",
        "1" if adds_bos else "1, or 0 in every sequence",
        f"Models are trained on sequences that begin with one {tokenizer.bos_token!r}. Here, the chat template and the "
        "tokenizer both add it, or neither does. See the chat template and data.template.",
    )


def _leading_count(row: Sequence[int], token: int | None) -> int:
    return next((count for count, other in enumerate(row) if other != token), len(row))


def check_ends_with_eos(tokenizer: PreTrainedTokenizerBase, batch: SequenceBatch, max_length: int) -> Check:
    """Check that every response ends with EOS.

    Args:
        tokenizer: The tokenizer of the stage.
        batch: Prompts with responses.
        max_length: Sequences of this many tokens were truncated and need not end with EOS.
    """
    has_eos, truncated = _endings(batch.input_ids, batch.attention_mask, tokenizer.eos_token_id, max_length)
    return Check(
        "every response ends with EOS",
        bool((has_eos | truncated).all()),
        f"{int(has_eos.sum())} of {len(has_eos)} end with EOS, {int((truncated & ~has_eos).sum())} were truncated",
        "all that were not truncated",
        f"Responses without {tokenizer.eos_token!r} teach a model never to stop. See the chat template and "
        "data.template.",
    )


def _endings(input_ids: Tensor, attention_mask: Tensor, eos: int, max_length: int) -> tuple[Tensor, Tensor]:
    """Return which rows end with EOS and which have the maximum length, [batch] bool each."""
    rows = torch.arange(len(input_ids), device=input_ids.device)
    return input_ids[rows, last_true(attention_mask)] == eos, attention_mask.sum(dim=1) >= max_length


def check_eos_in_loss(module: StageModule, policy: Policy, batch: Batch, max_length: int) -> Check:
    """Check that the training loss depends on the log-prob of every final EOS.

    Args:
        module: The stage.
        policy: The trained policy. A hook records its log-probs while the loss is computed.
        batch: A training batch.
        max_length: Sequences of this many tokens were truncated and need not end with EOS.
    """
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def record(policy: nn.Module, args: Any, keywords: Any, output: Any) -> None:
        if output.logprobs.requires_grad:
            inputs = signature(policy.forward).bind(*args, **keywords).arguments
            calls.append((inputs["input_ids"], inputs["attention_mask"], inputs["response_mask"], output.logprobs))

    hook = policy.register_forward_hook(record, with_kwargs=True)
    try:
        with full_precision(module):
            loss = module.training_loss(batch)[0]
    finally:
        hook.remove()
    gradients = torch.autograd.grad(loss, [logprobs for *_, logprobs in calls], materialize_grads=True)
    total = learned = missing = 0
    for (input_ids, attention_mask, response_mask, _), gradient in zip(calls, gradients, strict=True):
        has_eos, truncated = _endings(input_ids, attention_mask, module.tokenizer.eos_token_id, max_length)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        in_loss = (response_mask & (gradient != 0))[rows, last_true(attention_mask)]
        total += int(has_eos.sum())
        learned += int((has_eos & in_loss).sum())
        missing += int((~has_eos & ~truncated).sum())
    return Check(
        "EOS contributes to the loss",
        total == learned and not missing,
        f"in {learned} of {total} responses that end with EOS; {missing} complete responses have no EOS",
        "all",
        "The policy never learns to end a response: EOS is missing from the sequence, or masked out of the loss. The "
        "usual cause is pad_token = eos_token with padding that is recognized by its token id instead of a mask.",
    )
