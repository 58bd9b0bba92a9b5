"""Responses of the policy to validation prompts, with their implicit rewards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.data import RecordDataModule, SequenceBatch
from rlhf.models import kl_divergence
from rlhf.stage.sample_table import sample_for_table


@torch.no_grad()
def sample_responses(module: Any, datamodule: RecordDataModule) -> tuple[Sequence[str], list[Sequence[str | float]]]:
    """Sample a response to each of the first validation prompts, greedily.

    Args:
        module: A ``PreferenceModule``.
        datamodule: Its data.

    Returns:
        The names of the columns, and a row per prompt: prompt, response, implicit reward in reward units and, with a
        reference model, the sum over the response of the KL divergence of the policy from the reference model, in nats.
    """
    prompts, rollout = sample_for_table(module, datamodule)
    with module.trainer.precision_plugin.forward_context():
        sequences = SequenceBatch(rollout.input_ids, rollout.attention_mask, rollout.response_mask).to(module.device)
        columns = _rewards_and_kl(module, sequences)
    texts = zip((prompt.raw_text for prompt in prompts), rollout.decode(module.tokenizer), strict=True)
    rows = zip(texts, *(values.tolist() for values in columns.values()), strict=True)
    return ("prompt", "response", *columns), [(*pair, *numbers) for pair, *numbers in rows]


def _rewards_and_kl(module: Any, sequences: SequenceBatch) -> dict[str, Tensor]:
    tensors = (sequences.input_ids, sequences.attention_mask, sequences.response_mask)
    output = module.policy(*tensors)
    logprobs = output.logprobs.sum(dim=1)
    if module.reference_free:
        return {"reward": module.beta * module.response_scores(logprobs, None, sequences)}
    with module.opened_reference() as reference:
        ref_output = reference(*tensors)
        kl = kl_divergence(module.policy, output.states, reference.model, ref_output.states, sequences.response_mask)
    scores = module.response_scores(logprobs, ref_output.logprobs.sum(dim=1), sequences)
    return {"reward": module.beta * scores, "KL in nats": kl.sum(dim=1)}
