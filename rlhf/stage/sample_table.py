"""Tables of sampled responses: greedy responses to validation prompts, and tables in Markdown and as plain text."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from rlhf.data import Prompt, RecordDataModule
from rlhf.sampling import Rollout, position_limit

log = logging.getLogger(__name__)


def sample_for_table(module: Any, datamodule: RecordDataModule) -> tuple[list[Prompt], Rollout]:
    """Sample a response to each of the first validation prompts.

    A table of samples does not end a run: prompts and responses are shortened to the positions that the policy has.

    Args:
        module: A stage with a ``policy``, a ``sampler``, ``samples`` and ``sampling``.
        datamodule: Its data.

    Returns:
        The prompts, and their responses in the same order.
    """
    sampling, limit = module.sampling, position_limit(module.policy.lm.config)
    rows = datamodule.sample_prompts(module.samples, sampling.max_new_tokens, limit)
    prompts = [input_ids for input_ids, _ in rows]
    if limit is not None and (available := limit - max(map(len, prompts))) < sampling.max_new_tokens:
        _warn_of_positions(sampling.max_new_tokens, available, limit)
        sampling = replace(sampling, max_new_tokens=available)
    module.sampler.sync(module.policy.lm, module.tokenizer)
    with module.trainer.precision_plugin.forward_context():
        rollout = module.sampler.sample(prompts, sampling)
    return [prompt for _, prompt in rows], rollout


@cache
def _warn_of_positions(wanted: int, available: int, limit: int) -> None:
    """Warn once per run."""
    log.warning(
        "Responses in the table of samples have at most %d tokens instead of stage.max_new_tokens=%d: the model has %d "
        "positions for prompt and response together.",
        available,
        wanted,
        limit,
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. Line breaks and vertical bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with one line per cell, which shows long texts in full. Rows are numbered from 1."""
    width = max(map(len, header))
    lines = []
    for number, row in enumerate(rows, 1):
        for column, (name, cell) in enumerate(zip(header, row, strict=True)):
            label = f"{f'{number}.' if column == 0 else '':4}{name:{width}}  "
            lines.append(label + cell.strip().replace("\n", "\n" + " " * len(label)))
    return "\n".join(lines)


def _escape(text: str) -> str:
    return re.sub(r"\r\n?|\n", "<br>", text.replace("|", "\\|"))
