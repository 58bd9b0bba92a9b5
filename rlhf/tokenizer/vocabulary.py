"""Checks that a tokenizer and a model, or two tokenizers, belong together."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import DataError


def check_embedding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, origin: str) -> None:
    """Raise a ``DataError`` if the tokenizer has ids that the model has no embedding for.

    Args:
        tokenizer: The tokenizer of the policy.
        model: A model that reads its token ids.
        origin: The path of the model, for the message.
    """
    embeddings: Any = model.get_input_embeddings()
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings.num_embeddings:
        raise DataError(
            f"{origin}: the tokenizer has token ids up to {largest}, but the model has {embeddings.num_embeddings} "
            "token embeddings.",
            f"Call model.resize_token_embeddings({largest + 1}), and save the model again.",
        )


def check_vocabulary(own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Raise a ``DataError`` if a reward model has another vocabulary than the policy.

    Args:
        own: The tokenizer of the reward model.
        tokenizer: The tokenizer of the policy.
        origin: The path of the reward model, for the message.
    """
    if (vocabulary := own.get_vocab()) != tokenizer.get_vocab():
        raise DataError(
            f"{origin}: the tokenizer of the reward model ({len(vocabulary)} tokens) differs from that of the policy "
            f"({len(tokenizer)} tokens), so token ids would be misinterpreted.",
            "Train the reward model from the same base model: stage.reward_model=<path>",
        )
