"""Language models, scalar heads and tokenizers, and the sources that they come from."""

from rlhf.models.adapter_sources import SharedBase, WithAdapter, starting_point
from rlhf.models.adapters import Adapter, BaseModel, LoRA, adapter_of, base_weights
from rlhf.models.backbone import Policy, PolicyOutput, kl_divergence
from rlhf.models.checkpointing import enable_gradient_checkpointing
from rlhf.models.descriptions import trunk_on_meta, trunk_without_weights
from rlhf.models.frozen import Frozen, all_named_modules, cast_frozen_matrices, disable_dropout, frozen_in_float32
from rlhf.models.logits import cache_name, state_width
from rlhf.models.optimizations.scan import limit_scan_chunks
from rlhf.models.optimizations.shared_prompts import allows_shared_prompts
from rlhf.models.reference import open_reference
from rlhf.models.scalar import RewardModelEnsemble, ScalarHead, ScalarModel
from rlhf.models.sharding import common_count, full_state_dict, full_tensor, gathered, is_sharded, local_tensor, shard
from rlhf.models.sources import Mamba, ModelSource, Pretrained, Transformer, as_sequence
from rlhf.models.token_statistics import EntropyMode
from rlhf.models.trunk import hidden_states
from rlhf.models.weights import check_complete, stored_weights
from rlhf.tokenizer.templates import chat_template
from rlhf.tokenizer.training import train_tokenizer

__all__ = [
    "Adapter",
    "BaseModel",
    "EntropyMode",
    "Frozen",
    "LoRA",
    "Mamba",
    "ModelSource",
    "Policy",
    "PolicyOutput",
    "Pretrained",
    "RewardModelEnsemble",
    "ScalarHead",
    "ScalarModel",
    "SharedBase",
    "Transformer",
    "WithAdapter",
    "adapter_of",
    "all_named_modules",
    "allows_shared_prompts",
    "as_sequence",
    "base_weights",
    "cache_name",
    "cast_frozen_matrices",
    "chat_template",
    "check_complete",
    "common_count",
    "disable_dropout",
    "enable_gradient_checkpointing",
    "frozen_in_float32",
    "full_state_dict",
    "full_tensor",
    "gathered",
    "hidden_states",
    "is_sharded",
    "kl_divergence",
    "limit_scan_chunks",
    "local_tensor",
    "open_reference",
    "shard",
    "starting_point",
    "state_width",
    "stored_weights",
    "train_tokenizer",
    "trunk_on_meta",
    "trunk_without_weights",
]
