"""Preference pairs whose prompt is computed once: one row with the prompt and both responses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.pair_attention import pair_attention
from rlhf.models.probes import FAILURES, are_close, once_per_model, probing

MIN_SAVING = 0.04  # fraction of the tokens of a batch below which computing the prompts once gains nothing
# Tokens of a row up to which attention uses a mask, which needs fewer operations than two calls per row.
SPLIT_WIDTH = 256
_PROBE = (3, 2, 3)  # tokens of the prompt and of the two responses


@dataclass(frozen=True)
class SharedPrompts:
    """The layout of a batch of pairs in which a row is a prompt followed by the rests of both sequences.

    A token of the second sequence sees the prompt and its own sequence only, and its position continues from the end
    of the prompt.

    Args:
        prompts: [pairs] number of tokens that are computed once. All three tensors are on the CPU.
        first: [pairs] number of further tokens of the first sequence.
        second: [pairs] number of further tokens of the second sequence.
    """

    prompts: Tensor
    first: Tensor
    second: Tensor

    @property
    def lengths(self) -> Tensor:
        """[pairs] number of tokens of each row."""
        return self.prompts + self.first + self.second

    def hidden_states(self, trunk: Any, input_ids: Tensor, pairs: Tensor, width: int) -> Tensor:
        """Compute the last hidden states of some pairs: [pairs, width, width of a state].

        Args:
            trunk: A causal model without its output layer.
            input_ids: [2 * all pairs, time] token ids, padded on the right: the first sequences, then the second ones.
            pairs: [pairs] the pairs to compute, on the CPU.
            width: Number of tokens of the longest row among them.
        """
        attention: AbstractContextManager[None] = nullcontext()
        # Gradient checkpointing recomputes layers outside of the context.
        if width > SPLIT_WIDTH and not any(getattr(part, "gradient_checkpointing", False) for part in trunk.modules()):
            sizes = zip(*(x[pairs].tolist() for x in (self.prompts, self.first, self.second)), strict=True)
            attention = pair_attention(trunk, list(sizes))
        with attention:
            states: Tensor = trunk(**self.inputs(input_ids, pairs, width), use_cache=False).last_hidden_state
        return states

    def inputs(self, input_ids: Tensor, pairs: Tensor, width: int) -> dict[str, Tensor]:
        """Return the arguments of the trunk for some pairs."""
        device = input_ids.device
        prompts, first, pairs = (x.to(device) for x in (self.prompts[pairs, None], self.first[pairs, None], pairs))
        token = torch.arange(width, device=device)
        is_second = token >= prompts + first
        position = torch.where(is_second, token - first, token).clamp(max=input_ids.shape[1] - 1)
        row = torch.where(is_second, pairs[:, None] + len(self.prompts), pairs[:, None])
        in_first = (token >= prompts) & ~is_second
        visible = (token <= token[:, None]) & ~(is_second[:, :, None] & in_first[:, None, :])
        return {"input_ids": input_ids[row, position], "position_ids": position, "attention_mask": visible[:, None]}

    def columns(self, time: int) -> Tensor:
        """Return where the token of each row and position of the batch is in the row of its pair.

        Args:
            time: Width of the batch.

        Returns:
            [2 * pairs, time] positions; undefined at padding.
        """
        token = torch.arange(time).expand(len(self.prompts), -1)
        shifted = torch.where(token < self.prompts[:, None], token, token + self.first[:, None])
        return torch.cat([token, shifted])


def shared_prompts(trunk: nn.Module, lengths: Sequence[int], shared_tokens: Sequence[int]) -> SharedPrompts | None:
    """Return the layout of a batch of pairs; None if the architecture does not allow it, or if it saves too little.

    Args:
        trunk: A causal model without its output layer.
        lengths: Number of tokens of each sequence: those of the first ones, then those of the second ones.
        shared_tokens: Number of leading tokens that both sequences of a pair have in common, for each sequence.
    """
    pairs = len(lengths) // 2
    shared = shared_tokens[:pairs]
    if sum(shared) < MIN_SAVING * sum(lengths) or not allows_shared_prompts(trunk):
        return None
    prompts = torch.tensor(shared)
    first, second = torch.tensor(lengths).view(2, pairs) - prompts
    return SharedPrompts(prompts, first, second)


@once_per_model
def allows_shared_prompts(trunk: Any) -> bool:
    """Return whether a model computes both sequences of a row as if each was alone.

    The first call for a model makes four short forward passes. Stages make it when they open the model, before it is
    on a device.

    Models with a recurrent state, with a sliding window and with another attention implementation than SDPA do not.
    """
    return _has_full_attention(trunk) and _probe(trunk)


def _has_full_attention(trunk: Any) -> bool:
    """Return whether every layer attends to all earlier tokens, which a short probe would not find out."""
    config = trunk.config.get_text_config()
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ()
    return config._attn_implementation == "sdpa" and not window and set(kinds) <= {"full_attention"}


def _probe(trunk: Any) -> bool:
    """Compare the hidden states of a short pair with those of its two sequences."""
    prompt, first, second = _PROBE
    device = trunk.device
    tokens = torch.arange(1, 1 + prompt + first + second, device=device) % trunk.config.get_text_config().vocab_size
    sequences = [tokens[: prompt + first], torch.cat([tokens[:prompt], tokens[prompt + first :]])]
    batch = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    layout = SharedPrompts(*torch.tensor(_PROBE).view(3, 1))
    try:
        with probing(trunk):
            inputs = layout.inputs(batch, torch.zeros(1, dtype=torch.long), sum(_PROBE))
            found = trunk(**inputs, use_cache=False).last_hidden_state[0]
            with pair_attention(trunk, [_PROBE]):
                split = trunk(**inputs, use_cache=False).last_hidden_state[0]
            expected = [trunk(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in sequences]
    except FAILURES:
        return False
    columns = layout.columns(batch.shape[1]).to(device)
    positions = torch.cat([columns[i, : len(row)] for i, row in enumerate(expected)])
    return all(are_close(states[positions], torch.cat(expected)) for states in (found, split))
