"""Byte-level tokenizers and chat templates."""

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data import Encoder
from rlhf.data.parser import RecordParser
from rlhf.data.records import Prompt
from rlhf.errors import ConfigError, DataError
from rlhf.models import chat_template, train_tokenizer
from rlhf.tokenizer import probe
from rlhf.tokenizer.files import pack_tokenizer, unpack_tokenizer
from rlhf.tokenizer.probe import check_template

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
def test_decoding_restores_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Byte-level BPE has all 256 bytes: no unknown token, no normalization, no added or removed spaces."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == text


def test_the_tokenizer_adds_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """BOS and EOS come from the chat template. A tokenizer that added them as well would double them."""
    assert tokenizer("Hi")["input_ids"] == tokenizer("Hi", add_special_tokens=False)["input_ids"]


def test_padding_bos_and_eos_are_different_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """If padding were EOS, the end of a response could be mistaken for padding."""
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_vocabulary_has_the_requested_size() -> None:
    """259 tokens are 256 bytes and 3 special tokens. The 260th is the most frequent pair of 'ababab', 'ab'."""
    assert len(train_tokenizer(["ababab"], 259)) == 259
    larger = train_tokenizer(["ababab"], 260)
    assert len(larger) == 260
    assert larger.convert_ids_to_tokens(larger("ababab")["input_ids"]) == ["ab", "ab", "ab"]


def test_a_vocabulary_that_is_too_small_for_all_bytes_is_rejected() -> None:
    with pytest.raises(
        ConfigError, match=r"^vocab_size must be at least 259 .*, got 258\.\n  Set model\.vocab_size=259\."
    ):
        train_tokenizer(["ab"], 258)


def test_the_template_writes_one_bos_and_an_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """<bos>, prompt, template, space, response, <eos>. Without a response, it ends where the response would begin."""
    response = {"role": "assistant", "content": "Hello"}
    tokenizer.chat_template = chat_template("Q: {prompt}\nA:")
    assert tokenizer.apply_chat_template([USER], tokenize=False) == "<bos>Q: Hi\nA:"
    assert tokenizer.apply_chat_template([USER, response], tokenize=False) == "<bos>Q: Hi\nA: Hello<eos>"
    tokens = tokenizer.apply_chat_template([USER, response])["input_ids"]
    assert (tokens.count(tokenizer.bos_token_id), tokens[0]) == (1, tokenizer.bos_token_id)
    assert (tokens.count(tokenizer.eos_token_id), tokens[-1]) == (1, tokenizer.eos_token_id)


def test_a_conversation_has_one_bos_and_one_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Earlier responses end with a blank line, so that EOS always ends the conversation."""
    tokenizer.chat_template = chat_template("Q: {prompt}\nA:")
    conversation = [
        {"role": "system", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": "Hello"},
        USER,
        {"role": "assistant", "content": "Again"},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == "<bos>Be kind.\n\nQ: Hi\nA: Hello\n\nQ: Hi\nA: Again<eos>"


def test_the_template_writes_no_bos_for_a_tokenizer_without_one(tokenizer: PreTrainedTokenizerFast) -> None:
    """Qwen, for example, has no BOS. The template then begins with the prompt."""
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
        "carriage return\r\n\r",
        "ümlaut 東 ",
        "'+'",
        "",
    ],
)
def test_a_template_is_rendered_literally(tokenizer: PreTrainedTokenizerFast, around: str) -> None:
    """Quotes, line breaks, backslashes and Jinja syntax are plain text, before and after the prompt."""
    tokenizer.chat_template = chat_template(around + "{prompt}" + around)
    assert tokenizer.apply_chat_template([USER], tokenize=False) == f"<bos>{around}Hi{around}"


@pytest.mark.parametrize("content", ["{{ bos_token }}", "{% for %}", "'", "{prompt}", "\\n"])
def test_jinja_syntax_in_a_prompt_is_not_evaluated(tokenizer: PreTrainedTokenizerFast, content: str) -> None:
    tokenizer.chat_template = chat_template("{prompt}.")
    assert tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False) == f"<bos>{content}."


@pytest.mark.parametrize("template", ["", "Summary:", "{document}\nSummary:", "{ prompt }", "{prompt} {prompt}"])
def test_a_template_without_exactly_one_prompt_is_rejected(template: str) -> None:
    with pytest.raises(ConfigError, match=r"^template must contain \{prompt\} once, got .*\n.*data\.template="):
        chat_template(template)


@pytest.mark.parametrize("role", ["tool", "User"])
def test_a_plain_template_has_three_roles(tokenizer: PreTrainedTokenizerFast, role: str) -> None:
    """Another role would be written as a response, and a prompt that ends with it would end with EOS."""
    tokenizer.chat_template = chat_template("Q: {prompt}\nA:")
    with pytest.raises(ConfigError) as error:
        Encoder(tokenizer, 100).encode_prompt([USER, {"role": role, "content": "5"}])
    assert str(error.value).splitlines() == [
        f"The tokenizer's chat template does not support a conversation with the roles ['user', '{role}'] (the roles "
        "of data.template are system, user and assistant).",
        "  Rename the other roles in the data, or remove their messages.",
    ]


def test_a_chat_template_gets_the_roles_of_tools(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    row = {"messages": [USER, *({"role": role, "content": "5"} for role in ("tool", "ipython"))]}
    ids = Encoder(tokenizer, 100).encode_prompt(RecordParser().parse(row, Prompt).messages)
    assert tokenizer.decode(ids) == "<user>Hi<tool>5<ipython>5"


def test_the_default_one_of_several_templates_is_stored(tokenizer: PreTrainedTokenizerFast) -> None:
    """``save_pretrained`` writes the others, such as that for tools, to a directory. They are not used."""
    tokenizer.chat_template = {"default": chat_template("{prompt}?"), "tool_use": chat_template("{prompt}!")}
    opened = unpack_tokenizer(pack_tokenizer(tokenizer), "sft_final.pt")
    assert opened.apply_chat_template([USER], tokenize=False) == "<bos>Hi?"


def test_several_templates_without_a_default_are_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = {"rag": chat_template("{prompt}?"), "tool_use": chat_template("{prompt}!")}
    with pytest.raises(DataError, match=r"is named default, got rag, tool_use\.\n  Use another .*: data\.template="):
        check_template(tokenizer)


@pytest.mark.parametrize(
    ("most", "expected"),
    [("unlimited", [8 << 30, 20]), (15, [15, 15]), (1 << 40, [8 << 30, 20])],
    ids=["no limit", "lower", "higher"],
)
def test_the_limits_of_the_separate_process_are_at_most_those_of_the_user(
    monkeypatch: pytest.MonkeyPatch, most: int | str, expected: list[int]
) -> None:
    """With a lower limit of ``ulimit -v``, for example. A process cannot raise it: trying to is an error."""
    resource = pytest.importorskip("resource")
    hard = resource.RLIM_INFINITY if most == "unlimited" else most
    limits: list[int] = []

    def set_limit(kind: int, pair: tuple[int, int]) -> None:
        assert hard == resource.RLIM_INFINITY or pair[1] <= hard
        assert pair[0] == pair[1]
        limits.append(pair[1])

    monkeypatch.setattr(resource, "getrlimit", lambda _: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    probe._limit_resources(20)
    assert limits == expected


def test_a_system_without_a_limit_of_memory_limits_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS rejects every limit of the address space (https://github.com/python/cpython/issues/78783)."""
    resource = pytest.importorskip("resource")
    limits: list[int] = []

    def set_limit(kind: int, pair: tuple[int, int]) -> None:
        if kind == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(pair[1])

    monkeypatch.setattr(resource, "setrlimit", set_limit)
    probe._limit_resources(20)
    assert limits == [20]
