"""Tables of sampled responses: greedy responses to validation prompts, and tables in Markdown and as plain text."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf.data import Prompt, RecordDataModule
from rlhf.sampling import Rollout, position_limit
from rlhf.stage.random_state import separate_random_state

log = logging.getLogger(__name__)


@torch.no_grad()
def show_samples(module: Any, columns: Callable[[Any, Rollout], Mapping[str, Tensor]] | None = None) -> None:
    """Sample a response to each of the first validation prompts, and show them as a table in the loggers of rank 0.

    All ranks sample, which a sharded model requires. The random state of training does not change. There is no table
    during the sanity check, and none without a ``RecordDataModule``.

    Args:
        module: A stage with a ``policy``, a ``sampler``, ``samples`` and ``sampling``.
        columns: Function from the stage and the responses to further columns by name, [responses] each.
    """
    datamodule = getattr(module.trainer, "datamodule", None)
    if not module.samples or module.trainer.sanity_checking or not isinstance(datamodule, RecordDataModule):
        return
    with separate_random_state(0):
        prompts, rollout = _sample(module, datamodule)
        with module.trainer.precision_plugin.forward_context():
            further = {} if columns is None else columns(module, rollout)
    texts = [prompt.raw_text for prompt in prompts], rollout.decode(module.tokenizer)
    rows = zip(*texts, *(values.tolist() for values in further.values()), strict=True)
    module.log_samples(("prompt", "response", *further), list(rows))


def _sample(module: Any, datamodule: RecordDataModule) -> tuple[list[Prompt], Rollout]:
    """Sample a response to each of the first validation prompts, and return both in the same order.

    A table of samples does not end a run: prompts and responses are shortened to the positions that the policy has.
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
    """Warn once per process."""
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
