"""Base models and what is put on top of them."""

from rlhf.models.backbone import Policy, TokenScores, hidden_states, kl_divergence
from rlhf.models.frozen import Frozen, switch_off_dropout
from rlhf.models.scalar import EnsembleModel, ScalarHead, ScalarModel, pessimistic_score
from rlhf.models.sources import Mamba, ModelSource, Pretrained, Transformer
from rlhf.models.tokenizer import chat_template, train_tokenizer

__all__ = [
    "EnsembleModel",
    "Frozen",
    "Mamba",
    "ModelSource",
    "Policy",
    "Pretrained",
    "ScalarHead",
    "ScalarModel",
    "TokenScores",
    "Transformer",
    "chat_template",
    "hidden_states",
    "kl_divergence",
    "pessimistic_score",
    "switch_off_dropout",
    "train_tokenizer",
]
