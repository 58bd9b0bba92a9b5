"""Language models, scalar heads and tokenizers, and the sources that they come from."""

from rlhf.models.backbone import Policy, PolicyOutput, hidden_states, kl_divergence
from rlhf.models.checkpointing import enable_gradient_checkpointing
from rlhf.models.frozen import Frozen, disable_dropout
from rlhf.models.reference import open_reference
from rlhf.models.scalar import RewardModelEnsemble, ScalarHead, ScalarModel
from rlhf.models.sources import Mamba, ModelSource, Pretrained, Transformer
from rlhf.models.tokenizer import chat_template, train_tokenizer

__all__ = [
    "Frozen",
    "Mamba",
    "ModelSource",
    "Policy",
    "PolicyOutput",
    "Pretrained",
    "RewardModelEnsemble",
    "ScalarHead",
    "ScalarModel",
    "Transformer",
    "chat_template",
    "disable_dropout",
    "enable_gradient_checkpointing",
    "hidden_states",
    "kl_divergence",
    "open_reference",
    "train_tokenizer",
]
