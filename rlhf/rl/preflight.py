"""Pre-flight checks of the on-policy stages (``check=true``)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from rlhf.data import PromptBatch, RecordDataModule, SequenceBatch
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
    full_precision_gradient,
    logprob_measure,
    sample_rows,
    score_measure,
    shortest_and_longest,
)
from rlhf.rl.collector import Collector
from rlhf.rl.experience import Minibatch
from rlhf.rl.objective import policy_ratio
from rlhf.sampling import Rollout
from rlhf.stage import StageModule
from rlhf.tensors import masked_sum

# Responses that the checks sample, and their length in tokens: large models take much time to sample and evaluate.
SAMPLE_RESPONSES, SAMPLE_RESPONSE_TOKENS = 4, 16


@contextmanager
def sampled_responses(
    datamodule: RecordDataModule, collector: Collector
) -> Iterator[tuple[PromptBatch, Rollout, SequenceBatch]]:
    """Sample short responses to a few prompts of different lengths. Inside, the collector samples short responses.

    Args:
        datamodule: The prompts.
        collector: The collector of the stage.
    """
    sampling = collector.sampling
    collector.sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, SAMPLE_RESPONSE_TOKENS))
    try:
        count = 2 * max(SAMPLE_RESPONSES // collector.num_generations // 2, 1)
        prompts: Any = datamodule.collate(sample_rows(datamodule, count))
        rollout = collector.sample(prompts)
        yield prompts, rollout, SequenceBatch(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
    finally:
        collector.sampling = sampling


def on_policy_checks(
    module: StageModule,
    datamodule: RecordDataModule,
    collector: Collector,
    iteration: Callable[[PromptBatch], Iterator[Minibatch]],
) -> Iterator[Check]:
    """Check an on-policy stage on responses to its own prompts.

    Args:
        module: The stage.
        datamodule: Its prompts.
        collector: Its collector.
        iteration: Its iteration: a batch of prompts in, minibatches out.
    """
    policy, reference = collector.models.policy, collector.models.reference
    reward_models = [part for part in collector.reward.modules() if isinstance(part, Frozen)]
    with sampled_responses(datamodule, collector) as (prompts, rollout, sequences):
        yield check_single_bos(module.tokenizer, prompts.input_ids)
        yield check_frozen_models(module)
        yield check_no_dropout(module, "policy", policy, logprob_measure(policy), sequences)
        if reference is not None:
            yield check_no_dropout(module, "reference", reference.model, logprob_measure(reference), sequences)
        for model in reward_models:
            yield check_no_dropout(module, "reward model", model.model, score_measure(model), sequences)
        is_resumed = module.trainer.ckpt_path is not None  # A resumed policy differs from the reference model.
        if reference is not None and not is_resumed:
            yield check_first_kl(collector, rollout)
        yield check_sampling_matches_scoring(module, collector, prompts)
        extremes = shortest_and_longest(sequences)
        yield from check_padding_invariance(module, "log-probs", logprob_measure(policy), extremes, policy.lm)
        for model in reward_models:
            yield from check_padding_invariance(module, "scores", score_measure(model), extremes, policy.lm)
        module.train()  # As in training: dropout would show.
        minibatch = next(iter(iteration(prompts)))
        yield check_first_ratio(collector, minibatch)
        module.eval()
        gradient = full_precision_gradient(module, [minibatch])
        yield check_padding_is_ignored(module, minibatch, gradient)
        yield check_accumulation_equivalence(module, minibatch, _chunks(minibatch), gradient)


@torch.no_grad()
def check_first_ratio(collector: Collector, minibatch: Minibatch) -> Check:
    """Check that the first probability ratio is exactly 1.

    Rollout and update evaluate the same tensors, and equal shapes give equal rounding.
    """
    with collector.precision_context():
        output, _ = collector.models.update_outputs(minibatch.inputs)
    distance = float((policy_ratio(output.logprobs, minibatch.old_logprobs, minibatch.response_mask) - 1).abs().max())
    return Check(
        "first ratio exactly 1",
        distance == 0,
        f"largest distance from 1: {distance:.1e}",
        "0",
        "The update evaluates a different policy from the one that sampled the responses, because of dropout, "
        "precision, shapes or temperature. Clipping would be arbitrary.",
    )


def check_first_kl(collector: Collector, rollout: Rollout) -> Check:
    """Check that policy and reference model agree to the last bit before the first update."""
    experience = collector.evaluate_rollout(rollout, [range(len(rollout.input_ids))])
    assert experience.ref_logprobs is not None
    differences = (experience.logprobs - experience.ref_logprobs).abs()
    distance = float(masked_sum(differences, rollout.response_mask).max())
    return Check(
        "first KL exactly 0",
        distance == 0,
        f"largest sum of |log pi - log ref|: {distance:.1e} nats per response",
        "0 nats per response",
        "Policy and reference model differ in their weights, dropout or precision. The KL penalty would pull the "
        "policy towards a different model from the one that training starts from.",
    )


def check_sampling_matches_scoring(module: StageModule, collector: Collector, prompts: PromptBatch) -> Check:
    """Check that greedily sampled tokens are the most likely ones when the whole response is evaluated at once."""
    greedy = replace(collector.sampling, temperature=0.0)
    policy = collector.models.policy
    with torch.no_grad(), full_precision(module):
        rollout = collector.sampler.sample(prompts.input_ids, greedy)
        output = policy(rollout.input_ids, rollout.attention_mask, rollout.response_mask, is_argmax=True)
    fraction = float(output.is_argmax[rollout.response_mask].float().mean())
    return Check(
        "sampling and scoring use the same model",
        fraction >= 0.98,
        f"{fraction:.1%} of greedy tokens are the most likely ones",
        "98%, because of ties",
        "Sampling with the model's cache gives different logits from evaluating the whole sequence. Padding leaks into "
        "the cache, or positions are wrong.",
    )


def _chunks(minibatch: Minibatch) -> list[Any]:
    """Split a minibatch into at most 4 minibatches, shortest responses first."""
    order = minibatch.response_mask.sum(dim=1).argsort(stable=True).tolist()
    size = -(-len(order) // 4)
    return [minibatch.select(order[start : start + size]) for start in range(0, len(order), size)]
