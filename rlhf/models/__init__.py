"""Language models, scalar heads and tokenizers, and the sources that they come from."""

from rlhf.models.backbone import Policy, PolicyOutput, hidden_states, kl_divergence
from rlhf.models.frozen import Frozen, disable_dropout
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
    "hidden_states",
    "kl_divergence",
    "train_tokenizer",
]
