"""The forms of rows: which fields belong to each of them, and which stages read it."""

from rlhf.data.messages import role_of
from rlhf.data.parser import RecordParser
from rlhf.data.records import FIELDS, Demonstration, Preference, Prompt, Rating, Record, Row, UnpairedPreference

# For each form: its name, and the commands that read it.
FORMS: dict[type[Record], tuple[str, str]] = {
    Preference: ("preferences", "stage=reward, stage=dpo"),
    UnpairedPreference: ("unpaired preferences", "stage=dpo loss=kto"),
    Rating: ("ratings", "stage=reward"),
    Demonstration: ("demonstrations", "stage=sft"),
    Prompt: ("prompts", "stage=ppo, stage=grpo, stage=collect, stage=evaluate"),
}


def form_of(parser: RecordParser, row: Row) -> type[Record]:
    """Return the form that the fields of a row belong to, whether or not their values are valid."""
    row = parser.without_alpaca_fields(row)
    present = {name for name in FIELDS if parser.has(row, name)}
    if present & {"chosen", "rejected"}:
        return Preference
    if "label" in present:
        return UnpairedPreference
    if present & {"reward", "response"}:
        return Rating
    if present & {"target", "completion"} or ("messages" in present and _ends_with_response(parser, row)):
        return Demonstration
    return Prompt


def _ends_with_response(parser: RecordParser, row: Row) -> bool:
    messages = row[parser.column("messages")]
    last = messages[-1] if isinstance(messages, list) and messages else None
    return not (isinstance(last, dict) and role_of(last) in ("user", "system", "tool"))
