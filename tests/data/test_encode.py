"""One encoding of prompt and answer, one BOS, an EOS that is learned, and cuts that keep the answer."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.data import EncodedResponse, Encoder, replace_response
from rlhf.errors import UserError
from rlhf.models import chat_template, train_tokenizer

BOS, EOS = 1, 2


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("answer", ["May.", "  two spaces", "\nnew line", "", "東京 👩‍👩‍👧", "ends in space "])
def test_prompt_and_answer_are_the_encoding_of_the_joined_text(tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    """Token by token what the whole text gives; prompt alone is a prefix of it up to the boundary."""
    encoder = Encoder(tokenizer, 200)
    coded = encoder.encode_response(asked("When?"), answer)
    assert coded.input_ids == encode(tokenizer, f"<bos>When?\nSummary: {answer}<eos>")
    assert tokenizer.decode(coded.input_ids[: coded.start]) == "<bos>When?\nSummary:"
    assert tokenizer.decode(coded.input_ids[coded.start :]) == f" {answer}<eos>"


def test_a_token_across_the_boundary_belongs_to_the_answer() -> None:
    """The prompt ends in 'a', the answer begins with 'b', and 'ab' is one token: apart it would be two."""
    tokenizer = train_tokenizer(["ababab"], 260)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    coded = Encoder(tokenizer, 50).encode_response(asked("xa"), "b")
    assert tokenizer.convert_ids_to_tokens(coded.input_ids) == ["x", "ab", "<eos>"]
    assert coded.start == 1


def test_the_prompt_to_be_answered_is_the_prompt_that_was_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    """SFT and sampling see the same tokens before the answer."""
    encoder = Encoder(tokenizer, 200)
    coded = encoder.encode_response(asked("When?"), "May")
    assert encoder.encode_prompt(asked("When?")) == coded.input_ids[: coded.start]


def test_one_bos_and_an_eos_that_carries_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    """<bos> first and nowhere else; <eos> last, once, and part of the answer."""
    coded = Encoder(tokenizer, 200).encode_response(asked("When?"), "May")
    assert (coded.input_ids.count(BOS), coded.input_ids[0]) == (1, BOS)
    assert (coded.input_ids.count(EOS), coded.input_ids[-1]) == (1, EOS)
    assert coded.start < len(coded.input_ids) - 1


def adds_bos(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a BOS before every text by itself, as Llama's does."""
    core = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    theirs = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    assert theirs("x")["input_ids"][0] == BOS
    theirs.chat_template = template
    return theirs


WRITES_BOS = chat_template("{prompt}:")
NO_BOS = WRITES_BOS.replace("{{- bos_token or '' -}}", "")
TWO_BOS = "{{ bos_token }}" + WRITES_BOS


@pytest.mark.parametrize("template", [WRITES_BOS, NO_BOS, TWO_BOS], ids=["writes", "leaves", "doubles"])
def test_a_tokenizer_that_adds_bos_by_itself_has_exactly_one(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """Whether the template writes none, one or two: one (alignment-handbook#127)."""
    theirs = adds_bos(tokenizer, template)
    encoder = Encoder(theirs, 200)
    coded = encoder.encode_response(asked("When?"), "May")
    assert coded.input_ids == [BOS, *encode(theirs, "When?: May"), EOS]
    assert encoder.encode_prompt(asked("When?")) == [BOS, *encode(theirs, "When?:")]


def test_a_template_that_leaves_out_bos_decides_where_the_tokenizer_does_not_care(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The tokenizer adds none and the template writes none (Qwen, OLMo): none."""
    tokenizer.chat_template = NO_BOS
    assert BOS not in Encoder(tokenizer, 200).encode_response(asked("When?"), "May").input_ids


@pytest.mark.parametrize("closing", ["", "<eos>", "<eos>\n"], ids=["forgets", "writes", "line feed"])
def test_whatever_the_template_writes_the_answer_ends_in_one_eos(
    tokenizer: PreTrainedTokenizerFast, closing: str
) -> None:
    """ChatML templates write a line feed after the closing token; it is not part of the answer."""
    turn = "[{{ m['role'] }}]{{ m['content'] }}{{ CLOSING }}".replace("CLOSING", repr(closing))
    opening = "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + opening
    coded = Encoder(tokenizer, 200).encode_response(asked("Q"), "May")
    assert coded.input_ids[coded.start :] == [*encode(tokenizer, "May"), EOS]


def test_pad_that_is_eos_still_learns_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """GPT-2's kind, one token for BOS, EOS and pad: first, last, and the last is part of the answer (trl#1623)."""
    core = tokenizer.backend_tokenizer
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")
    gpt2.chat_template = chat_template("{prompt}:")
    encoder = Encoder(gpt2, 200)
    coded = encoder.encode_response(asked("When?"), "May")
    assert coded.input_ids == [EOS, *encode(gpt2, "When?: May"), EOS]
    assert coded.input_ids[coded.start :] == [*encode(gpt2, " May"), EOS]
    assert encoder.encode_prompt(asked("When?")) == coded.input_ids[: coded.start]


def test_a_tokenizer_without_bos_gets_none(tokenizer: PreTrainedTokenizerFast) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    theirs.chat_template = chat_template("{prompt}:")
    assert Encoder(theirs, 200).encode_response(asked("Q"), "A").input_ids == [*encode(theirs, "Q: A"), EOS]


def test_a_slow_tokenizer_parts_at_the_same_place() -> None:
    """ByT5 has no offsets: byte + 3 is the token, 1 is EOS, and it has no BOS; 'ü' is two bytes."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = chat_template("{prompt}:")
    coded = Encoder(tokenizer, 200).encode_response(asked("ü?"), "ß.")
    assert coded.input_ids == [*(byte + 3 for byte in "ü?: ß.".encode()), 1]
    assert coded.start == len("ü?:".encode())


def test_truncation_cuts_the_prompt_and_keeps_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """12 tokens of room: BOS, the last of the prompt, and the whole answer with EOS."""
    whole = Encoder(tokenizer, 500).encode_response(asked("x" * 50), "May")
    answer = whole.input_ids[whole.start :]
    encoder = Encoder(tokenizer, 12)
    cut = encoder.encode_response(asked("x" * 50), "May")
    assert len(cut.input_ids) == 12
    assert cut.input_ids[cut.start :] == answer
    assert cut.input_ids[: cut.start] == [BOS, *whole.input_ids[: whole.start][-(12 - len(answer) - 1) :]]
    assert encoder.counts == {"prompts cut": 1}


def test_what_fits_is_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    """Exactly max_length tokens fit; one less room cuts one prompt."""
    length = len(Encoder(tokenizer, 500).encode_response(asked("When?"), "May").input_ids)
    fits, tight = Encoder(tokenizer, length), Encoder(tokenizer, length - 1)
    assert len(fits.encode_response(asked("When?"), "May").input_ids) == length
    assert fits.counts["prompts cut"] == 0
    assert len(tight.encode_response(asked("When?"), "May").input_ids) == length - 1
    assert tight.counts["prompts cut"] == 1


def test_a_pair_keeps_the_same_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """The longer answer decides how much of the prompt is left, for both: else the prompt would tell them apart."""
    encoder = Encoder(tokenizer, 20)
    short, long = encoder.encode_responses(asked("x" * 50), ["a", "b" * 10])
    assert short.input_ids[: short.start] == long.input_ids[: long.start]
    assert (len(long.input_ids), short.input_ids[-1], long.input_ids[-1]) == (20, EOS, EOS)
    assert encoder.counts["prompts cut"] == 1


def test_an_answer_too_long_by_itself_is_cut_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    """10 tokens: one of the prompt to predict from, 9 of the answer, and no EOS, for it did not end there."""
    encoder = Encoder(tokenizer, 10)
    coded = encoder.encode_response(asked("When?"), "y" * 30)
    whole = Encoder(tokenizer, 500).encode_response(asked("When?"), "y" * 30)
    assert coded.start == 1
    assert coded.input_ids[1:] == whole.input_ids[whole.start :][:9]
    assert EOS not in coded.input_ids
    assert encoder.counts == {"prompts cut": 1, "answers cut": 1}


@pytest.mark.parametrize(
    ("max_length", "bos", "expected"),
    [
        (8, BOS, EncodedResponse([BOS, 5, 6, 7, 8, 9, EOS], 4)),
        (6, BOS, EncodedResponse([BOS, 6, 7, 8, 9, EOS], 3)),
        (6, None, EncodedResponse([5, 6, 7, 8, 9, EOS], 3)),
        (4, BOS, EncodedResponse([BOS, 8, 9, EOS], 1)),
    ],
)
def test_join_by_hand(max_length: int, bos: int | None, expected: EncodedResponse) -> None:
    """Prompt BOS 5 6 7 with the other text's answer 8 9 EOS: 7 tokens, less where they do not fit."""
    one, other = EncodedResponse([BOS, 5, 6, 7, 30, EOS], 4), EncodedResponse([BOS, 20, 8, 9, EOS], 2)
    assert replace_response(one, other, max_length, bos) == expected


def test_a_prompt_leaves_room_for_its_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """30 tokens less 12 of room: 18 tokens, BOS and the end of the prompt."""
    encoder = Encoder(tokenizer, 30)
    whole = Encoder(tokenizer, 500).encode_prompt(asked("x" * 50))
    assert encoder.encode_prompt(asked("x" * 50), room=12) == [BOS, *whole[-17:]]
    assert encoder.counts["prompts cut"] == 1


def test_a_template_that_refuses_a_conversation_says_what_to_type(tokenizer: PreTrainedTokenizerFast) -> None:
    """Gemma's template raises on a system message."""
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match=r"refuses a conversation of \['user'\]: no system role\n.*data\.template="):
        Encoder(tokenizer, 10).encode_prompt(asked("Q"))
