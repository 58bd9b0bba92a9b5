"""``stage=doctor``: read the data of a configuration, examine them, and print what was found."""

import logging
from collections.abc import Iterator
from typing import Any

import datasets
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from rlhf.artifacts import output_of
from rlhf.config import check_values
from rlhf.data import RecordDataModule
from rlhf.doctor import report
from rlhf.doctor.examination import examine_splits
from rlhf.doctor.findings import ERROR, Finding, texts_of
from rlhf.doctor.forms import Split, read_split
from rlhf.errors import ConfigError
from rlhf.export import Export
from rlhf.logs import quiet_libraries
from rlhf.schema import NonNegativeInt, check_arguments

SPLITS = ("train", "val", "test")
BUNDLED = "${oc.select:files."  # how a value of conf/data/demo.yaml begins


def examine(
    cfg: DictConfig,
    *,
    examples: NonNegativeInt = 1,
    places: NonNegativeInt = 3,
    max_new_tokens: NonNegativeInt = 64,
) -> int:
    """Examine the training, validation and test data, and print a report.

    Args:
        cfg: The composed configuration. The data are those of ``data.train``, ``data.val`` and ``data.test``; with
            ``data=demo``, all bundled files.
        examples: Number of rows of each form to show as the model sees them; 0 for none.
        places: Maximum number of rows to list for each finding.
        max_new_tokens: Tokens of ``data.max_length`` that PPO, GRPO and evaluation reserve for the response to a
            prompt, as in ``stage.sampling.max_new_tokens``. At most half of ``data.max_length`` is reserved here.

    Returns:
        The exit code: 1 if there is an error that must be fixed, otherwise 0.

    Raises:
        UserError: There are no data, or a key is invalid.
    """
    check_arguments(examine, "command", locals())
    quiet_libraries()
    datasets.logging.set_verbosity(logging.CRITICAL)  # Why a file cannot be read is in the report.
    logging.getLogger("transformers").setLevel(logging.ERROR)  # It warns of sequences that it does not truncate.
    check_values(cfg, ("data", "model"))
    datamodule: RecordDataModule = instantiate(cfg.data, train=None, val=None, test=None)
    sets = {
        title: [read_split(name, path, datamodule.reader) for name, path in paths.items()]
        for title, paths in data_sets(cfg).items()
    }
    origin, datamodule.tokenizer = open_tokenizer(cfg, next(iter(sets.values()))[0])
    console = Console()
    findings: list[Finding] = []
    for title, splits in sets.items():
        examinations = examine_splits(splits, datamodule, max_new_tokens)
        report.show(console, title, examinations, origin, datamodule, examples=examples, places=places)
        findings += [finding for examination in examinations for finding in examination.findings]
    report.show_conclusion(console, findings)
    return int(any(finding.level == ERROR for finding in findings))


def data_sets(cfg: DictConfig) -> dict[str, dict[str, str]]:
    """Return the files to examine by title and split.

    Raises:
        ConfigError: The configuration names no file.
    """
    raw: Any = OmegaConf.to_container(cfg.data, resolve=False)
    chosen = {name: str(cfg.data[name]) for name in SPLITS if BUNDLED not in str(raw[name]) and cfg.data[name]}
    if chosen:
        return {"data": chosen}
    bundled: Any = OmegaConf.to_container(cfg.get("files", OmegaConf.create({})))
    found: dict[str, dict[str, str]] = {}
    for title, paths in bundled.items():
        if paths not in found.values():  # The prompts are those of the demonstrations.
            found[title] = paths
    if not found:
        raise ConfigError("stage=doctor requires data, but data.train is null.", "Set data.train=<file>")
    return found


def open_tokenizer(cfg: DictConfig, split: Split) -> tuple[str, PreTrainedTokenizerBase | None]:
    """Return the tokenizer that training would use, and where it is from; None if there is none and no text.

    This is the tokenizer of a pretrained model, of the run's SFT model, or one that is trained on the data.
    """
    sft = output_of(cfg, "sft")
    if "path" not in cfg.model and sft is not None:
        return str(sft), Export(str(sft)).tokenizer()
    source = instantiate(cfg.model)
    if "path" in cfg.model:
        return str(cfg.model.path), source.tokenizer(())
    texts = list(_texts(split))
    return f"a tokenizer trained on {split.path}", source.tokenizer(texts) if texts else None


def _texts(split: Split) -> Iterator[str]:
    for entry in split.entries:
        yield from texts_of(entry.record).values()
