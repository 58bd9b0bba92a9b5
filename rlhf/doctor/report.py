"""The report of ``stage=doctor`` in the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rlhf.data import EncodedResponse, RecordDataModule
from rlhf.data.forms import FORMS
from rlhf.data.records import Prompt
from rlhf.doctor.examination import Examination
from rlhf.doctor.findings import ERROR, WARNING, Finding, responses_of
from rlhf.doctor.forms import Split
from rlhf.doctor.tokens import encode, percentiles
from rlhf.errors import UserError
from rlhf.printable import printable

EXAMPLE_CHARACTERS = 1200  # of a prompt or a response
LOCATION_CHARACTERS = 300
LOSS_STYLE = "green"
LEVEL_STYLES = {ERROR: "bold red", WARNING: "yellow"}


def show(
    console: Console,
    title: str,
    examinations: Sequence[Examination],
    tokenizer: str,
    datamodule: RecordDataModule,
    *,
    examples: int,
    places: int,
) -> None:
    """Print what was found out about the files of one data set.

    Args:
        console: The terminal.
        title: Name of the data set.
        examinations: The result for each file.
        tokenizer: Where the tokenizer is from.
        datamodule: The data module, which has the tokenizer.
        examples: Number of rows of each form to show.
        places: Maximum number of rows to list for each finding.
    """
    console.print(Rule(Text(title), align="left"))
    console.print(rows_table(examinations))
    if any(examination.lengths for examination in examinations):
        console.print(lengths_table(examinations, tokenizer))
        colored = console.color_system is not None and not console.no_color
        for line in example_lines(examinations[0].split, datamodule, examples, colored=colored):
            console.print(line)
    findings = [finding for examination in examinations for finding in examination.findings]
    if findings:
        console.print(findings_table(findings, places))


def show_conclusion(console: Console, findings: Sequence[Finding]) -> None:
    """Print how many problems were found in all files."""
    errors, warnings = (sum(finding.level == level for finding in findings) for level in (ERROR, WARNING))
    if errors:
        conclusion = f"{_count(errors, 'error')} must be fixed before training, {_count(warnings, 'warning')}."
    else:
        conclusion = f"No error, {_count(warnings, 'warning')}."
    console.print(Text(conclusion, style=LEVEL_STYLES[ERROR] if errors else LOSS_STYLE))


def rows_table(examinations: Sequence[Examination]) -> Table:
    """Build the table of the forms of each file and of the stages that read them."""
    prompts = FORMS[Prompt][1]
    table = _table("Rows", caption=Text(f"{prompts} read the prompts of rows of every form."))
    for column in ("split", "file", "rows", "form", "read by"):
        table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
    for split in (examination.split for examination in examinations):
        rows = [(len(entries), *FORMS[form]) for form, entries in split.by_form().items()]
        rows += [(len(split.invalid), "invalid", "")] if split.invalid else []
        for number, (count, form, readers) in enumerate(rows or [(0, "", "")]):
            first = (split.name, printable(split.path)) if number == 0 else ("", "")
            table.add_row(*map(Text, (*first, str(count), form, readers)), end_section=number == len(rows) - 1)
    return table


def lengths_table(examinations: Sequence[Examination], tokenizer: str) -> Table:
    """Build the table of the lengths of prompts, responses and whole rows."""
    table = _table("Tokens", caption=Text(f"Tokenizer: {printable(tokenizer)}"))
    for column in ("split", "form", "part", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right" if column[0] in "pm" and column != "part" else "left")
    for examination in examinations:
        for form, lengths in examination.lengths.items():
            parts = {"prompt": lengths.prompts, "response": lengths.responses, "row": lengths.rows}
            for number, (part, values) in enumerate((part, values) for part, values in parts.items() if values):
                first = (examination.split.name, FORMS[form][0]) if number == 0 else ("", "")
                table.add_row(*first, part, *map(str, percentiles(values)))
    return table


def findings_table(findings: Sequence[Finding], places: int) -> Table:
    """Build the table of all problems, errors first."""
    table = _table("Findings")
    for column in ("level", "rows", "finding"):
        table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
    for finding in sorted(findings, key=lambda finding: finding.level != ERROR):
        lines = [
            printable(finding.text),
            *(f"  {printable(location, LOCATION_CHARACTERS)}" for location in finding.locations[:places]),
        ]
        if hidden := len(finding.locations[places:]):
            lines.append(f"  ... and {hidden} more" if places else f"  {hidden} rows")
        text = Text("\n".join(lines))
        if finding.fix:
            text.append(f"\n{finding.fix}", style="italic")
        table.add_row(Text(finding.level, style=LEVEL_STYLES[finding.level]), str(len(finding.locations)), text)
    return table


def example_lines(split: Split, datamodule: RecordDataModule, count: int, *, colored: bool) -> Iterator[Text]:
    """Yield the first rows of each form as the model sees them; what carries loss is marked.

    Args:
        split: The rows.
        datamodule: The data module with its tokenizer.
        count: Number of rows of each form.
        colored: Whether the terminal shows colors; otherwise, ``[[`` and ``]]`` enclose what carries loss.
    """
    encoder = datamodule.encoder()
    for form, entries in split.by_form().items():
        firsts = Split(split.name, split.path, entries[:count])
        for entry, encoded in encode(firsts, encoder):
            if isinstance(encoded, UserError):
                continue
            names = responses_of(entry.record) or {"prompt": ""}
            for name, sequence in zip(names, encoded, strict=True):
                yield Text(f"{printable(split.location(entry.number))} ({FORMS[form][0]}, {name})", style="bold")
                yield example(sequence, encoder.tokenizer, colored=colored)
    if count:
        marked = "in green" if colored else "between [[ and ]]"
        yield Text(f"Tokens that carry loss are shown {marked}.\n", style="dim")


def example(sequence: EncodedResponse, tokenizer: Any, *, colored: bool) -> Text:
    """Return one sequence as text, with its response marked."""
    prompt, response = (
        printable(tokenizer.decode(ids), EXAMPLE_CHARACTERS)
        for ids in (sequence.input_ids[: sequence.start], sequence.input_ids[sequence.start :])
    )
    if response and not colored:
        response = f"[[{response}]]"
    return Text.assemble(prompt, (response, LOSS_STYLE))


def _table(title: str, **keys: Any) -> Table:
    return Table(
        title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **keys
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
