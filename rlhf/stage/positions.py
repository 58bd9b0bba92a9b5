"""Check that the model has a position for every token of the data."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from rlhf.data import RecordDataModule
from rlhf.errors import ConfigError
from rlhf.models.probes import rope_parameters

# Names of layers that add an embedding of each position.
_LEARNED = {"wpe", "embed_positions", "position_embedding", "position_embeddings"}


def check_positions(module: nn.Module, datamodule: Any) -> None:
    """Reject data with longer sequences than a model of the stage has positions for.

    Learned position embeddings have such a limit, and so do rotary embeddings of the type ``dynamic``: above it,
    transformers chooses their frequencies by the longest sequence of this batch and of earlier ones. Other models have
    no limit.

    Raises:
        ConfigError: A sequence is too long.
    """
    limits = [limit for part in module.modules() if (limit := _positions(part)) is not None]
    if not limits or not isinstance(datamodule, RecordDataModule):
        return
    splits = ("train", "val") if datamodule.paths["train"] else ("val",)
    longest = max(int(datamodule.encoded(split).lengths.max(initial=0)) for split in splits)
    if longest > min(limits):
        raise ConfigError(
            f"data.max_length={datamodule.max_length} allows sequences of {longest} tokens, but the model has "
            f"{min(limits)} positions.",
            f"Set data.max_length={min(limits)}",
        )


def _positions(part: nn.Module) -> int | None:
    """Return the number of positions of a model's trunk; None if it has no limit."""
    config: Any = getattr(part, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    learned = any(isinstance(child, nn.Embedding) and name in _LEARNED for name, child in part.named_children())
    dynamic = any(one["rope_type"] == "dynamic" for one in rope_parameters(config))
    return getattr(config, "max_position_embeddings", None) if learned or dynamic else None
