"""Models whose responses would depend on padding before the prompt."""

from collections.abc import Sequence

from torch import nn


def padding_reaches_state(lm: nn.Module) -> bool:
    """Return whether a recurrent layer of a model would read padding before the prompt.

    transformers sets the input of the first projection to zero there. If the projection has a bias, its output is not
    zero, and the convolution after it mixes padding with the first tokens of the prompt.
    """
    return any(
        getattr(getattr(part, "in_proj", None), "bias", None) is not None
        and any(isinstance(child, nn.Conv1d) for child in part.children())
        for part in lm.modules()
    )


def groups_of_equal_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of the prompts of each length, beginning with the longest prompts."""
    lengths = [len(prompt) for prompt in prompts]
    return [[i for i, other in enumerate(lengths) if other == length] for length in sorted(set(lengths), reverse=True)]
