"""``data.loss_on=assistant``: the tokens of every assistant message of a conversation."""

import logging
from typing import Any

import pytest
from data.test_encode import BOS, NO_BOS, TWO_BOS, WRITES_BOS, adds_bos, encode, user
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rlhf.data import EncodedConversation, Encoder, SequenceBatch
from rlhf.errors import ConfigError
from rlhf.models import chat_template, train_tokenizer
from rlhf.sft import SFTDataModule

TURN = "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}<eos>\n{% endfor %}"
CHATML = TURN + "{% if add_generation_prompt %}[a]{% endif %}"
# As that of Qwen3: the reasoning of a message is removed when the user responds.
REASONING = CHATML.replace("m['content']", "m['content'] if loop.last else m['content'].split('</think>')[-1]")
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def talk(*contents: str) -> list[dict[str, str]]:
    """Messages from texts that begin with the first letter of their role."""
    return [{"role": ROLES[content[0]], "content": content[1:]} for content in contents]


MESSAGES = talk("sB", "uC", "aDE", "uF", "aG ", "uH")


@pytest.fixture
def bytewise(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and for EOS, and a template like ChatML, without BOS."""
    tokenizer = train_tokenizer(["a"], 259)
    tokenizer.chat_template = CHATML
    return tokenizer


def learned(tokenizer: Any, encoded: EncodedConversation) -> list[str]:
    """The texts of the assistant messages."""
    return [tokenizer.decode(encoded.input_ids[begin:end]) for begin, end in encoded.spans]


def test_the_mask_of_a_conversation_by_hand(bytewise: PreTrainedTokenizerFast) -> None:
    r"""One token per character and per EOS. ``x``: learned.

    [s]B$.[u]C$.[a]DE$.[u]F$.[a]G $.[u]H$.[a]I$        $ is EOS, a point is a line feed
    ...............xxx..........xxx..........xx
    """
    encoded = Encoder(bytewise, 100).encode_conversation(MESSAGES, "I")
    assert bytewise.decode(encoded.input_ids) == "[s]B$.[u]C$.[a]DE$.[u]F$.[a]G $.[u]H$.[a]I$".replace(
        "$", "<eos>"
    ).replace(".", "\n")
    (mask,) = SequenceBatch.collate([encoded]).response_mask.tolist()
    assert "".join(".x"[value] for value in mask) == "...............xxx..........xxx..........xx"
    assert encoded == EncodedConversation(encoded.input_ids, 41, [15, 18, 28, 31])


@pytest.mark.parametrize(
    ("max_length", "mask"),
    [
        (43, "...............xxx..........xxx..........xx"),
        (29, ".xxx..........xxx..........xx"),
        (28, ".xx..........xxx..........xx"),
        (26, "...........xxx..........xx"),
        (15, ".xx..........xx"),
        (13, "...........xx"),
        (3, ".xx"),
        (2, ".x"),
    ],
)
def test_truncation_moves_the_mask(bytewise: PreTrainedTokenizerFast, max_length: int, mask: str) -> None:
    """The end of the conversation remains. With 28 tokens, ``D`` is the first one, so it cannot be predicted."""
    complete = Encoder(bytewise, 100).encode_conversation(MESSAGES, "I").input_ids
    encoder = Encoder(bytewise, max_length)
    encoded = encoder.encode_conversation(MESSAGES, "I")
    assert encoded.input_ids == (complete[-max_length:] if max_length > 2 else [complete[-3], complete[-2]])
    (found,) = SequenceBatch.collate([encoded]).response_mask.tolist()
    assert "".join(".x"[value] for value in found) == mask
    assert encoder.counts["truncated_prompts"] == (max_length < 43)
    plain = Encoder(bytewise, max_length)
    plain.encode_response(MESSAGES, "I")
    assert encoder.counts == plain.counts


@pytest.mark.parametrize("template", [WRITES_BOS, NO_BOS, TWO_BOS], ids=["one", "none", "two"])
@pytest.mark.parametrize("max_length", [200, 22])
def test_bos_does_not_move_the_mask(tokenizer: PreTrainedTokenizerFast, template: str, max_length: int) -> None:
    """The tokenizer adds one, and the template none, one or two. 22 tokens truncate a message."""
    llama_like = adds_bos(tokenizer, template)
    encoded = Encoder(llama_like, max_length).encode_conversation(talk("uQQQQ", "aA00000", "uQ1", "aA1", "uQ2"), "A2")
    assert learned(llama_like, encoded) == [" A00000" if max_length == 200 else "0000", " A1", " A2<eos>"]
    assert (encoded.input_ids[0], encoded.input_ids.count(BOS)) == (BOS, 1)


def test_a_template_for_plain_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    """It writes EOS after the last message only, and a blank line, which is not learned, after earlier ones."""
    encoded = Encoder(tokenizer, 200).encode_conversation(talk("uQ", "aA", "uR"), "B")
    assert encoded.input_ids == encode(tokenizer, "<bos>Q\nSummary: A\n\nR\nSummary: B<eos>")
    assert learned(tokenizer, encoded) == [" A", " B<eos>"]


def test_tokens_at_the_ends_of_a_message() -> None:
    """A token that overlaps with a message is learned, and so are all tokens of a character that has several."""
    tokenizer = train_tokenizer(["ab." * 9], 261)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    encoded = Encoder(tokenizer, 100).encode_conversation(talk("uxa", "ab😀", "uya", "ab.", "uz"), "b")
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids)[:2] == ["x", "ab"]
    assert learned(tokenizer, encoded) == ["ab😀", "ab.", "b<eos>"]


def test_a_tokenizer_without_offsets() -> None:
    """ByT5 is slow, so it has no offsets."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML.replace("<eos>\n", "</s>")
    encoded = Encoder(tokenizer, 100).encode_conversation(talk("uü", "aAß", "uß"), "B")
    assert learned(tokenizer, encoded) == ["Aß</s>", "B</s>"]


def test_which_messages_are_learned(bytewise: PreTrainedTokenizerFast) -> None:
    """Not one that begins the conversation, because no prompt precedes it; an empty message is EOS only."""
    encoder = Encoder(bytewise, 100)
    assert learned(bytewise, encoder.encode_conversation(talk("aA", "uB", "a", "uC"), "D")) == ["<eos>", "D<eos>"]
    assert learned(bytewise, encoder.encode_conversation(talk("uB", "aC", "aD", "uE"), "F")) == [
        "C<eos>",
        "D<eos>",
        "F<eos>",
    ]
    bytewise.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert learned(bytewise, encoder.encode_conversation(talk("uB", "a", "uC"), "D")) == ["D\n<eos>"]


def test_prepared_conversations_are_the_same(bytewise: PreTrainedTokenizerFast) -> None:
    conversations = [(MESSAGES, "I"), (talk("uB"), "C"), (talk("uB", "aC", "uD"), "E")]
    encoder = Encoder(bytewise, 100)
    one_by_one = [encoder.encode_conversation(*conversation) for conversation in conversations]
    encoder.prepare(conversations)
    assert [encoder.encode_conversation(*conversation) for conversation in conversations] == one_by_one


@pytest.mark.parametrize("template", [CHATML, REASONING, chat_template("{prompt}:")])
@pytest.mark.parametrize("max_length", [100, 12, 3])
def test_a_single_turn_equals_the_response(bytewise: PreTrainedTokenizerFast, template: str, max_length: int) -> None:
    """With any template, and truncated or not."""
    bytewise.chat_template = template
    for prompt, response in ((user("When?"), "May"), (user("W"), ""), (talk("sB", "uW" * 9), "M</think>ay" * 3)):
        whole = Encoder(bytewise, max_length).encode_conversation(prompt, response)
        encoded = Encoder(bytewise, max_length).encode_response(prompt, response)
        assert (whole.input_ids, whole.start, whole.spans) == (encoded.input_ids, encoded.start, encoded.spans)


@pytest.mark.parametrize(
    ("template", "number"),
    [(REASONING, 4), (CHATML + "{% if messages | length > 4 %}{{ '!' }}{% endif %}", None), ("!" + CHATML, None)],
)
def test_a_template_that_changes_earlier_messages_is_rejected(
    bytewise: PreTrainedTokenizerFast, template: str, number: int | None
) -> None:
    """Only where it does so: message 2 has no reasoning."""
    bytewise.chat_template = template
    encoder, messages = Encoder(bytewise, 200), talk("uB", "aC", "uD", "a<think>E</think>F", "uG")
    if number is None:
        assert learned(bytewise, encoder.encode_conversation(messages, "H"))[0] == "C<eos>"
        return
    message = rf"^data\.loss_on=assistant: .* changes the text of message {number}.*\n  Set data\.loss_on=response"
    with pytest.raises(ConfigError, match=message):
        encoder.encode_conversation(messages, "H")


@pytest.mark.parametrize("loss_on", ["response", "assistant", "all"])
def test_earlier_messages_without_loss_are_logged_once(
    bytewise: PreTrainedTokenizerFast, write: Any, caplog: pytest.LogCaptureFixture, loss_on: str
) -> None:
    """Two rows with two and one of them, and one with none; and the same for validation, which is not counted."""
    conversations = [talk(*texts, "aZ") for texts in (["uB", "aC", "uD", "aE", "uF"], ["uB", "aC", "uD"])]
    path = write(*({"messages": messages} for messages in [*conversations, talk("uB", "aC")]))
    data = SFTDataModule(train=path, val=path, loss_on=loss_on, tokenizer=bytewise)
    with caplog.at_level(logging.INFO, logger="rlhf"):
        data.setup("fit")
        data.encoded("train")
    found = [record.message for record in caplog.records if "carry no loss" in record.message]
    expected = f"{path}: 3 earlier assistant messages carry no loss, because data.loss_on=response covers only the last"
    assert len(found) == (loss_on == "response")
    assert all(message.startswith(expected) and "data.loss_on=assistant" in message for message in found)
