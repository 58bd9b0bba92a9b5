"""Hidden states of two models that compute at the same time on the CPU, each with half of the threads.

The operations of small models are too short to keep all threads busy: threads wait for each other after every
operation, and for Python in between.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from rlhf.models.checkpointing import recomputes_layers
from rlhf.models.probes import has_active_dropout
from rlhf.models.trunk import states_before
from rlhf.speed import speed_settings
from rlhf.tensors import true_positions

Parameters = list[nn.Parameter]


def can_compute_concurrently(*trunks: Any) -> bool:
    """Return whether ``concurrent_states`` can compute any two of these models.

    Models with active dropout and models that checkpoint gradients use the random state of the process, and FSDP needs
    all ranks to gather parameters in the same order.

    Args:
        trunks: Models of transformers, without output layers.
    """
    if not speed_settings().concurrent_models or torch.get_num_threads() < 2:
        return False
    if not all(parameter.is_cpu for trunk in trunks for parameter in trunk.parameters()):
        return False
    parts = [part for trunk in trunks for part in trunk.modules()]
    # Packed rows change the configuration during a forward pass.
    configs = {id(trunk.config.get_text_config()) for trunk in trunks}
    if len(set(parts)) < len(parts) or len(configs) < len(trunks):
        return False
    is_sharded = any(isinstance(part, FSDPModule) for part in parts)
    return not is_sharded and not any(has_active_dropout(trunk) or recomputes_layers(trunk) for trunk in trunks)


def concurrent_states(
    trunks: tuple[nn.Module, nn.Module],
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    response_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the states from which two models predict the response tokens, at the same time.

    The backward pass computes the gradients of both models at the same time as well.

    Args:
        trunks: Models of which ``can_compute_concurrently`` is true, without output layers.
        input_ids: [batch, time] token ids.
        attention_mask: [batch, time] bool, True on real tokens.
        response_mask: [batch, time] bool, True on response tokens.
        response_tokens: Number of True entries of ``response_mask``. None: they are counted.

    Returns:
        [response tokens, width] states of each model, row by row.
    """
    positions = true_positions(response_mask, response_tokens)
    forward = [partial(states_before, trunk, input_ids, attention_mask, positions) for trunk in trunks]
    parameters = [[p for p in trunk.parameters() if p.requires_grad] for trunk in trunks]
    if not torch.is_grad_enabled():
        return _run_both(*forward)
    first, second = _ConcurrentStates.apply(forward, parameters, *parameters[0], *parameters[1])  # type: ignore[no-untyped-call]
    return first, second


class _ConcurrentStates(torch.autograd.Function):
    """States of two models, with the gradients of their parameters."""

    @staticmethod
    def forward(
        ctx: Any, forward: Sequence[Callable[[], Tensor]], parameters: Sequence[Parameters], *flat: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            ctx.states = _run_both(*forward)
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        first, second = (states.detach() for states in ctx.states)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        backward = [
            partial(_gradients, *arguments) for arguments in zip(ctx.states, ctx.parameters, gradients, strict=True)
        ]
        first, second = _run_both(*backward)
        return None, None, *first, *second


def _gradients(states: Tensor, parameters: Parameters, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None or not parameters:
        return (None,) * len(parameters)
    return torch.autograd.grad(states, parameters, gradient, allow_unused=True)


def _run_both(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the results of two functions, of which another thread calls the second one."""
    threads = torch.get_num_threads()
    future: Future[Any] = _executor(os.getpid()).submit(copy_context().run, _in_state_of_caller(second, threads // 2))
    torch.set_num_threads(threads // 2)
    try:
        result = first()
    finally:
        wait([future])
        torch.set_num_threads(threads)
    return result, future.result()


def _in_state_of_caller(function: Callable[[], Any], threads: int) -> Callable[[], Any]:
    """Return a function for another thread, with the settings that PyTorch keeps for each thread."""
    enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = torch.autocast("cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))

    def call() -> Any:
        torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.set_grad_enabled(enabled), autocast:
            return function()

    return call


@cache
def _executor(process: int) -> ThreadPoolExecutor:
    """Return the thread of a process. A process that was forked does not have the thread of its parent."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlhf-concurrent")
