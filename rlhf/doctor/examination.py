"""All checks of the files of one data set."""

from dataclasses import dataclass, field

from rlhf.data import RecordDataModule
from rlhf.data.parser import RecordParser
from rlhf.data.records import Record
from rlhf.doctor.characters import odd_characters
from rlhf.doctor.findings import Finding
from rlhf.doctor.forms import Split
from rlhf.doctor.rows import contradictions, duplicates, empty_texts, invalid_rows, mixed_forms, overlap
from rlhf.doctor.tokens import Lengths, measure, special_tokens


@dataclass
class Examination:
    """What was found out about one file.

    Args:
        split: The rows of the file.
        findings: Problems of the rows.
        lengths: Token counts by form; empty if there is no tokenizer.
    """

    split: Split
    findings: list[Finding]
    lengths: dict[type[Record], Lengths] = field(default_factory=dict)


def examine_splits(splits: list[Split], datamodule: RecordDataModule, max_new_tokens: int) -> list[Examination]:
    """Examine the files of one data set. Rows of the validation and test data are compared with the training data."""
    train = next((split for split in splits if split.name == "train"), None)
    reserve = min(max_new_tokens, datamodule.max_length // 2)
    examinations = []
    for split in splits:
        findings = find_in_rows(split, datamodule.reader.parser)
        if train is not None and split is not train:
            findings += overlap(train, split)
        examination = Examination(split, findings)
        if datamodule.tokenizer is not None:
            tokenizer = datamodule.encoder().tokenizer  # with the template of the configuration
            examination.lengths, misfits = measure(split, tokenizer, datamodule.max_length, reserve)
            examination.findings += [*misfits, *special_tokens(split, tokenizer)]
        examinations.append(examination)
    return examinations


def find_in_rows(split: Split, parser: RecordParser) -> list[Finding]:
    """Return everything that can be found in one file without a tokenizer."""
    findings = invalid_rows(split)
    for check in (empty_texts, contradictions, duplicates, odd_characters):
        findings += check(split)
    return [*findings, *mixed_forms(split, parser)]
