"""Implicit rewards and KL of sampled responses, for tables of samples."""

from typing import Any

from torch import Tensor

from rlhf.data import SequenceBatch
from rlhf.models import kl_divergence
from rlhf.sampling import Rollout


def rewards_and_kl(module: Any, rollout: Rollout) -> dict[str, Tensor]:
    """Compute the columns of a table of samples that depend on the reference model.

    Args:
        module: A ``PreferenceModule``.
        rollout: Responses of its policy.

    Returns:
        The implicit reward of each response, in reward units, and with a reference model also the sum over the response
        of the KL divergence of the policy from the reference model, in nats: [responses] each, by name.
    """
    sequences = SequenceBatch(rollout.input_ids, rollout.attention_mask, rollout.response_mask).to(module.device)
    output = module.policy(**sequences.inputs)
    logprobs = output.logprobs.sum(dim=1)
    if module.reference_free:
        return {"reward": module.beta * module.response_scores(logprobs, None, sequences)}
    with module.opened_reference() as reference:
        ref_output = reference(**sequences.inputs)
        kl = kl_divergence(module.policy, output.states, reference.model, ref_output.states, sequences.response_mask)
    scores = module.response_scores(logprobs, ref_output.logprobs.sum(dim=1), sequences)
    return {"reward": module.beta * scores, "KL in nats": kl.sum(dim=1)}
