"""Check that the model has a position for every token of the data."""

from typing import Any

from torch import nn

from rlhf.data import RecordDataModule
from rlhf.errors import ConfigError


def check_positions(module: nn.Module, datamodule: Any) -> None:
    """Reject data with longer sequences than a model of the stage has learned position embeddings for.

    Other models, such as those with rotary embeddings, have no such limit.

    Raises:
        ConfigError: The first long sequence would be an index error during training.
    """
    limits = [limit for part in module.modules() if (limit := _positions(part)) is not None]
    if not limits or not isinstance(datamodule, RecordDataModule):
        return
    splits = ("train", "val") if datamodule.paths["train"] else ("val",)
    longest = max(int(datamodule.encoded(split).lengths.max(initial=0)) for split in splits)
    if longest > min(limits):
        raise ConfigError(
            f"data.max_length={datamodule.max_length} allows sequences of {longest} tokens, but the model has position "
            f"embeddings for {min(limits)}.",
            f"Set data.max_length={min(limits)}",
        )


def _positions(part: nn.Module) -> int | None:
    """Return the number of learned positions of a model's trunk; None if it has none."""
    learned = any(isinstance(child, nn.Embedding) and name in _LEARNED for name, child in part.named_children())
    config: Any = getattr(part, "config", None)
    return getattr(config, "max_position_embeddings", None) if learned else None


_LEARNED = {"wpe", "embed_positions", "position_embedding", "position_embeddings"}
