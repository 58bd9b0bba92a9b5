"""Preference pairs whose prompt is computed once: where this saves time, and which models allow it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf.models.optimizations.layouts import SharedPrompts, Sizes
from rlhf.models.probes import FAILURES, are_close, has_full_sdpa, once_per_architecture, probing

MIN_SAVING = 0.04  # fraction of the tokens of a batch below which computing the prompts once gains nothing
_PROBE: Sizes = (3, 2, 3)


def shared_prompts(trunk: nn.Module, lengths: Sequence[int], shared_tokens: Sequence[int]) -> SharedPrompts | None:
    """Return the layout of a batch of pairs; None if the architecture does not allow it, or if it saves too little.

    Args:
        trunk: A causal model without its output layer.
        lengths: Number of tokens of each sequence: those of the first ones, then those of the second ones.
        shared_tokens: Number of leading tokens that both sequences of a pair have in common, for each sequence.
    """
    pairs = len(lengths) // 2
    prompts = shared_tokens[:pairs]
    if sum(prompts) < MIN_SAVING * sum(lengths) or not allows_shared_prompts(trunk):
        return None
    ends = zip(prompts, lengths[:pairs], lengths[pairs:], strict=True)
    return SharedPrompts([(prompt, first - prompt, second - prompt) for prompt, first, second in ends])


@once_per_architecture
def allows_shared_prompts(trunk: Any) -> bool:
    """Return whether a model computes both sequences of a row as if each were alone.

    The first call for an architecture makes three short forward passes. Stages make it when they open the model, before
    it is on a device.

    Models with a recurrent state, a sliding window or an attention implementation other than SDPA do not.
    """
    return has_full_sdpa(trunk.config) and _probe(trunk)


def _probe(trunk: Any) -> bool:
    """Compare the hidden states of a short pair with those of its two sequences."""
    prompt, first, second = _PROBE
    device = trunk.device
    tokens = torch.arange(1, 1 + prompt + first + second, device=device) % trunk.config.get_text_config().vocab_size
    sequences = [tokens[: prompt + first], torch.cat([tokens[:prompt], tokens[prompt + first :]])]
    batch = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    layout = SharedPrompts([_PROBE])
    try:
        with probing(trunk):
            found = layout.padded_hidden_states(trunk, batch, torch.zeros(1, dtype=torch.long), sum(_PROBE))[0]
            expected = [trunk(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in sequences]
    except FAILURES:
        return False
    columns = layout.columns(batch.shape[1]).to(device)
    positions = torch.cat([columns[i, : len(row)] for i, row in enumerate(expected)])
    return are_close(found[positions], torch.cat(expected))
