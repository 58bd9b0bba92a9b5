"""Prompt and response are encoded as one text, with one BOS and a final EOS; truncation keeps the response."""

import threading
from copy import deepcopy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.data import EncodedResponse, Encoder, replace_response
from rlhf.errors import ConfigError, DataError
from rlhf.models import chat_template, train_tokenizer

BOS, EOS = 1, 2


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("response", ["May.", "  two spaces", "\nnew line", "", "東京 👩‍👩‍👧", "ends in space "])
def test_prompt_and_response_are_encoded_as_one_text(tokenizer: PreTrainedTokenizerFast, response: str) -> None:
    """The token ids are those of the complete text, split at the boundary."""
    encoder = Encoder(tokenizer, 200)
    encoded = encoder.encode_response(user("When?"), response)
    assert encoded.input_ids == encode(tokenizer, f"<bos>When?\nSummary: {response}<eos>")
    assert tokenizer.decode(encoded.input_ids[: encoded.start]) == "<bos>When?\nSummary:"
    assert tokenizer.decode(encoded.input_ids[encoded.start :]) == f" {response}<eos>"


def test_a_token_that_spans_the_boundary_belongs_to_the_response() -> None:
    """The prompt ends with 'a', the response begins with 'b', and 'ab' is one token."""
    tokenizer = train_tokenizer(["ababab"], 260)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    encoded = Encoder(tokenizer, 50).encode_response(user("xa"), "b")
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["x", "ab", "<eos>"]
    assert encoded.start == 1


def test_training_and_sampling_use_the_same_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """The token ids before the response are the same in SFT and in sampling."""
    encoder = Encoder(tokenizer, 200)
    encoded = encoder.encode_response(user("When?"), "May")
    assert encoder.encode_prompt(user("When?")) == encoded.input_ids[: encoded.start]


THINKS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"


@pytest.mark.parametrize(
    ("opening", "responses", "missing", "text"),
    [
        ("<think>\n", ["May", "<think>\nIt is May.", "<b>May</b>", "June"], 3, "<think>\n"),
        ("<think>\n", ["<think> May"], 0, ""),  # The line feed is missing.
        (" \n", ["May"], 0, ""),
        ("", ["May"], 0, ""),
    ],
)
def test_texts_that_open_sampled_responses_only_are_counted(
    tokenizer: PreTrainedTokenizerFast, opening: str, responses: list[str], missing: int, text: str
) -> None:
    """The response begins before such a text in training, and after it in sampling."""
    tokenizer.chat_template = f"{THINKS}{opening}{{% endif %}}"
    encoder = Encoder(tokenizer, 200)
    encoder.encode_responses(user("When?"), responses)
    assert (encoder.openings.missing, encoder.openings.text) == (missing, text)


def test_changed_responses_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    """The template keeps what follows the reasoning, as that of DeepSeek-R1 does. White space does not count."""
    cut = "{{ m['content'].split('</think>')[-1].strip() }}"
    tokenizer.chat_template = (
        "{% for m in messages %}[" + cut + "]{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    encoder = Encoder(tokenizer, 200)
    encoder.encode_responses(user("When?"), ["<think>It is spring.</think>May", " May\n", "June"])
    assert (encoder.openings.changed, encoder.openings.missing) == (1, 2)


def test_a_long_opening_is_shown_in_part(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = f"{THINKS}{'x' * 70}{{% endif %}}"
    encoder = Encoder(tokenizer, 200)
    encoder.encode_response(user("When?"), "May")
    assert encoder.openings.shown == f"'{'x' * 60}...'"


def test_one_bos_and_one_eos_in_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    """The only BOS comes first. The only EOS comes last and is part of the response."""
    encoded = Encoder(tokenizer, 200).encode_response(user("When?"), "May")
    assert (encoded.input_ids.count(BOS), encoded.input_ids[0]) == (1, BOS)
    assert (encoded.input_ids.count(EOS), encoded.input_ids[-1]) == (1, EOS)
    assert encoded.start < len(encoded.input_ids) - 1


def adds_bos(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer that adds a BOS to every text, like that of Llama."""
    core = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    llama_like = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    assert llama_like("x")["input_ids"][0] == BOS
    llama_like.chat_template = template
    return llama_like


WRITES_BOS = chat_template("{prompt}:")
NO_BOS = WRITES_BOS.replace("{{- bos_token or '' -}}", "")
TWO_BOS = "{{ bos_token }}" + WRITES_BOS


@pytest.mark.parametrize(
    "template",
    [WRITES_BOS, NO_BOS, TWO_BOS],
    ids=["template writes one", "template writes none", "template writes two"],
)
def test_a_tokenizer_that_adds_bos_gets_exactly_one(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """There is one BOS, whether the template writes none, one or two (alignment-handbook#127)."""
    llama_like = adds_bos(tokenizer, template)
    encoder = Encoder(llama_like, 200)
    encoded = encoder.encode_response(user("When?"), "May")
    assert encoded.input_ids == [BOS, *encode(llama_like, "When?: May"), EOS]
    assert encoder.encode_prompt(user("When?")) == [BOS, *encode(llama_like, "When?:")]


def test_no_bos_if_neither_tokenizer_nor_template_writes_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """As with Qwen and OLMo."""
    tokenizer.chat_template = NO_BOS
    assert BOS not in Encoder(tokenizer, 200).encode_response(user("When?"), "May").input_ids


@pytest.mark.parametrize("closing", ["", "<eos>", "<eos>\n"], ids=["none", "EOS", "EOS and line feed"])
def test_the_response_ends_with_one_eos_for_any_template(tokenizer: PreTrainedTokenizerFast, closing: str) -> None:
    """ChatML templates write a line feed after EOS; it is not part of the response."""
    turn = "[{{ m['role'] }}]{{ m['content'] }}{{ CLOSING }}".replace("CLOSING", repr(closing))
    opening = "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + opening
    encoded = Encoder(tokenizer, 200).encode_response(user("Q"), "May")
    assert encoded.input_ids[encoded.start :] == [*encode(tokenizer, "May"), EOS]


@pytest.mark.parametrize("closing", ["", "<eos>", "<eos>\n"], ids=["none", "EOS", "EOS and line feed"])
def test_the_text_of_eos_at_the_end_of_a_response_gives_no_second_eos(
    tokenizer: PreTrainedTokenizerFast, closing: str
) -> None:
    """Whether the template writes an EOS or not. An EOS within the response is part of its text."""
    copy = deepcopy(tokenizer)
    copy.chat_template = f"{{% for m in messages %}}[{{{{ m['role'] }}}}]{{{{ m['content'] }}}}{closing}{{% endfor %}}"
    copy.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    encoded = Encoder(copy, 200).encode_response(user("Q"), "Ma<eos>y<eos>")
    assert encoded.input_ids[encoded.start :] == [*encode(tokenizer, "Ma"), EOS, *encode(tokenizer, "y"), EOS]


def test_eos_is_part_of_the_response_even_if_it_is_the_padding_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """As with GPT-2, one token serves as BOS, EOS and padding (trl#1623)."""
    core = tokenizer.backend_tokenizer
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")
    gpt2.chat_template = chat_template("{prompt}:")
    encoder = Encoder(gpt2, 200)
    encoded = encoder.encode_response(user("When?"), "May")
    assert encoded.input_ids == [EOS, *encode(gpt2, "When?: May"), EOS]
    assert encoded.input_ids[encoded.start :] == [*encode(gpt2, " May"), EOS]
    assert encoder.encode_prompt(user("When?")) == encoded.input_ids[: encoded.start]


def test_a_tokenizer_without_bos_gets_none(tokenizer: PreTrainedTokenizerFast) -> None:
    llama_like = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    llama_like.chat_template = chat_template("{prompt}:")
    assert Encoder(llama_like, 200).encode_response(user("Q"), "A").input_ids == [*encode(llama_like, "Q: A"), EOS]


def test_a_tokenizer_without_offsets_is_split_at_the_same_token() -> None:
    """ByT5 is slow, so it has no offsets. Token ids are byte + 3, EOS is 1, there is no BOS, and 'ü' is two bytes."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = chat_template("{prompt}:")
    encoded = Encoder(tokenizer, 200).encode_response(user("ü?"), "ß.")
    assert encoded.input_ids == [*(byte + 3 for byte in "ü?: ß.".encode()), 1]
    assert encoded.start == len("ü?:".encode())


def test_truncation_shortens_the_prompt_and_keeps_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    """12 tokens: BOS, the end of the prompt, and the complete response with EOS."""
    complete = Encoder(tokenizer, 500).encode_response(user("x" * 50), "May")
    response = complete.input_ids[complete.start :]
    encoder = Encoder(tokenizer, 12)
    truncated = encoder.encode_response(user("x" * 50), "May")
    assert len(truncated.input_ids) == 12
    assert truncated.input_ids[truncated.start :] == response
    assert truncated.input_ids[: truncated.start] == [
        BOS,
        *complete.input_ids[: complete.start][-(12 - len(response) - 1) :],
    ]
    assert encoder.counts == {"responses": 1, "truncated_prompts": 1}


def test_exactly_max_length_tokens_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    """With one token less, the prompt is truncated."""
    length = len(Encoder(tokenizer, 500).encode_response(user("When?"), "May").input_ids)
    fits, tight = Encoder(tokenizer, length), Encoder(tokenizer, length - 1)
    assert len(fits.encode_response(user("When?"), "May").input_ids) == length
    assert fits.counts["truncated_prompts"] == 0
    assert len(tight.encode_response(user("When?"), "May").input_ids) == length - 1
    assert tight.counts["truncated_prompts"] == 1


def test_both_responses_of_a_pair_have_the_same_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """The longer response determines how much of the prompt is left; otherwise, the prompt would identify it."""
    encoder = Encoder(tokenizer, 20)
    short, long = encoder.encode_responses(user("x" * 50), ["a", "b" * 10])
    assert short.input_ids[: short.start] == long.input_ids[: long.start]
    assert (len(long.input_ids), short.input_ids[-1], long.input_ids[-1]) == (20, EOS, EOS)
    assert encoder.counts["truncated_prompts"] == 1


def test_a_response_longer_than_max_length_is_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    """10 tokens: one of the prompt, from which the response is predicted, and 9 of the response, without EOS."""
    encoder = Encoder(tokenizer, 10)
    encoded = encoder.encode_response(user("When?"), "y" * 30)
    complete = Encoder(tokenizer, 500).encode_response(user("When?"), "y" * 30)
    assert encoded.start == 1
    assert encoded.input_ids[1:] == complete.input_ids[complete.start :][:9]
    assert EOS not in encoded.input_ids
    assert encoder.counts == {"responses": 1, "truncated_prompts": 1, "truncated_responses": 1}


@pytest.mark.parametrize(
    ("max_length", "bos", "expected"),
    [
        (8, BOS, EncodedResponse([BOS, 5, 6, 7, 8, 9, EOS], 4)),
        (6, BOS, EncodedResponse([BOS, 6, 7, 8, 9, EOS], 3)),
        (6, None, EncodedResponse([5, 6, 7, 8, 9, EOS], 3)),
        (4, BOS, EncodedResponse([BOS, 8, 9, EOS], 1)),
    ],
)
def test_replace_response_by_hand(max_length: int, bos: int | None, expected: EncodedResponse) -> None:
    """Prompt BOS 5 6 7 with the response 8 9 EOS of another row: 7 tokens, unless the prompt is truncated."""
    one, other = EncodedResponse([BOS, 5, 6, 7, 30, EOS], 4), EncodedResponse([BOS, 20, 8, 9, EOS], 2)
    assert replace_response(one, other, max_length, bos) == expected


def test_a_prompt_leaves_the_reserved_tokens_free(tokenizer: PreTrainedTokenizerFast) -> None:
    """30 tokens minus 12 reserved ones leave 18 for the prompt: BOS and its last 17."""
    encoder = Encoder(tokenizer, 30)
    complete = Encoder(tokenizer, 500).encode_prompt(user("x" * 50))
    assert encoder.encode_prompt(user("x" * 50), reserve=12) == [BOS, *complete[-17:]]
    assert encoder.counts["truncated_prompts"] == 1


def test_an_error_of_the_template_is_a_config_error(tokenizer: PreTrainedTokenizerFast) -> None:
    """For example, the template of Gemma rejects system messages."""
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match=r"with the roles \['user'\] \(no system role\)\.\n.*data\.template="):
        Encoder(tokenizer, 10).encode_prompt(user("Q"))


# Encoding many conversations at once


@pytest.mark.parametrize("max_length", [200, 20])
def test_prepared_conversations_are_encoded_as_others(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    """Rows and counts are equal, and the tokenizer is called once for all conversations."""
    messages = [user("When?"), user("Where to? " * 3)]
    responses = ["May.", "東京 👩‍👩‍👧"]
    one_by_one, at_once = (Encoder(tokenizer, max_length) for _ in range(2))
    expected = [one_by_one.encode_responses(prompt, responses) for prompt in messages]
    prompts = [one_by_one.encode_prompt(prompt) for prompt in messages]
    at_once.prepare([(prompt, response) for prompt in messages for response in [*responses, None]])
    at_once._encode = lambda *args: pytest.fail("a prepared conversation was encoded again")  # type: ignore[method-assign]
    assert [at_once.encode_responses(prompt, responses) for prompt in messages] == expected
    assert [at_once.encode_prompt(prompt) for prompt in messages] == prompts
    assert at_once.counts == one_by_one.counts


def test_batches_are_prepared_in_order_while_another_thread_encodes(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of one call of the chat template for prompts and one for responses per batch, each sees the whole batch."""
    batches = [[(user(f"{number}, {row}?"), f"row {row}") for row in range(3)] for number in range(4)]
    expected = [[Encoder(tokenizer, 50).encode_response(*pair) for pair in batch] for batch in batches]
    encoder = Encoder(tokenizer, 50)
    threads: set[str] = set()
    encode_all, apply_template, sizes = encoder._encode_all, encoder._apply_template, []

    def recording(texts: list[str]) -> Any:
        threads.add(threading.current_thread().name)
        return encode_all(texts)

    def counting(conversations: Any, is_prompt: bool) -> list[str]:
        sizes.append(len(conversations))
        return apply_template(conversations, is_prompt)

    encoder._encode_all, encoder._apply_template = recording, counting  # type: ignore[method-assign,assignment]
    found = [[encoder.encode_response(*pair) for pair in batch] for batch in encoder.prepared(batches, lambda b: b)]
    assert found == expected
    assert sizes == [3, 3] * 4
    assert threads
    assert threading.main_thread().name not in threads


def test_a_template_that_fails_for_one_conversation_names_its_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    rejected = [{"role": "system", "content": "Be brief."}, *user("Q")]
    encoder = Encoder(tokenizer, 10)
    with pytest.raises(ConfigError, match=r"with the roles \['system', 'user'\] \(no system role\)"):
        list(encoder.prepared([[(user("Q"), "A")], [(user("Q"), "A"), (rejected, "A")]], lambda batch: batch))


def test_an_error_of_the_tokenizer_in_the_other_thread_is_raised(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, 10)

    def fail(texts: list[str]) -> Any:
        raise DataError("The tokenizer cannot encode a text.", "Use another one.")

    encoder._encode_all = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(DataError, match="cannot encode a text"):
        next(encoder.prepared([[(user("Q"), "A")]] * 3, lambda batch: batch))
