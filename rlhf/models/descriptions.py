"""Models without weights, which describe the models of sources before these are opened."""

from typing import Protocol, runtime_checkable

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from rlhf.models.opening import check_config, check_folder, count_weights, opening
from rlhf.models.sources import ModelSource, Pretrained


@runtime_checkable
class DescribedSource(Protocol):
    """A model source that knows the configuration of its model without reading the weights."""

    def trunk_without_weights(self) -> PreTrainedModel | None:
        """Return the model without its output layer, on the meta device; None if it is not known."""


def trunk_without_weights(source: ModelSource) -> PreTrainedModel | None:
    """Return the model of a source without its output layer, on the meta device.

    Args:
        source: A source of a language model or of a reward model.

    Returns:
        The model; None if the source does not describe it.
    """
    if isinstance(source, Pretrained):
        check_folder(source.path, "model")
        with opening(source.path, "model"):
            config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
            check_config(config, source.path, count_weights(source.path))
            return trunk_on_meta(config)
    return source.trunk_without_weights() if isinstance(source, DescribedSource) else None


def trunk_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without its output layer on the meta device, where weights take no memory."""
    with torch.device("meta"):
        trunk: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False)
    return trunk
