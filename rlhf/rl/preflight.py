"""What the stages that learn from their own answers prove of themselves with ``check=true``."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.data import SequenceBatch
from rlhf.models import Frozen
from rlhf.preflight import (
    Check,
    check_accumulation_equivalence,
    check_frozen_models,
    check_no_dropout,
    check_padding_invariance,
    check_padding_is_ignored,
    check_single_bos,
    full_precision,
    logprob_measure,
    sample_rows,
    score_measure,
)
from rlhf.rl.experience import Minibatch
from rlhf.rl.objective import policy_ratio
from rlhf.sampling import Rollout, generate
from rlhf.tensors import masked_sum


def checks(module: Any, datamodule: Any) -> Iterator[Check]:
    """Checks of an OnPolicyModule on answers to its own prompts."""
    prompts = datamodule.collate(sample_rows(datamodule))
    rollout = module.sample(prompts)
    texts = SequenceBatch(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
    policy, reference = module.policy, module.reference
    judges = [part for part in module.reward.modules() if isinstance(part, Frozen)]
    yield check_single_bos(module.tokenizer, prompts.input_ids)
    yield check_frozen_models(module)
    yield check_no_dropout(module, "policy", policy, logprob_measure(policy), texts)
    yield check_no_dropout(module, "reference", reference.model, logprob_measure(reference), texts)
    for judge in judges:
        yield check_no_dropout(module, "reward model", judge.model, score_measure(judge), texts)
    if module.trainer.ckpt_path is None:  # a resumed policy has left the reference
        yield check_first_kl(module, rollout)
    yield check_sampling_matches_scoring(module, prompts.input_ids)
    yield from check_padding_invariance(module, "log-probs", logprob_measure(policy), texts, policy.lm)
    for judge in judges:
        yield from check_padding_invariance(module, "scores", score_measure(judge), texts, policy.lm)
    module.train()  # as in training: dropout would show
    part = next(iter(module.iteration(prompts)))
    yield check_first_ratio(module, part)
    module.eval()
    yield check_padding_is_ignored(module, part)
    yield check_accumulation_equivalence(module, part, _pieces(part))


@torch.no_grad()
def check_first_ratio(module: Any, part: Minibatch) -> Check:
    """Before the first update, the log-probs of the update are those of the rollout to the last bit.

    Both read the same tensors, so equal shapes give equal rounding.
    """
    with module.trainer.precision_plugin.forward_context():
        logprobs = module.policy_output(part).logprobs
    away = float((policy_ratio(logprobs, part.old_logprobs, part.response_mask) - 1).abs().max())
    return Check(
        "first ratio exactly 1",
        away == 0,
        f"largest distance from 1: {away:.1e}",
        "0",
        "the update sees another policy than the one that answered (dropout, precision, shapes or temperature): "
        "clipping would cut at random",
    )


def check_first_kl(module: Any, rollout: Rollout) -> Check:
    """Before the first update, the policy is the reference to the last bit."""
    seen = module.evaluate_rollout(rollout, [torch.arange(len(rollout.input_ids))])
    apart = float(masked_sum((seen.logprobs - seen.ref_logprobs).abs(), rollout.response_mask).max())
    return Check(
        "first KL exactly 0",
        apart == 0,
        f"largest sum of |log pi - log reference|: {apart:.1e} nats",
        "0 nats",
        "policy and reference are not the same model, or not in the same state (dropout, precision): the KL price "
        "would pull towards another model than the one training starts from",
    )


def check_sampling_matches_scoring(module: Any, prompts: list[list[int]]) -> Check:
    """The most likely answer, drawn with the model's cache and padding left, is the most likely one as scored, too."""
    greedy = replace(module.sampling, temperature=0.0)
    with torch.no_grad(), full_precision(module):
        rollout = generate(module.policy.lm, prompts, greedy, module.stops)
        hits = module.policy(rollout.input_ids, rollout.attention_mask, rollout.response_mask).correct
    share = float(hits[rollout.response_mask].float().mean())
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
    order = part.response_mask.sum(dim=1).argsort(stable=True)
    return [_rows(part, rows) for rows in order.split(-(-len(order) // count))]


def _rows(part: Minibatch, rows: Tensor) -> Minibatch:
    tensors = {name.name: value for name in fields(part) if isinstance(value := getattr(part, name.name), Tensor)}
    return replace(part, **{name: value[rows] for name, value in tensors.items()})
