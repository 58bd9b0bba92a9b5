"""Which models are decoded without the modules of transformers."""

from transformers import PreTrainedModel

from rlhf.models import is_sharded
from rlhf.sampling.lean import AttentionBatch, LeanBatch
from rlhf.sampling.lean_layers import has_attention_decoder
from rlhf.sampling.lean_mamba import MambaBatch, has_mamba_decoder
from rlhf.speed import speed_settings


def lean_decoder(lm: PreTrainedModel) -> type[LeanBatch] | None:
    """Return the class that decodes a model; None if there is none, or if ``speed.lean_decoding`` is off."""
    if not speed_settings().lean_decoding or is_sharded(lm):
        return None
    if has_attention_decoder(lm):
        return AttentionBatch
    return MambaBatch if has_mamba_decoder(lm) else None
