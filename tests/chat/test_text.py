"""Text while tokens arrive: characters that consist of several tokens are held back until they are complete."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.chat.text import INCOMPLETE, TokenText

# One byte per character, two, three and four; the tokenizer has merged none of the longer ones.
TEXTS = ("The mayor opened", "Grüße, é", "漢字 and 日本", "a 😀😀 b", "\U0001f468‍\U0001f469‍\U0001f467")


@pytest.mark.parametrize("text", TEXTS)
def test_every_step_shows_a_beginning_of_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    shown = TokenText(tokenizer)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        shown.append(token)
        assert text.startswith(shown.text)
        assert INCOMPLETE not in shown.text
    assert shown.text == shown.final() == text


def test_an_incomplete_character_is_held_back(tokenizer: PreTrainedTokenizerFast) -> None:
    """U+1F600 has four bytes, and each is a token: F0 9F 98 80."""
    tokens = tokenizer("x😀", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 5
    shown, steps = TokenText(tokenizer), []
    for token in tokens:
        shown.append(token)
        steps.append(shown.text)
    assert steps == ["x", "x", "x", "x", "x😀"]


def test_special_tokens_and_outer_whitespace_are_not_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    shown = TokenText(tokenizer)
    for token in tokenizer(" It costs ", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]:
        shown.append(token)
    assert shown.text == shown.final() == "It costs"


def test_the_final_text_of_any_tokens_is_that_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Random tokens, most of which are not complete characters."""
    tokens = random.Random(0).choices(range(len(tokenizer)), k=200)
    shown = TokenText(tokenizer)
    for token in tokens:
        shown.append(token)
    assert shown.final() == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert shown.final().startswith(shown.text)
