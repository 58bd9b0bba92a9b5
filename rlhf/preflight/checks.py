"""Pre-flight checks of models, losses and results that several stages use, one function per property."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rlhf.data import Batch, SequenceBatch
from rlhf.data.loader import with_loss_weights
from rlhf.models import Frozen, Policy, ScalarModel, gathered, local_tensor
from rlhf.preflight.measurements import (
    Gradient,
    Measure,
    corrupt_padding,
    full_precision,
    full_precision_gradient,
    gradient_difference,
    logprob_measure,
    one_at_a_time,
    pad_columns,
    pad_left,
    relative_difference,
    response_values,
    score_measure,
    tolerance,
)
from rlhf.stage import Result, StageModule
from rlhf.stage.check import Check

EXTRA_COLUMNS = 7  # Columns of padding that the padding checks add.


# Checks of the models


def check_padding_invariance(
    module: StageModule, name: str, measure: Measure, batch: SequenceBatch, model: Any
) -> Iterator[Check]:
    """Check that values depend neither on padding, left or right, nor on the other sequences of the batch.

    Args:
        module: The stage.
        name: What is measured, such as ``log-probs``.
        measure: Computes the values.
        batch: Sequences of different lengths.
        model: The model whose configuration limits the length of a sequence.
    """
    max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    free = EXTRA_COLUMNS if max_length is None else max_length - batch.input_ids.shape[1]
    padded = pad_columns(batch, max(min(EXTRA_COLUMNS, free), 0))
    views = {"in a batch": batch, "more padding": padded, "padding on the left": pad_left(padded)}
    with torch.no_grad(), full_precision(module):
        expected = torch.cat([response_values(measure, row) for row in one_at_a_time(batch)])
        values = {view: response_values(measure, views[view]) for view in views}
        corrupted = response_values(measure, corrupt_padding(padded))
    differences = {view: relative_difference(values[view], expected) for view in views}
    difference = relative_difference(corrupted, values["more padding"])
    limit = tolerance(module)
    failed = [view for view, value in differences.items() if not value <= limit]
    yield Check(
        f"{name} do not depend on padding or on other sequences",
        not failed,
        ", ".join(f"{view} {value:.1e}" for view, value in differences.items()),
        f"{limit:.0e}, relative",
        f"Padding or other sequences affect the values ({', '.join(failed)}): positions, attention mask or recurrent "
        "state include padding. Compute hidden states with rlhf.models.hidden_states.",
    )
    yield Check(
        f"{name} do not depend on the token ids of padding",
        difference <= limit,
        f"difference {difference:.1e}",
        f"{limit:.0e}, relative",
        "The model reads padding tokens. It needs a causal trunk, and an attention mask that does not depend on token "
        "ids.",
    )


def check_no_dropout(module: StageModule, name: str, model: nn.Module, measure: Measure, batch: SequenceBatch) -> Check:
    """Check that a model computes the same values in train and in eval mode.

    Args:
        module: The stage.
        name: Name of the model.
        model: The model.
        measure: Computes values with it.
        batch: Sequences to compute them for.
    """
    modes = {part: part.training for part in model.modules()}
    with torch.no_grad(), full_precision(module):
        model.eval()
        expected = response_values(measure, batch)
        model.train()
        difference = relative_difference(response_values(measure, batch), expected)
    for part, training in modes.items():
        part.training = training
    dropout = nn.modules.dropout._DropoutNd
    active = [f"{key} {part.p:g}" for key, part in model.named_modules() if isinstance(part, dropout) and part.p > 0]
    return Check(
        f"no dropout in the {name}",
        difference <= tolerance(module) and not active,
        f"train and eval mode differ by {difference:.1e}; dropout layers with p > 0: {len(active)}",
        f"{tolerance(module):.0e}, relative; none",
        "Dropout changes the values of a sequence from one call to the next, which makes ratios and rewards noisy. "
        f"rlhf.models.disable_dropout turns it off ({', '.join(active[:3]) or 'the model applies it by itself'}).",
    )


def check_frozen_models(module: StageModule) -> Check:
    """Check that reference and reward models stay in eval mode, have no gradients and share no trained weights."""
    module.train()
    # Address 0 is that of an empty shard.
    trained = {_address(parameter) for parameter in module.parameters() if parameter.requires_grad} - {0}
    faults, count = [], 0
    for name, part in module.named_modules():
        if isinstance(part, Frozen):
            count += 1
            model: nn.Module = part.model
            if any(inner.training for inner in model.modules()):
                faults.append(f"{name} is in train mode")
            if any(weight.requires_grad or weight.grad is not None for weight in model.parameters()):
                faults.append(f"{name} has gradients")
            if any(_address(weight) in trained for weight in model.parameters()):
                faults.append(f"{name} shares weights with a trained model")
    module.eval()
    return Check(
        "frozen models stay frozen",
        not faults and count > 0,
        ", ".join(faults) or f"{count} in eval mode, without gradients and without trained weights",
        "all",
        "Reference and reward models must not change with the policy. Open a separate copy and wrap it in "
        "rlhf.models.Frozen.",
    )


def _address(parameter: nn.Parameter) -> int:
    return local_tensor(parameter).data_ptr()


# Checks of the loss


def check_padding_is_ignored(module: StageModule, batch: Batch, expected: Gradient | None = None) -> Check:
    """Check that other tokens and NaN in the padding change neither the training loss nor its gradient.

    Args:
        module: The stage.
        batch: A training batch.
        expected: ``full_precision_gradient`` of the batch, if another check needs it as well.
    """
    expected = expected or full_precision_gradient(module, [batch])
    return _same_gradient(
        module,
        "loss and gradient do not depend on padding",
        full_precision_gradient(module, [corrupt_padding(batch)]),
        expected,
        "Training learns from padding. Mask values before exp, log and means, because nan * 0 is nan; see "
        "rlhf.tensors.",
    )


def check_accumulation_equivalence(
    module: StageModule, batch: Batch, micro_batches: list[Batch], expected: Gradient | None = None
) -> Check:
    """Check that accumulating over micro-batches of different lengths gives the gradient of one large batch.

    Args:
        module: The stage.
        batch: All rows in one batch.
        micro_batches: The same rows in several batches.
        expected: ``full_precision_gradient`` of the batch, if another check needs it as well.
    """
    expected = expected or full_precision_gradient(module, [batch])
    weighted = [part.to(module.device) for part in with_loss_weights(iter(micro_batches), len(micro_batches))]
    return _same_gradient(
        module,
        f"accumulating {len(micro_batches)} micro-batches gives the gradient of one batch",
        full_precision_gradient(module, weighted),
        expected,
        "trainer.accumulate_grad_batches would train a different objective. The loss must be a mean over "
        "Batch.loss_terms, and training_loss must return it multiplied by batch.loss_weight.",
    )


def _same_gradient(
    module: StageModule,
    name: str,
    actual: Gradient,
    expected: Gradient,
    fault: str,
) -> Check:
    loss = relative_difference(torch.tensor(actual[0]), torch.tensor(expected[0]))
    gradient = gradient_difference(actual[1], expected[1])
    limit = tolerance(module)
    measured = f"loss {loss:.1e}, gradient {gradient:.1e}"
    return Check(name, loss <= limit and gradient <= limit, measured, f"{limit:.0e}, relative", fault)


# Checks of the result


def check_reload(module: StageModule, batch: SequenceBatch, reload: Callable[[Result], nn.Module]) -> Check:
    """Check that saving and reloading the result reproduces its outputs.

    Args:
        module: The stage.
        batch: Sequences to compare the outputs for.
        reload: Saves a result to a file and returns the model that is loaded from it.
    """
    result = module.result()
    scalar = isinstance(result.model, ScalarModel)
    difference, error_message = float("nan"), ""
    try:
        loaded = reload(result)
    except Exception as error:  # Any error means that the result could not be used later.
        error_message = " ".join(str(error).split())
    else:
        models: Any = (result.model, loaded.to(module.device).eval())
        with gathered(result.model), torch.no_grad(), full_precision(module):
            measures = [score_measure(model) if scalar else logprob_measure(Policy(model)) for model in models]
            expected, actual = (response_values(measure, batch) for measure in measures)
        difference = relative_difference(actual, expected)
    limit = tolerance(module)
    return Check(
        f"{'scores' if scalar else 'log-probs'} are reproduced after saving and loading",
        difference <= limit,
        f"loading fails: {error_message}" if error_message else f"difference {difference:.1e}",
        f"{limit:.0e}, relative",
        "The exported file would not contain the trained model: weights, such as those of the reward head, are missing "
        "or changed. See rlhf/export/file.py.",
    )
