"""Checks that a tokenizer and a model, or two tokenizers, belong together."""

import logging
from functools import cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import DataError
from rlhf.process.time_limit import time_limit
from rlhf.tokenizer.probe import CONVERSATIONS, RENDER_SECONDS, check_template

log = logging.getLogger(__name__)
SHOWN_CHARACTERS = 60


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


def compare_tokenizers(own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Check that a reward model reads texts as the policy writes them.

    A warning reports chat templates that write a short conversation differently.

    Args:
        own: The tokenizer of the reward model.
        tokenizer: The tokenizer of the policy, with its chat template.
        origin: The path of the reward model, for messages.

    Raises:
        DataError: The vocabularies differ.
    """
    if (vocabulary := own.get_vocab()) != tokenizer.get_vocab():
        raise DataError(
            f"{origin}: the tokenizer of the reward model ({len(vocabulary)} tokens) differs from that of the policy "
            f"({len(tokenizer)} tokens), so token ids would be misinterpreted.",
            "Train the reward model from the same base model: stage.reward_model=<path>",
        )
    if own.chat_template == tokenizer.chat_template:
        return
    own_text, text = _rendered(own), _rendered(tokenizer)
    if own_text is None or text is None or own_text == text:
        return
    shortest = min(len(own_text), len(text))
    difference = next((i for i in range(shortest) if own_text[i] != text[i]), shortest)
    start = max(difference - SHOWN_CHARACTERS // 2, 0)
    shown = slice(start, start + SHOWN_CHARACTERS)
    _warn_of_template(origin, own_text[shown], text[shown])


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a short conversation in the chat template of a tokenizer; None if it has no template that can be used."""
    if not tokenizer.chat_template:
        return None
    try:
        check_template(tokenizer)
        with time_limit(RENDER_SECONDS, TimeoutError()):
            # Sequences end with EOS, without white space that the template writes after it.
            return str(tokenizer.apply_chat_template(CONVERSATIONS[2], tokenize=False)).rstrip()
    except Exception:  # Templates raise whatever their authors chose.
        return None


@cache
def _warn_of_template(origin: str, own_text: str, text: str) -> None:
    """Warn once per process."""
    log.warning(
        "The chat template of the reward model %s differs from that of the policy. It was trained on %r, but the "
        "policy writes %r. Train the reward model with the data.template of the policy, or choose another one: "
        "stage.reward_model=<path>",
        origin,
        own_text,
        text,
    )
