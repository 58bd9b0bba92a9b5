"""Records: demonstrations, preferences, ratings and prompts, as the data contain them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rlhf.data.row_columns import NOT_STORED
from rlhf.errors import DataError

Message: TypeAlias = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": "..."}
Row: TypeAlias = Mapping[str, Any]


@dataclass  # Not frozen: with trainer.precision=bf16-true, Lightning copies batches field by field.
class Prompt:
    """A conversation up to the next response.

    Args:
        messages: The messages of the conversation. The last one is not by the assistant.
        raw_text: The prompt as it is in the data, without a chat template; reward functions receive this text.
        target: The reference response of the data, if there is one.
        row: Index of the row that the record was read from, from 0; None if it was not read from data.
        columns: Values of further columns of the row, which a reward function reads; see
            ``PromptDataModule.read_columns``.
    """

    messages: Sequence[Message]
    raw_text: str
    target: str | None = None
    row: int | None = field(default=None, compare=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, metadata=NOT_STORED)


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to learn."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Preference:
    """A prompt with a preferred and a rejected response.

    Args:
        prompt: The prompt.
        chosen: The preferred response.
        rejected: The other response.
        margin: By how much the chosen response is better, in reward units; 0 if the data do not specify it.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0


@dataclass(frozen=True)
class Rating:
    """A prompt and a response with its reward, in reward units."""

    prompt: Prompt
    response: str
    reward: float


@dataclass(frozen=True)
class UnpairedPreference:
    """A prompt, a response, and whether the response is desirable."""

    prompt: Prompt
    response: str
    desirable: bool


Record: TypeAlias = Demonstration | Preference | Rating | UnpairedPreference | Prompt


def prompt_of(record: Record) -> Prompt:
    """Return the prompt of a record, which may be the record itself."""
    return record if isinstance(record, Prompt) else record.prompt


class RecordError(DataError):
    """A row that is not a valid record.

    Args:
        reason: What is wrong, as a clause that can follow ``file:line:``.
        missing: The missing field, if that is the reason; error messages suggest ``data.columns.<missing>``.
        fix: What to do about it, as a sentence; None if the reason makes that clear.
        is_null: Whether the row has the missing field, but without a value.
    """

    def __init__(
        self, reason: str, missing: str | None = None, fix: str | None = None, *, is_null: bool = False
    ) -> None:
        super().__init__(reason)
        self.missing, self.fix, self.is_null = missing, fix, is_null


# Examples for error messages.
EXPECTED: dict[type[Record], str] = {
    Demonstration: '{"document": "...", "target": "..."}, {"prompt": "...", "completion": "..."}, {"messages": [...]}',
    Preference: '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    Rating: '{"prompt": "...", "response": "...", "reward": 0.5}',
    UnpairedPreference: '{"prompt": "...", "completion": "...", "label": true}, or preference pairs',
    Prompt: '{"prompt": "..."} or {"document": "..."}',
}

# All fields that a record may have. ``data.columns`` in conf/data/ declares these names, and those of ``CONTEXT``.
FIELDS = tuple("prompt document target completion messages chosen rejected margin response reward label".split())
# Fields of what precedes the prompt of a record, each with the columns that may contain it.
CONTEXT = {"system": ("system", "system_prompt"), "history": ("history",)}
