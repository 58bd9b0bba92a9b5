"""Base models and what is put on top of them."""

from rlhf.models.backbone import Policy, PolicyOutput, hidden_states, kl_divergence
from rlhf.models.frozen import Frozen, disable_dropout
from rlhf.models.scalar import RewardModelEnsemble, ScalarHead, ScalarModel, pessimistic_score
from rlhf.models.sources import Mamba, ModelSource, Pretrained, Transformer
from rlhf.models.tokenizer import chat_template, train_tokenizer

__all__ = [
    "RewardModelEnsemble",
    "Frozen",
    "Mamba",
    "ModelSource",
    "Policy",
    "PolicyOutput",
    "Pretrained",
    "ScalarHead",
    "ScalarModel",
    "Transformer",
    "chat_template",
    "disable_dropout",
    "hidden_states",
    "kl_divergence",
    "pessimistic_score",
    "train_tokenizer",
]
