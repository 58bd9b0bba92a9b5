"""Token counts, what does not fit into ``data.max_length``, and special tokens in texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.markup import render

from rlhf.data import Demonstration, Encoder, Preference, Prompt, reading
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader
from rlhf.doctor import tokens
from rlhf.doctor.findings import ERROR, WARNING
from rlhf.doctor.forms import Split, read_split
from rlhf.doctor.tokens import encode, measure, percentiles, special_tokens


def lines(findings: list[Any]) -> dict[str, list[str]]:
    """Return the lines of each finding by the first word of its text."""
    return {
        finding.text.split()[0]: [location.rpartition(":")[2] for location in finding.locations] for finding in findings
    }


def test_percentiles_by_hand() -> None:
    """Of 200 values 1 to 200: 100, 180 and 198 values do not exceed the 50th, 90th and 99th percentile."""
    assert percentiles(list(range(200, 0, -1))) == [100, 180, 198, 200]
    assert percentiles([7]) == [7, 7, 7, 7]


def test_lengths_are_those_of_training(split: Callable[..., Split], tokenizer: Any) -> None:
    """BOS belongs to the prompt, EOS to the response. A row is as long as its longer sequence."""
    pair = {"prompt": "It rains.", "chosen": "Yes, it rains a lot.", "rejected": "No."}
    lengths, findings = measure(split(pair, {"prompt": "It"}), tokenizer, 100, 10)
    assert findings == []

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = count("<bos>It rains.\nSummary:")
    responses = [count(" Yes, it rains a lot.<eos>"), count(" No.<eos>")]
    found = lengths[Preference]
    assert (found.prompts, found.responses, found.rows) == ([prompt], responses, [prompt + responses[0]])
    assert lengths[Prompt].prompts == [count("<bos>It\nSummary:")]
    assert lengths[Prompt].responses == []


def test_the_progress_bars_show_the_path_as_it_is(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets are not the markup of rich."""
    shown = []
    for module in (tokens, reading):
        monkeypatch.setattr(module, "track", lambda items, text, **_: shown.append(render(text).plain) or items)
    path = tmp_path / "exp[a1]" / "[/b].jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    measure(read_split("train", str(path), RecordReader(RecordParser())), tokenizer, 100, 10)
    RecordReader(RecordParser()).read(str(path), "train", (Demonstration,))
    assert set(shown) == {f"encoding {path}", f"reading {path}"}


@pytest.mark.parametrize("chunk", [1, 256])
def test_truncated_and_dropped_rows(
    split: Callable[..., Split], tokenizer: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """With 40 tokens. Every x is one token, and the template of a prompt has about 10.

    1: fits   2: prompt too long   3: response too long by itself   4: pair that differs in its end only
    5: prompt that fits, but not together with 20 reserved tokens
    """
    monkeypatch.setattr(tokens, "CHUNK", chunk)
    rows = (
        {"prompt": "x", "completion": "x" * 20},
        {"prompt": "x" * 40, "completion": "x" * 20},
        {"prompt": "x", "completion": "x" * 60},
        {"prompt": "x", "chosen": "x" * 60, "rejected": "x" * 61},
        {"prompt": "x" * 20},
    )
    lengths, findings = measure(split(*rows), tokenizer, 40, 20)
    assert lines(findings) == {"responses": ["3", "4"], "prompts": ["2", "3", "4", "5"], "pairs": ["4"]}
    assert {finding.level for finding in findings} == {WARNING}
    assert lengths[Demonstration].rows[1] > 60, "lengths are those before truncation"
    assert lines(measure(split(rows[4]), tokenizer, 40, 0)[1]) == {}


def test_a_conversation_that_the_template_rejects_does_not_hide_the_others(
    split: Callable[..., Split], tokenizer: Any
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    system = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    rows = {"prompt": "a", "completion": "b"}, {"prompt": system, "completion": "b"}, {"prompt": "c", "completion": "d"}
    lengths, findings = measure(split(*rows), tokenizer, 40, 0)
    assert len(lengths[Demonstration].rows) == 2
    assert [finding.level for finding in findings] == [ERROR]
    assert "train.jsonl:2: " in findings[0].locations[0]
    assert "no system" in findings[0].locations[0]


def test_texts_that_cannot_be_encoded_are_left_out(split: Callable[..., Split], tokenizer: Any) -> None:
    rows = {"prompt": "a", "completion": "\ud800"}, {"prompt": "a", "completion": "b"}
    assert [entry.number for entry, _ in encode(split(*rows), Encoder(tokenizer, 40))] == [2]


def test_special_tokens_within_texts(split: Callable[..., Split], tokenizer: Any) -> None:
    rows = (
        {"prompt": "a", "completion": "b <eos> c"},
        {"prompt": "<pad>", "completion": "b"},
        {"prompt": "eos", "completion": "<b>"},
    )
    (found,) = special_tokens(split(*rows), tokenizer)
    assert [location.rpartition(":")[2] for location in found.locations] == ["1 (<eos>)", "2 (<pad>)"]
    assert special_tokens(split(rows[2]), tokenizer) == []


def test_a_text_that_opens_sampled_responses_only(split: Callable[..., Split], tokenizer: Any) -> None:
    """A pair has one location."""
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    rows = (
        {"prompt": "a", "completion": "<think>\nb"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "<c>"},
        {"prompt": "a"},
    )
    (found,) = measure(split(*rows), tokenizer, 100, 10)[1]
    assert (found.level, found.fix) == (WARNING, "Start the responses with that text, or set data.template.")
    assert [location.rpartition(":")[2] for location in found.locations] == [
        r"2 ('<think>\n')",
        r"3 ('<think>\n')",
    ]


def test_responses_that_the_template_changes(split: Callable[..., Split], tokenizer: Any) -> None:
    """A prompt has no response, and white space does not count."""
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    rows = (
        {"prompt": "a", "completion": "<think>x</think>b"},
        {"prompt": "a", "completion": " b\n"},
        {"prompt": "a", "chosen": "b", "rejected": "<think>x</think>c"},
        {"prompt": "<think>x</think>a"},
    )
    (found,) = measure(split(*rows), tokenizer, 100, 10)[1]
    assert found.level == WARNING
    assert "whose text the chat template changes" in found.text
    assert [location.rpartition(":")[2] for location in found.locations] == ["1", "3"]
