"""Checks that need a tokenizer: lengths, what does not fit into ``data.max_length``, special tokens in texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from rlhf.data import EncodedResponse, Encoder, Preference
from rlhf.data.encode_split import conversations, special_token_pattern
from rlhf.data.openings import Openings
from rlhf.data.records import Prompt, Record, prompt_of
from rlhf.doctor.findings import ERROR, WARNING, Collector, Finding, responses_of, texts_of
from rlhf.doctor.forms import Entry, Split
from rlhf.errors import UserError

CHUNK = 256  # records that are encoded at once
PROGRESS_BAR_RECORDS = 2000  # fewer records are encoded within seconds
UNLIMITED = 1 << 30  # tokens
PERCENTILES = (50, 90, 99, 100)


@dataclass
class Lengths:
    """Token counts of the rows of one form.

    Args:
        prompts: Length of each prompt.
        responses: Length of each response; a preference pair has two.
        rows: Length of each row, which is that of its longer sequence.
    """

    prompts: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def measure(
    split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int, reserve: int
) -> tuple[dict[type[Record], Lengths], list[Finding]]:
    """Encode all rows as training does, and return their lengths and what would be truncated or dropped.

    Args:
        split: The rows.
        tokenizer: A tokenizer with a chat template.
        max_length: Maximum length of prompt and response together, in tokens.
        reserve: Tokens of ``max_length`` to reserve for the response to a prompt, as PPO does.
    """
    raise_to = "Raise data.max_length, if the model and the memory allow it, or shorten the text."
    fit = f"truncated to fit data.max_length={max_length}"
    found = Collector(
        {
            "template": (ERROR, "conversations that the chat template rejects", 'Set data.template="{prompt}\\n"'),
            "response": (WARNING, f"responses {fit}; they lose their end and EOS", raise_to),
            "prompt": (WARNING, f"prompts {fit}; they lose their beginning", raise_to),
            "opening": (
                WARNING,
                "responses without the text with which the chat template opens a response that is sampled",
                "Start the responses with that text, or set data.template.",
            ),
            "changed": (
                WARNING,
                "responses whose text the chat template changes, such as by removing reasoning",
                "Set data.template, or change the responses: the model learns what the template writes.",
            ),
            "dropped": (WARNING, "pairs that are dropped, since both responses have the same tokens", raise_to),
        }
    )
    lengths: dict[type[Record], Lengths] = {}
    unlimited, limited = (Encoder(tokenizer, length) for length in (UNLIMITED, max_length))
    for entry, encoded in encode(split, unlimited):
        location = split.location(entry.number)
        if isinstance(encoded, UserError):
            found.add("template", f"{location}: {encoded.args[0]}")
            continue
        _count(lengths.setdefault(type(entry.record), Lengths()), entry.record, encoded)
        for kind in _misfits(entry.record, encoded, limited, reserve):
            found.add(kind, location)
        if unlimited.openings.missing:
            found.add("opening", f"{location} ({unlimited.openings.shown})")
        if unlimited.openings.changed:
            found.add("changed", location)
        unlimited.openings = Openings()
    return lengths, found.findings()


def encode(split: Split, encoder: Encoder) -> Iterator[tuple[Entry, Sequence[EncodedResponse] | UserError]]:
    """Yield the rows with their sequences, or with the error of the chat template.

    A prompt counts as a sequence without a response.
    """
    entries = split.entries
    quiet = len(entries) < PROGRESS_BAR_RECORDS
    for start in track(range(0, len(entries), CHUNK), f"encoding {escape(split.path)}", transient=True, disable=quiet):
        chunk = entries[start : start + CHUNK]
        try:
            encoder.prepare([pair for entry in chunk for pair in conversations(entry.record)])
        except UserError:
            encoder.prepare([])  # Each row is encoded by itself, and the rejected ones raise again.
        for entry in chunk:
            try:
                yield entry, encode_record(encoder, entry.record)
            except UserError as error:
                yield entry, error


def encode_record(encoder: Encoder, record: Record, reserve: int = 0) -> list[EncodedResponse]:
    """Encode a record of any form: one sequence per response, or the prompt alone."""
    messages = prompt_of(record).messages
    if isinstance(record, Prompt):
        input_ids = encoder.encode_prompt(messages, reserve=reserve)
        return [EncodedResponse(input_ids, len(input_ids))]
    return encoder.encode_responses(messages, list(responses_of(record).values()))


def special_tokens(split: Split, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Find texts that contain the text of a special token, which the tokenizer then reads as that token."""
    pattern = special_token_pattern(tokenizer)
    fix = "Remove or rewrite them: the model would read the end of a text, for example, where there is none."
    found = Finding(WARNING, "special tokens of the tokenizer within the text", fix)
    for entry in split.entries:
        match = next(filter(None, map(pattern.search, texts_of(entry.record).values())), None)
        if match is not None:
            found.locations.append(f"{split.location(entry.number)} ({match[0]})")
    return [found] if found.locations else []


def percentiles(values: Sequence[int]) -> list[int]:
    """Return the 50th, 90th and 99th percentile and the maximum.

    A percentile is the smallest value that at least this share of the values does not exceed.
    """
    ordered = sorted(values)
    return [ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in PERCENTILES]


def _count(lengths: Lengths, record: Record, encoded: Sequence[EncodedResponse]) -> None:
    lengths.prompts.append(max(row.start for row in encoded))
    lengths.rows.append(max(len(row.input_ids) for row in encoded))
    if not isinstance(record, Prompt):
        lengths.responses += [len(row.input_ids) - row.start for row in encoded]


def _misfits(record: Record, encoded: Sequence[EncodedResponse], limited: Encoder, reserve: int) -> Iterator[str]:
    """Yield what happens to a row that does not fit into the maximum length."""
    reserve = reserve if isinstance(record, Prompt) else 0
    needed = max(row.start for row in encoded) + max(len(row.input_ids) - row.start for row in encoded)
    if needed + reserve > limited.max_length:
        limited.counts.clear()
        encoded = encode_record(limited, record, reserve)
        yield from (kind for kind in ("response", "prompt") if limited.counts[f"truncated_{kind}s"])
    if isinstance(record, Preference) and encoded[0].input_ids == encoded[1].input_ids:
        yield "dropped"
