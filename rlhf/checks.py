"""``check=true``: before it trains, a stage proves itself on the user's own model and data.

A check measures one property and says whether it holds. The checks common to several stages are here, each slice's
``checks.py`` says which apply to it. They look at a few rows, the shortest and the longest, and leave everything as
they found it, so that training goes on as if they had not been.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from rlhf.data import Batch, EncodedAnswer, PromptBatch, RecordDataModule, TextBatch
from rlhf.data.loader import weighed
from rlhf.errors import UserError
from rlhf.logs import lines
from rlhf.models import Frozen, Policy, ScalarModel
from rlhf.tensors import last_true

if TYPE_CHECKING:  # stage.py knows this file's Check, not the other way round
    from rlhf.stage import Result, StageModule

log = logging.getLogger(__name__)
B = TypeVar("B", bound=Batch)
Reader = Callable[[Tensor, Tensor, Tensor], Tensor]  # tokens, mask, answer to numbers, [batch] or [batch, time]
ROWS, AMONG = 8, 300  # rows looked at, of so many at the beginning of the data
EXTRA = 7  # columns of padding added
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}  # by type of the weights; half precision has 2 or 3 digits
HALF = 5e-2


@dataclass(frozen=True)
class Check:
    """One property of a stage, measured.

    name: what should hold.
    passed: whether it does.
    measured: what was found.
    limit: what would have been accepted.
    fault: where it does not hold: what is wrong, what it does to training, and what to look at.
    """

    name: str
    passed: bool
    measured: str
    limit: str
    fault: str


class ChecksFailed(UserError):
    """The stage did not prove itself. Exit code 1: nothing is wrong with what was typed."""

    exit_code = 1


# running them


def prove(module: "StageModule", reopen: Callable[["Result"], nn.Module]) -> None:
    """Run a stage's checks and show them as a table.

    Args:
        module: on its device, with trainer, data and models, before its first step.
        reopen: writes a result as a file and opens that again.

    Raises:
        ChecksFailed: one of them failed.
    """
    trainer, started = module.trainer, time.perf_counter()
    with unchanged(module):
        running = track(_all_checks(module, reopen), "checking", total=None, transient=True, disable=not _shown(module))
        checks = list(running)
    seconds = time.perf_counter() - started
    failed = [check for check in checks if not check.passed]
    for check in checks:
        verdict = "passed" if check.passed else "FAILED"
        lines.info("check %s: %s: %s (limit: %s)", verdict, check.name, check.measured, check.limit)
    if trainer.is_global_zero:
        Console().print(table(checks, seconds))
    if trainer.strategy.reduce_boolean_decision(not failed, all=True):
        log.info("%d checks passed in %.1f s", len(checks), seconds)
        return
    faults = "\n".join(f"  {check.name}: {check.measured}\n    {check.fault}" for check in failed)
    raise ChecksFailed(
        f"{len(failed)} of {len(checks)} checks failed, nothing was trained:\n{faults or '  on another device'}",
        "check=false trains all the same",
    )


def _all_checks(module: "StageModule", reopen: Callable[["Result"], nn.Module]) -> Iterator[Check]:
    datamodule = module.trainer.datamodule
    module.eval()
    yield from module.checks(datamodule)
    yield reproduced_after_saving(module, texts_of(few_rows(datamodule), datamodule).to(module.device), reopen)


def _shown(module: "StageModule") -> bool:
    return bool(module.trainer.is_global_zero)


def table(checks: Sequence[Check], seconds: float) -> Table:
    """Names, what was measured and what was allowed; failures stand out."""
    failures = sum(not check.passed for check in checks)
    verdict = f"{failures} failed" if failures else "all passed"
    shown = Table(title=f"check: {len(checks)} properties, {verdict}; {seconds:.1f} s")
    for title in ("", "what should hold", "measured", "limit"):
        shown.add_column(title, overflow="fold")
    for check in checks:
        shown.add_row("ok" if check.passed else "FAILED", check.name, check.measured, check.limit,
                      style="" if check.passed else "bold red")  # fmt: skip
    return shown


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside, afterwards the module and the random state are as they were.

    Kept are the state of every random generator, which parts were in train mode, all buffers (running moments among
    them) and the module's own plain attributes. Weights and gradients are never touched by a check.
    """
    devices = list(range(torch.cuda.device_count()))
    plain, arrays = random.getstate(), numpy.random.get_state()
    modes = {part: part.training for part in module.modules()}
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    inner = vars(nn.Module()).keys()  # the registries of parameters, buffers and parts
    attributes = {name: _copied(value) for name, value in vars(module).items() if name not in inner}
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(plain)
            numpy.random.set_state(arrays)
            for part, training in modes.items():
                part.training = training
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
            vars(module).update(attributes)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value


# what checks work with


def few_rows(datamodule: RecordDataModule) -> list[Any]:
    """The shortest and the longest of the first training rows, shortest first."""
    rows = sorted(datamodule.encoded("train")[:AMONG], key=datamodule.length)
    return rows if len(rows) <= ROWS else [*rows[: ROWS // 2], *rows[-ROWS // 2 :]]


def micro_batches(rows: list[Any], datamodule: RecordDataModule, count: int = 4) -> list[Batch]:
    """The rows as so many batches of unlike length, or fewer where there are fewer rows."""
    size = -(-len(rows) // count)
    return [datamodule.collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def texts_of(rows: list[Any], datamodule: RecordDataModule) -> TextBatch:
    """What rows of any stage say, as one batch of texts; of a prompt, every token but the first counts as answer."""
    batch: Any = datamodule.collate(rows)
    if isinstance(batch, PromptBatch):
        return TextBatch.collate([EncodedAnswer(tokens, 1) for tokens in batch.tokens])
    return batch if isinstance(batch, TextBatch) else batch.texts


def reads_logprobs(policy: Any) -> Reader:
    """Log-probs of a policy, or of one that is frozen."""
    return lambda tokens, mask, answer: policy(tokens, mask, answer).logprobs


def reads_scores(model: Any) -> Reader:
    """Scores of a reward model, or of one that is frozen."""
    return lambda tokens, mask, answer: model(tokens, mask)


def one_precision(module: "StageModule") -> AbstractContextManager[Any]:
    """float32 where the weights are: what is compared then is the arithmetic, not the rounding of mixed precision."""
    return nullcontext() if _dtype(module) in ROUNDING else module.trainer.precision_plugin.forward_context()


def limit_of(module: "StageModule") -> float:
    """Largest difference that rounding explains, relative to 1 + the size of the number."""
    return ROUNDING.get(_dtype(module), HALF)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest ``|found - expected| / (1 + |expected|)``; NaN where either is not a number."""
    if found.shape != expected.shape:
        return float("nan")
    if not found.numel():
        return 0.0
    return float(((found - expected).abs() / (1 + expected.abs())).max())


def loss_of(module: "StageModule", batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """The loss of the stage's own training step, and the numbers it would have logged."""
    numbers: dict[str, Any] = {}
    silenced = {"log": _ignore, "log_dict": _ignore, "log_train": numbers.update}
    vars(module).update(silenced)
    try:
        return module.training_step(batch, 0), numbers
    finally:
        for name in silenced:
            del vars(module)[name]


def _ignore(*args: Any, **keys: Any) -> None:
    """In place of a method that logs."""


def gradient_of(module: "StageModule", batches: Sequence[Batch]) -> tuple[float, list[Tensor]]:
    """Mean loss of some batches, and its gradient: what accumulating over them gives."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    total, sums = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        loss = loss_of(module, batch)[0] / len(batches)
        total += float(loss.detach())
        for whole, part in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if part is not None:
                whole += part
    return total, sums


def gradient_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """``|found - expected| / |expected|``, norms over all parameters together."""
    apart = nn.utils.get_total_norm([one - other for one, other in zip(found, expected, strict=True)])
    return float(apart / nn.utils.get_total_norm(expected).clamp(min=1e-12))


def spoiled(batch: B) -> B:
    """The same batch with other tokens on its padding, and NaN in every number that stands outside the answers."""
    changes: dict[str, Any] = {}
    for part in fields(batch):
        value = getattr(batch, part.name)
        if isinstance(value, Batch):
            changes[part.name] = spoiled(value)
        elif part.name == "tokens" and isinstance(value, Tensor):
            real = value[batch.mask]  # type: ignore[attr-defined]
            others = real.flip(0).repeat(-(-value.numel() // len(real)))[: value.numel()].view_as(value)
            changes["tokens"] = torch.where(batch.mask, value, others)  # type: ignore[attr-defined]
        elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2:
            changes[part.name] = torch.where(batch.answer, value, torch.nan)  # type: ignore[attr-defined]
    return replace(batch, **changes)


# checks of the data


def one_bos(tokenizer: Any, rows: Sequence[Sequence[int]]) -> Check:
    """A text begins with one BOS, where the tokenizer has one and it is used."""
    bos = tokenizer.bos_token_id
    found = sorted({_leading(row, bos) for row in rows})
    wanted = bos is not None and list(tokenizer("x")["input_ids"])[:1] == [bos]
    return Check(
        "a text begins with one BOS",
        found == [1] or (found == [0] and not wanted),
        "the tokenizer has no BOS" if bos is None else f"BOS at the beginning: {', '.join(map(str, found))}",
        "1" if wanted else "1, or 0 where neither tokenizer nor template writes it",
        f"models are trained on texts that begin with one {tokenizer.bos_token!r}: the template and the tokenizer both "
        "write it, or neither does; see the chat template and data.template",
    )


def _leading(row: Sequence[int], token: int | None) -> int:
    return next((place for place, one in enumerate(row) if one != token), len(row))


def ends_in_eos(tokenizer: Any, texts: TextBatch, max_length: int) -> Check:
    """An answer ends in EOS, unless it was cut at ``max_length`` tokens."""
    closed, cut = _closed(texts.tokens, texts.mask, tokenizer.eos_token_id, max_length)
    return Check(
        "every answer ends in EOS",
        bool((closed | cut).all()),
        f"{int(closed.sum())} of {len(closed)} end in EOS, {int((cut & ~closed).sum())} were cut",
        "all that were not cut",
        f"answers without {tokenizer.eos_token!r} teach a model never to end: see the chat template and data.template",
    )


def _closed(tokens: Tensor, mask: Tensor, eos: int, max_length: int) -> tuple[Tensor, Tensor]:
    """Which rows end in EOS, and which are as long as a text may be: [batch] bool each."""
    rows = torch.arange(len(tokens), device=tokens.device)
    return tokens[rows, last_true(mask)] == eos, mask.sum(dim=1) >= max_length


def eos_carries_loss(module: "StageModule", policy: Policy, batch: Batch, max_length: int) -> Check:
    """The loss of the stage's training step depends on the log-prob of every closing EOS.

    Args:
        policy: the part that is trained; what it says of the tokens is watched as the loss is computed.
        max_length: tokens; longer texts were cut and need not end in EOS.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(part: nn.Module, inputs: Any, scores: Any) -> None:
        seen.append((inputs[0], inputs[1], scores.logprobs))

    hook = policy.register_forward_hook(note)
    try:
        with one_precision(module):
            loss = loss_of(module, batch)[0]
    finally:
        hook.remove()
    slopes = torch.autograd.grad(loss, [logprobs for _, _, logprobs in seen])
    ended = learned = missing = 0
    for (tokens, mask, _), slope in zip(seen, slopes, strict=True):
        closed, cut = _closed(tokens, mask, module.tokenizer.eos_token_id, max_length)
        at_end = slope[torch.arange(len(tokens), device=tokens.device), last_true(mask)]
        ended += int(closed.sum())
        learned += int((closed & (at_end != 0)).sum())
        missing += int((~closed & ~cut).sum())
    return Check(
        "EOS carries loss",
        ended == learned and not missing,
        f"EOS counts in {learned} of {ended} answers that end in it; {missing} whole answers have none",
        "all",
        "the policy never learns to end an answer: EOS is missing from the text or masked out of the loss, as happens "
        "where pad = eos and padding is found by its token id; masks have to say where padding is",
    )


# checks of models


def same_whatever_the_padding(
    module: "StageModule", what: str, read: Reader, texts: TextBatch, model: Any
) -> Iterator[Check]:
    """A text gets the same numbers alone, among others, with more padding, and with padding left or right of it.

    Args:
        what: name of the numbers, such as ``log-probs of the policy``.
        read: takes them.
        texts: [batch, time]; of unlike length.
        model: whose configuration says how long a text may be.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    extra = EXTRA if longest is None else max(min(EXTRA, longest - texts.tokens.shape[1]), 0)
    wide = _widened(texts, extra)
    views = {"in a batch": texts, "more padding": wide, "padding left": _left(wide)}
    with torch.no_grad(), one_precision(module):
        alone = torch.cat([_of_answers(read, text) for text in _one_by_one(texts)])
        apart = {name: difference(_of_answers(read, view), alone) for name, view in views.items()}
        garbage = difference(_of_answers(read, spoiled(wide)), _of_answers(read, wide))
    limit = limit_of(module)
    bad = [name for name, value in apart.items() if not value <= limit]
    yield Check(
        f"{what}: a text alone = among others, however padded",
        not bad,
        ", ".join(f"{name} {value:.1e}" for name, value in apart.items()),
        f"{limit:.0e}, relative",
        f"padding or neighbours leak into the numbers ({', '.join(bad)}): positions, mask or state count padding as "
        "text; they have to go through rlhf.models.hidden_states",
    )
    yield Check(
        f"{what}: other tokens on padding change nothing",
        garbage <= limit,
        f"difference {garbage:.1e}",
        f"{limit:.0e}, relative",
        "the model reads what stands on padding: it needs a causal body, and a mask that does not depend on token ids",
    )


def _of_answers(read: Reader, texts: TextBatch) -> Tensor:
    """The numbers of the answers' tokens, or of the texts: [tokens] or [batch]."""
    found = read(texts.tokens, texts.mask, texts.answer)
    return found[texts.answer] if found.ndim == 2 else found


def _one_by_one(texts: TextBatch) -> Iterator[TextBatch]:
    for row, length in enumerate(texts.mask.sum(dim=1).tolist()):
        tokens, mask, answer = (part[row : row + 1, :length] for part in (texts.tokens, texts.mask, texts.answer))
        yield TextBatch(tokens, mask, answer)


def _widened(texts: TextBatch, columns: int) -> TextBatch:
    tokens, mask, answer = (F.pad(part, (0, columns)) for part in (texts.tokens, texts.mask, texts.answer))
    return TextBatch(tokens, mask, answer)


def _left(texts: TextBatch) -> TextBatch:
    """The same texts, padded on the left."""
    time = texts.tokens.shape[1]
    shift = time - texts.mask.sum(dim=1, keepdim=True)
    place = (torch.arange(time, device=shift.device) - shift) % time
    tokens, mask, answer = (part.gather(1, place) for part in (texts.tokens, texts.mask, texts.answer))
    return TextBatch(tokens, mask, answer)


def no_dropout(module: "StageModule", what: str, model: nn.Module, read: Reader, texts: TextBatch) -> Check:
    """Train and eval mode of a model give the same numbers."""
    modes = {part: part.training for part in model.modules()}
    with torch.no_grad(), one_precision(module):
        model.eval()
        expected = _of_answers(read, texts)
        model.train()
        apart = difference(_of_answers(read, texts), expected)
    for part, training in modes.items():
        part.training = training
    drops = nn.modules.dropout._DropoutNd
    left_on = [f"{name} {part.p:g}" for name, part in model.named_modules() if isinstance(part, drops) and part.p > 0]
    return Check(
        f"no dropout in the {what}",
        apart <= limit_of(module) and not left_on,
        f"train and eval mode differ by {apart:.1e}; {len(left_on)} dropouts above 0",
        f"{limit_of(module):.0e}, relative; 0",
        "dropout is on, so the same text gets other numbers each time and ratios and rewards are noise; "
        f"rlhf.models.switch_off_dropout sets it to 0 ({', '.join(left_on[:3]) or 'in the configuration'})",
    )


def frozen_parts(module: "StageModule") -> Check:
    """References and reward models stay in eval mode, have no gradient and share no weights with what learns."""
    module.train()
    trained = {parameter.data_ptr() for parameter in module.parameters()}
    faults, count = [], 0
    for name, part in module.named_modules():
        if isinstance(part, Frozen):
            count += 1
            if any(inner.training for inner in part.model.modules()):
                faults.append(f"{name} is in train mode")
            if any(weight.requires_grad or weight.grad is not None for weight in part.model.parameters()):
                faults.append(f"{name} has a gradient")
            if any(weight.data_ptr() in trained for weight in part.model.parameters()):
                faults.append(f"{name} shares weights with what is trained")
    module.eval()
    return Check(
        "frozen models stay frozen",
        not faults and count > 0,
        ", ".join(faults) or f"{count} in eval mode, without gradient, with weights of their own",
        "all",
        "what answers are measured by would move with the policy: hold such a model in rlhf.models.Frozen, opened anew",
    )


# checks of the loss


def padding_reaches_no_loss(module: "StageModule", batch: Batch) -> Check:
    """Other tokens and NaN on padding change neither the loss of the training step nor its gradient."""
    with one_precision(module):
        loss, gradient = gradient_of(module, [batch])
        spoiled_loss, spoiled_gradient = gradient_of(module, [spoiled(batch)])
    apart = difference(torch.tensor(spoiled_loss), torch.tensor(loss))
    slope = gradient_difference(spoiled_gradient, gradient)
    limit = limit_of(module)
    return Check(
        "garbage on padding changes neither loss nor gradient",
        apart <= limit and slope <= limit,
        f"loss {apart:.1e}, gradient {slope:.1e}",
        f"{limit:.0e}, relative",
        "what stands on padding is learned from: mask before exp, log and means (nan * 0 is nan), see rlhf.tensors",
    )


def accumulation_is_the_big_batch(module: "StageModule", whole: Batch, parts: list[Batch]) -> Check:
    """Micro-batches of unlike length, each with its share, give the gradient of all rows in one batch."""
    shared = [part.to(module.device) for part in weighed(iter(parts), len(parts))]
    with one_precision(module):
        loss, gradient = gradient_of(module, [whole])
        parts_loss, parts_gradient = gradient_of(module, shared)
    apart = difference(torch.tensor(parts_loss), torch.tensor(loss))
    slope = gradient_difference(parts_gradient, gradient)
    limit = limit_of(module)
    return Check(
        f"gradient of {len(parts)} micro-batches = gradient of one batch",
        apart <= limit and slope <= limit,
        f"loss {apart:.1e}, gradient {slope:.1e}",
        f"{limit:.0e}, relative",
        "trainer.accumulate_grad_batches would train something else: the loss has to be a mean over Batch.loss_terms, "
        "and training_step has to return loss x batch.share",
    )


# checks of what is left behind


def reproduced_after_saving(module: "StageModule", texts: TextBatch, reopen: Callable[["Result"], nn.Module]) -> Check:
    """The result, written as a file and opened again, says the same of the same texts."""
    result = module.result()
    scalar = isinstance(result.model, ScalarModel)
    what = "scores" if scalar else "log-probs"
    try:
        opened, fault = reopen(result), ""
    except Exception as error:  # whatever goes wrong there is what this check is for
        opened, fault = None, " ".join(str(error).split())
    apart = float("nan")
    if opened is not None:
        models = (result.model, opened.to(module.device).eval())
        readers = [reads_scores(model) if scalar else reads_logprobs(Policy(model)) for model in models]
        with torch.no_grad(), one_precision(module):
            before, after = (_of_answers(read, texts) for read in readers)
        apart = difference(after, before)
    limit = limit_of(module)
    return Check(
        f"{what} reproduced after saving and opening",
        apart <= limit,
        f"difference {apart:.1e}" if not fault else f"it cannot be opened: {fault}",
        f"{limit:.0e}, relative",
        "what would be left behind is not what was trained: weights (the reward head?) are missing from the file or "
        "changed on the way; see rlhf/export.py",
    )
