"""The reference model of a policy."""

from transformers import PreTrainedTokenizerBase

from rlhf.models.adapter_sources import starting_point
from rlhf.models.backbone import Policy
from rlhf.models.frozen import disable_dropout
from rlhf.models.sources import ModelSource


def open_reference(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Open the model that a policy starts from, without dropout, as its reference model.

    It is opened from the same source, not copied, so that a resumed run has the same reference model. Where only an
    adapter is trained, the reference model shares the weights of the base model with the policy.

    Args:
        source: Source of the policy.
        tokenizer: Tokenizer of the policy.
    """
    return Policy(disable_dropout(starting_point(source).language_model(tokenizer)))
