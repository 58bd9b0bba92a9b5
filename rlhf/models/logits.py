"""How a language model computes logits from its last hidden states, and how they are computed in chunks of tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.errors import ConfigError
from rlhf.models.probes import FAILURES, once_per_architecture, probing

LOGIT_CHUNK_BYTES = 256 * 2**20  # float32 logits of at most this size are computed at once, to save memory
# On a CPU, larger logits are computed in chunks of this size. The heap fragments more with larger ones.
CPU_CHUNK_BYTES = 128 * 2**20

# Attributes of a transformers configuration that change the logits after the output embedding. The same attribute is a
# factor in one architecture and a divisor in another.
SCALE_ATTRIBUTES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CAP_ATTRIBUTES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

NO_TRUNK = "Its output embedding cannot be separated from its base model"


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its output embedding: logits = cap * tanh(scale * x / cap).

    Args:
        scale: Factor of the logits, dimensionless.
        cap: Largest absolute value of the logits (Gemma Team 2024, section 2, arXiv:2408.00118). None: no cap.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits of any shape."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@once_per_architecture
def find_logit_transform(lm: PreTrainedModel) -> LogitTransform:
    """Find how a model computes its logits, from its configuration and two short forward passes.

    Raises:
        ConfigError: The architecture is not supported: its logits cannot be computed from its last hidden states, or
            rows cannot be removed from its cache.
    """
    try:
        with probing(lm):
            return _probe(lm)
    except ConfigError:
        raise
    except FAILURES as error:
        raise unsupported_architecture(lm, f"A forward pass fails ({type(error).__name__}: {error})") from error


def _probe(lm: PreTrainedModel) -> LogitTransform:
    """Compare the logits of two tokens with those of every transform that the configuration may mean."""
    embedding = _output_embedding(lm)
    if lm.base_model is lm:
        raise unsupported_architecture(lm, NO_TRUNK)
    input_ids = torch.arange(2, device=lm.device).repeat(2, 1)
    inputs: list[Tensor] = []
    # The logits of an untrained model are too small to show a cap, so the model transforms these numbers instead.
    numbers = torch.linspace(-100, 100, int(embedding.weight.shape[0]), device=lm.device)

    def replace_logits(module: object, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        inputs.append(arguments[0])
        return numbers.to(logits.dtype).expand_as(logits)

    with embedding.register_forward_hook(replace_logits):
        output: Any = lm(input_ids=input_ids, use_cache=True)
    _check_cache(lm, output)
    hidden = lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    if len(inputs) != 1 or not _close(inputs[0], hidden):
        raise unsupported_architecture(
            lm, "Its output embedding is not applied to the last hidden states of its base model"
        )
    for transform in _candidates(lm):
        if _close(transform(numbers), output.logits[0, -1]):
            return transform
    raise unsupported_architecture(lm, "It scales or caps its logits in an unknown way")


def _output_embedding(lm: PreTrainedModel) -> Any:
    embedding: Any = lm.get_output_embeddings()
    if embedding is None:
        raise unsupported_architecture(lm, "It has no output embedding")
    return embedding


def state_width(lm: PreTrainedModel) -> int:
    """Return the width of the last hidden states of a language model: that of its output embedding.

    ``hidden_size`` differs from it in models that project their last hidden states, such as OPT-350M.

    Raises:
        ConfigError: The model has no output embedding.
    """
    return int(_output_embedding(lm).weight.shape[1])


def cache_name(lm: PreTrainedModel) -> str:
    """Return the name of the argument and of the output of a language model that is its cache.

    Before version 5.24 of transformers, a recurrent state and a cache of keys and values had different names.
    """
    arguments = signature(lm.forward).parameters
    return next((name for name in ("cache", "cache_params") if name in arguments), "past_key_values")


def _check_cache(lm: PreTrainedModel, output: Any) -> None:
    """Raise an error if the sampler could not remove finished rows from the cache of a model and then decode on."""
    name = cache_name(lm)
    cache = getattr(output, name, None)
    first_row = torch.zeros(1, dtype=torch.long, device=lm.device)
    try:
        cache.reorder_cache(first_row)  # type: ignore[union-attr]
        lm(input_ids=first_row[None], use_cache=True, **{name: cache})
    except FAILURES as error:
        raise unsupported_architecture(lm, "Finished responses cannot be removed from its cache") from error


def _close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding errors of any precision. NaN equals NaN."""
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    return bool((found - expected).abs().max() <= 0.01 * expected.abs().max())


def _candidates(lm: PreTrainedModel) -> Iterator[LogitTransform]:
    """Yield the transforms that the configuration may mean, the simplest one first."""
    scales, caps = _numbers(lm, SCALE_ATTRIBUTES), _numbers(lm, CAP_ATTRIBUTES)
    for cap, scale in product([None, *caps], [1.0, *scales, *(1 / scale for scale in scales)]):
        yield LogitTransform(scale, cap)


def _numbers(lm: PreTrainedModel, names: tuple[str, ...]) -> list[float]:
    """Return the attributes of the configuration that are numbers other than 0."""
    values = [getattr(lm.config.get_text_config(), name, None) for name in names]
    return [float(value) for value in values if isinstance(value, int | float) and value]


def unsupported_architecture(lm: nn.Module, reason: str) -> ConfigError:
    """Return the error for a model whose architecture is not supported.

    Args:
        lm: The model.
        reason: A sentence without its full stop.
    """
    return ConfigError(
        f"The architecture {type(lm).__name__} is not supported. {reason}.",
        "Set model=pretrained model.path=<path> to a model of an architecture that docs/architectures.md lists as "
        "supported.",
    )


def chunk_size(vocab_size: int, max_bytes: int | None = None) -> int:
    """Return the number of tokens whose logits are computed at once.

    Args:
        vocab_size: Number of logits per token.
        max_bytes: Largest size of these logits. None: ``LOGIT_CHUNK_BYTES``.
    """
    return max(1, (max_bytes or LOGIT_CHUNK_BYTES) // (4 * vocab_size))


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], vocab_size: int
) -> tuple[Tensor, ...]:
    """Apply a function that computes logits to a few tokens at a time, and concatenate its results.

    With more than one chunk, the backward pass computes the logits of each chunk again instead of storing them.

    Args:
        function: Maps chunks of ``rows`` to tensors with one entry per token.
        rows: Tensors with one row per token.
        vocab_size: Number of logits per token.
    """
    size = chunk_size(vocab_size)
    if len(rows[0]) > size:
        if rows[0].is_cpu:
            size = min(size, chunk_size(vocab_size, CPU_CHUNK_BYTES))
        if torch.is_grad_enabled():
            function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    chunks = [function(*(tensor[i : i + size] for tensor in rows)) for i in range(0, max(len(rows[0]), 1), size)]
    return tuple(torch.cat(values) for values in zip(*chunks, strict=True))
