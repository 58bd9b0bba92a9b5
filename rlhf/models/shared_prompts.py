"""Preference pairs whose prompt is computed once: one row with the prompt and both responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.packed_rows import Sizes, has_full_attention
from rlhf.models.probes import FAILURES, are_close, once_per_model, probing

MIN_SAVING = 0.04  # fraction of the tokens of a batch below which computing the prompts once gains nothing
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

    @property
    def sizes(self) -> list[Sizes]:
        """The sizes of each row."""
        return list(zip(*(x.tolist() for x in (self.prompts, self.first, self.second)), strict=True))

    def hidden_states(self, trunk: Any, input_ids: Tensor, pairs: Tensor, width: int) -> Tensor:
        """Compute the last hidden states of some pairs with a mask: [pairs, width, width of a state].

        Args:
            trunk: A causal model without its output layer.
            input_ids: [2 * all pairs, time] token ids, padded on the right: the first sequences, then the second ones.
            pairs: [pairs] the pairs to compute, on the CPU.
            width: Number of tokens of the longest row among them.
        """
        tokens, positions = self.tokens(input_ids, pairs, width)
        prompts, first = (x[pairs, None].to(input_ids.device) for x in (self.prompts, self.first))
        token = torch.arange(width, device=input_ids.device)
        is_second = token >= prompts + first
        in_first = (token >= prompts) & ~is_second
        visible = (token <= token[:, None]) & ~(is_second[:, :, None] & in_first[:, None, :])
        states: Tensor = trunk(
            input_ids=tokens, position_ids=positions, attention_mask=visible[:, None], use_cache=False
        ).last_hidden_state
        return states

    def tokens(self, input_ids: Tensor, pairs: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the token ids of some pairs and their positions, [pairs, width] each. Arguments as above."""
        device = input_ids.device
        prompts, first, pairs = (x.to(device) for x in (self.prompts[pairs, None], self.first[pairs, None], pairs))
        token = torch.arange(width, device=device)
        is_second = token >= prompts + first
        position = torch.where(is_second, token - first, token).clamp(max=input_ids.shape[1] - 1)
        return input_ids[torch.where(is_second, pairs[:, None] + len(self.prompts), pairs[:, None]), position], position

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

    The first call for a model makes three short forward passes. Stages make it when they open the model, before it is
    on a device.

    Models with a recurrent state, with a sliding window and with another attention implementation than SDPA do not.
    """
    return has_full_attention(trunk) and _probe(trunk)


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
            found = layout.hidden_states(trunk, batch, torch.zeros(1, dtype=torch.long), sum(_PROBE))[0]
            expected = [trunk(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in sequences]
    except FAILURES:
        return False
    columns = layout.columns(batch.shape[1]).to(device)
    positions = torch.cat([columns[i, : len(row)] for i, row in enumerate(expected)])
    return are_close(found[positions], torch.cat(expected))
