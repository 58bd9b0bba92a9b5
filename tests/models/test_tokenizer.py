"""A tokenizer to which no text is unknown, and templates that say what the user typed."""

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.models import chat_template, train_tokenizer

USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two spaces,\ttabs\r\nand line feeds\n\n",
        "straße, naïve, Ελλάδα",
        "東京へ行きます",
        "👩‍👩‍👧 🇩🇪",
        "\x00\x07 control",
        "e\u0301 is not é",
        "\u200bzero width\ufeff",
        "{{ jinja }} {% raw %} {prompt}",
        "",
    ],
)
def test_any_text_comes_back_byte_for_byte(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Byte-level BPE has all 256 bytes: no unknown token, nothing normalised, no space added or cleaned up."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == text


def test_the_tokenizer_adds_nothing_by_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    """BOS and EOS come from the template alone: a tokenizer that adds them too would double them."""
    assert tokenizer("Hi")["input_ids"] == tokenizer("Hi", add_special_tokens=False)["input_ids"]


def test_pad_bos_and_eos_are_three_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """With pad = eos the end of an answer could be mistaken for padding."""
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_vocabulary_is_as_large_as_asked_and_merges_are_learned() -> None:
    """259 = 256 bytes + 3 has no merge; the 260th token is the commonest pair of 'ababab', which is 'ab'."""
    assert len(train_tokenizer(["ababab"], 259)) == 259
    larger = train_tokenizer(["ababab"], 260)
    assert len(larger) == 260
    assert larger.convert_ids_to_tokens(larger("ababab")["input_ids"]) == ["ab", "ab", "ab"]


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.vocab_size=258.*\n.*model.vocab_size=259"):
        train_tokenizer(["ab"], 258)


def test_the_template_writes_one_bos_and_an_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """<bos> prompt, template, space, answer, <eos>; without the answer it stops where the answer would begin."""
    answer = {"role": "assistant", "content": "Hello"}
    tokenizer.chat_template = chat_template("Q: {prompt}\nA:")
    assert tokenizer.apply_chat_template([USER], tokenize=False) == "<bos>Q: Hi\nA:"
    assert tokenizer.apply_chat_template([USER, answer], tokenize=False) == "<bos>Q: Hi\nA: Hello<eos>"
    tokens = tokenizer.apply_chat_template([USER, answer])["input_ids"]
    assert (tokens.count(tokenizer.bos_token_id), tokens[0]) == (1, tokenizer.bos_token_id)
    assert (tokens.count(tokenizer.eos_token_id), tokens[-1]) == (1, tokenizer.eos_token_id)


def test_a_conversation_has_one_bos_and_one_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Earlier answers end in a blank line, so that EOS always means: the conversation is over."""
    tokenizer.chat_template = chat_template("Q: {prompt}\nA:")
    talk = [
        {"role": "system", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": "Hello"},
        USER,
        {"role": "assistant", "content": "Again"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text == "<bos>Be kind.\n\nQ: Hi\nA: Hello\n\nQ: Hi\nA: Again<eos>"


def test_a_tokenizer_without_bos_gets_none(tokenizer: PreTrainedTokenizerFast) -> None:
    """Qwen and others have no BOS: the template then begins with the prompt."""
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    plain.chat_template = chat_template("{prompt}?")
    assert plain.apply_chat_template([USER], tokenize=False) == "Hi?"


@pytest.mark.parametrize(
    "around",
    [
        "plain ",
        'it\'s "quoted" ',
        "line\nfeed\n\n",
        "back\\slash \\n \\",
        "{braces} {{x}} {% if %} {# no #} }} ",
        "ends in quote'",
        "tab\t",
        "ümlaut 東 ",
        "'+'",
        "",
    ],
)
def test_a_template_is_taken_letter_by_letter(tokenizer: PreTrainedTokenizerFast, around: str) -> None:
    """Quotes, line feeds, backslashes and Jinja's own signs stand in the text as typed, before and after the prompt."""
    tokenizer.chat_template = chat_template(around + "{prompt}" + around)
    assert tokenizer.apply_chat_template([USER], tokenize=False) == f"<bos>{around}Hi{around}"


@pytest.mark.parametrize("content", ["{{ bos_token }}", "{% for %}", "'", "{prompt}", "\\n"])
def test_what_users_write_is_no_template(tokenizer: PreTrainedTokenizerFast, content: str) -> None:
    """Jinja in a prompt is text."""
    tokenizer.chat_template = chat_template("{prompt}.")
    assert tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False) == f"<bos>{content}."


@pytest.mark.parametrize("template", ["", "Summary:", "{document}\nSummary:", "{ prompt }"])
def test_a_template_without_a_place_for_the_prompt_is_refused(template: str) -> None:
    with pytest.raises(UserError, match=r"data\.template=.*no place for the prompt\n.*\{prompt\}"):
        chat_template(template)
