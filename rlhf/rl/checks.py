"""What the stages that learn from their own answers prove of themselves with ``check=true``."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.checks import (
    Check,
    accumulation_is_the_big_batch,
    few_rows,
    frozen_parts,
    no_dropout,
    one_bos,
    one_precision,
    padding_reaches_no_loss,
    reads_logprobs,
    reads_scores,
    same_whatever_the_padding,
)
from rlhf.data import TextBatch
from rlhf.models import Frozen
from rlhf.rl.experience import Minibatch
from rlhf.rl.objective import policy_ratio
from rlhf.rollout import Rollout, roll_out
from rlhf.tensors import masked_sum


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of an OnlineModule on answers to its own prompts."""
    prompts = datamodule.collate(few_rows(datamodule))
    rollout = module.answer(prompts)
    texts = TextBatch(rollout.tokens, rollout.mask, rollout.answer)
    policy, reference = module.policy, module.reference
    judges = [part for part in module.reward.modules() if isinstance(part, Frozen)]
    yield one_bos(module.tokenizer, prompts.tokens)
    yield frozen_parts(module)
    yield no_dropout(module, "policy", policy, reads_logprobs(policy), texts)
    yield no_dropout(module, "reference", reference.model, reads_logprobs(reference), texts)
    for judge in judges:
        yield no_dropout(module, "reward model", judge.model, reads_scores(judge), texts)
    if module.trainer.ckpt_path is None:  # a resumed policy has left the reference
        yield first_kl(module, rollout)
    yield sampled_as_scored(module, prompts.tokens)
    yield from same_whatever_the_padding(module, "log-probs", reads_logprobs(policy), texts, policy.lm)
    for judge in judges:
        yield from same_whatever_the_padding(module, "scores", reads_scores(judge), texts, policy.lm)
    module.train()  # as in training: dropout would show
    part = next(iter(module.iteration(prompts)))
    yield first_ratio(module, part)
    module.eval()
    yield padding_reaches_no_loss(module, part)
    yield accumulation_is_the_big_batch(module, part, _pieces(part))


@torch.no_grad()
def first_ratio(module: Any, part: Minibatch) -> Check:
    """Before the first update, the log-probs of the update are those of the rollout to the last bit.

    Both read the same tensors, so equal shapes give equal rounding.
    """
    with module.trainer.precision_plugin.forward_context():
        logprobs = module.look(part).logprobs
    away = float((policy_ratio(logprobs, part.old_logprobs, part.answer) - 1).abs().max())
    return Check(
        "first ratio exactly 1",
        away == 0,
        f"largest distance from 1: {away:.1e}",
        "0",
        "the update sees another policy than the one that answered (dropout, precision, shapes or temperature): "
        "clipping would cut at random",
    )


def first_kl(module: Any, rollout: Rollout) -> Check:
    """Before the first update, the policy is the reference to the last bit."""
    seen = module.look_back(rollout, [torch.arange(len(rollout.tokens))])
    apart = float(masked_sum((seen.logprobs - seen.reference_logprobs).abs(), rollout.answer).max())
    return Check(
        "first KL exactly 0",
        apart == 0,
        f"largest sum of |log pi - log reference|: {apart:.1e} nats",
        "0 nats",
        "policy and reference are not the same model, or not in the same state (dropout, precision): the KL price "
        "would pull towards another model than the one training starts from",
    )


def sampled_as_scored(module: Any, prompts: list[list[int]]) -> Check:
    """The most likely answer, drawn with the model's cache and padding left, is the most likely one as scored, too."""
    greedy = replace(module.sampling, temperature=0.0)
    with torch.no_grad(), one_precision(module):
        rollout = roll_out(module.policy.lm, prompts, greedy, module.stops)
        hits = module.policy(rollout.tokens, rollout.mask, rollout.answer).hits
    share = float(hits[rollout.answer].float().mean())
    return Check(
        "answers are drawn from the model that is scored",
        share >= 0.98,
        f"{share:.1%} of greedy tokens are the most likely ones",
        "98%, for ties",
        "sampling with the model's cache of keys and values or of states gives other logits than reading the whole "
        "text: padding leaks into the cache, or positions are off",
    )


def _pieces(part: Minibatch, count: int = 4) -> list[Any]:
    """A minibatch cut into so many, shortest answers first, or fewer where it has fewer rows."""
    order = part.answer.sum(dim=1).argsort(stable=True)
    return [_rows(part, rows) for rows in order.split(-(-len(order) // count))]


def _rows(part: Minibatch, rows: Tensor) -> Minibatch:
    tensors = {name.name: value for name in fields(part) if isinstance(value := getattr(part, name.name), Tensor)}
    return replace(part, **{name: value[rows] for name, value in tensors.items()})
