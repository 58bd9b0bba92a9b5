"""The properties that stages have in common, one function each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.data import Batch, SequenceBatch
from rlhf.data.loader import with_loss_weights
from rlhf.models import Frozen, Policy, ScalarModel
from rlhf.preflight.measurements import (
    Measure,
    alone,
    corrupt_padding,
    difference,
    full_precision,
    gradient_difference,
    left_padded,
    limit_of,
    logprob_measure,
    pad_columns,
    response_values,
    score_measure,
    training_gradient,
    training_loss,
)
from rlhf.tensors import last_true

if TYPE_CHECKING:
    from rlhf.stage import Result, StageModule

EXTRA = 7  # columns of padding added


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


# of the data


def check_single_bos(tokenizer: Any, rows: Sequence[Sequence[int]]) -> Check:
    """A text begins with one BOS, where the tokenizer has one and it is used.

    Args:
        rows: token ids of each text, without padding.
    """
    bos = tokenizer.bos_token_id
    found = sorted({_leading(row, bos) for row in rows})
    wanted = bos is not None and list(tokenizer("x")["input_ids"])[:1] == [bos]
    return Check(
        "a text begins with one BOS",
        found == [1] or (found == [0] and not wanted),
        "the tokenizer has no BOS" if bos is None else f"BOS at the beginning: {', '.join(map(str, found))}",
        "1" if wanted else "1, or 0 in all",
        f"models are trained on texts that begin with one {tokenizer.bos_token!r}: the template and the tokenizer both "
        "write it, or neither does; see the chat template and data.template",
    )


def _leading(row: Sequence[int], token: int | None) -> int:
    return next((place for place, one in enumerate(row) if one != token), len(row))


def check_ends_with_eos(tokenizer: Any, texts: SequenceBatch, max_length: int) -> Check:
    """An answer ends in EOS, unless it was cut at ``max_length`` tokens."""
    closed, cut = _closed(texts.input_ids, texts.attention_mask, tokenizer.eos_token_id, max_length)
    return Check(
        "every answer ends in EOS",
        bool((closed | cut).all()),
        f"{int(closed.sum())} of {len(closed)} end in EOS, {int((cut & ~closed).sum())} were cut",
        "all that were not cut",
        f"answers without {tokenizer.eos_token!r} teach a model never to end: see the chat template and data.template",
    )


def _closed(input_ids: Tensor, attention_mask: Tensor, eos: int, max_length: int) -> tuple[Tensor, Tensor]:
    """Which rows end in EOS, and which are as long as a text may be: [batch] bool each."""
    rows = torch.arange(len(input_ids), device=input_ids.device)
    return input_ids[rows, last_true(attention_mask)] == eos, attention_mask.sum(dim=1) >= max_length


def check_eos_in_loss(module: "StageModule", policy: Policy, batch: Batch, max_length: int) -> Check:
    """The loss of the stage's training step depends on the log-prob of every closing EOS.

    Args:
        policy: the part that is trained; what it says of the tokens is watched as the loss is computed.
        max_length: tokens; longer texts were cut and need not end in EOS.
    """
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def note(part: nn.Module, inputs: Any, scores: Any) -> None:
        if scores.logprobs.requires_grad:
            seen.append((*inputs[:3], scores.logprobs))

    hook = policy.register_forward_hook(note)
    try:
        with full_precision(module):
            loss = training_loss(module, batch)[0]
    finally:
        hook.remove()
    slopes = torch.autograd.grad(loss, [logprobs for *_, logprobs in seen], materialize_grads=True)
    ended = learned = missing = 0
    for (input_ids, attention_mask, response_mask, _), slope in zip(seen, slopes, strict=True):
        closed, cut = _closed(input_ids, attention_mask, module.tokenizer.eos_token_id, max_length)
        at_end = (response_mask & (slope != 0))[
            torch.arange(len(input_ids), device=input_ids.device), last_true(attention_mask)
        ]
        ended += int(closed.sum())
        learned += int((closed & at_end).sum())
        missing += int((~closed & ~cut).sum())
    return Check(
        "EOS carries loss",
        ended == learned and not missing,
        f"in {learned} of {ended} answers that end in EOS; {missing} whole answers have none",
        "all",
        "the policy never learns to end an answer: EOS is missing from the text or masked out of the loss, as happens "
        "where pad = eos and padding is found by its token id; masks have to say where padding is",
    )


# of models


def check_padding_invariance(
    module: "StageModule", what: str, read: Measure, texts: SequenceBatch, model: Any
) -> Iterator[Check]:
    """A text gets the same numbers alone, among others, with more padding, and with padding left or right of it.

    Args:
        what: name of the numbers, such as ``log-probs of the policy``.
        read: takes them.
        texts: [batch, time]; of unlike length.
        model: whose configuration says how long a text may be.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    extra = EXTRA if longest is None else max(min(EXTRA, longest - texts.input_ids.shape[1]), 0)
    wide = pad_columns(texts, extra)
    views = {"in a batch": texts, "more padding": wide, "padding left": left_padded(wide)}
    with torch.no_grad(), full_precision(module):
        expected = torch.cat([response_values(read, text) for text in alone(texts)])
        apart = {name: difference(response_values(read, view), expected) for name, view in views.items()}
        garbage = difference(response_values(read, corrupt_padding(wide)), response_values(read, wide))
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


def check_no_dropout(module: "StageModule", what: str, model: nn.Module, read: Measure, texts: SequenceBatch) -> Check:
    """Train and eval mode of a model give the same numbers."""
    modes = {part: part.training for part in model.modules()}
    with torch.no_grad(), full_precision(module):
        model.eval()
        expected = response_values(read, texts)
        model.train()
        apart = difference(response_values(read, texts), expected)
    for part, training in modes.items():
        part.training = training
    drops = nn.modules.dropout._DropoutNd
    left_on = [f"{name} {part.p:g}" for name, part in model.named_modules() if isinstance(part, drops) and part.p > 0]
    return Check(
        f"no dropout in the {what}",
        apart <= limit_of(module) and not left_on,
        f"train and eval mode differ by {apart:.1e}; dropouts above 0: {len(left_on)}",
        f"{limit_of(module):.0e}, relative; none",
        "dropout is on, so the same text gets other numbers each time and ratios and rewards are noise; "
        f"rlhf.models.disable_dropout sets it to 0 ({', '.join(left_on[:3]) or 'in the configuration'})",
    )


def check_frozen_models(module: "StageModule") -> Check:
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


# of the loss


def check_padding_is_ignored(module: "StageModule", batch: Batch) -> Check:
    """Other tokens and NaN on padding change neither the loss of the training step nor its gradient."""
    with full_precision(module):
        loss, gradient = training_gradient(module, [batch])
        spoiled_loss, spoiled_gradient = training_gradient(module, [corrupt_padding(batch)])
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


def check_accumulation_equivalence(module: "StageModule", whole: Batch, parts: list[Batch]) -> Check:
    """Micro-batches of unlike length, each with its share, give the gradient of all rows in one batch."""
    shared = [part.to(module.device) for part in with_loss_weights(iter(parts), len(parts))]
    with full_precision(module):
        loss, gradient = training_gradient(module, [whole])
        parts_loss, parts_gradient = training_gradient(module, shared)
    apart = difference(torch.tensor(parts_loss), torch.tensor(loss))
    slope = gradient_difference(parts_gradient, gradient)
    limit = limit_of(module)
    return Check(
        f"gradient of {len(parts)} micro-batches = gradient of one batch",
        apart <= limit and slope <= limit,
        f"loss {apart:.1e}, gradient {slope:.1e}",
        f"{limit:.0e}, relative",
        "trainer.accumulate_grad_batches would train something else: the loss has to be a mean over Batch.loss_terms, "
        "and training_step has to return loss x batch.loss_weight",
    )


# of what is left behind


def check_reload(module: "StageModule", texts: SequenceBatch, reopen: Callable[["Result"], nn.Module]) -> Check:
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
        readers = [score_measure(model) if scalar else logprob_measure(Policy(model)) for model in models]
        with torch.no_grad(), full_precision(module):
            before, after = (response_values(read, texts) for read in readers)
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
