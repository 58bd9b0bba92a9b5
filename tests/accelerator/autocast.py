"""``torch.autocast("emu")``, which casts the operations that CUDA casts."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from accelerator.nested import map_values, values_of

KEY = "AutocastPrivateUse1"
# The lists of CUDA in aten/src/ATen/autocast_mode.h, without the operations that no language model uses.
IN_LOWER_PRECISION = """
_convolution addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d convolution einsum linalg_vecdot linear
matmul mm mv prelu scaled_dot_product_attention
"""
IN_FLOAT32 = """
binary_cross_entropy_with_logits cdist cosine_similarity cumprod cumsum dist exp expm1 group_norm huber_loss kl_div
l1_loss layer_norm linalg_vector_norm log log10 log1p log2 log_softmax.int logsumexp margin_ranking_loss mse_loss
native_layer_norm nll_loss pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prod prod.dim_int reciprocal rms_norm rsqrt
smooth_l1_loss soft_margin_loss softmax.int softplus sum sum.dim_IntList
"""
IN_WIDEST = "addcdiv addcmul atan2 cat cross dot index_put scatter_add stack tensordot vdot"


def register_autocast(library: torch.library.Library, device: str, operation: Callable[[str], Any]) -> None:
    """Register the casts of a device.

    Args:
        library: Receives the implementations.
        device: Type of the device.
        operation: Returns an operation by its name.
    """

    def lower_precision(_: list[torch.dtype]) -> torch.dtype:
        return torch.get_autocast_dtype(device)

    def float32(_: list[torch.dtype]) -> torch.dtype:
        return torch.float32

    def widest(dtypes: list[torch.dtype]) -> torch.dtype:
        return reduce(torch.promote_types, dtypes)

    for choose, names in ((lower_precision, IN_LOWER_PRECISION), (float32, IN_FLOAT32), (widest, IN_WIDEST)):
        for name in names.split():
            library.impl(name, partial(_run_in, choose, device, operation(name)), KEY)


def _run_in(choose: Callable[[list[torch.dtype]], torch.dtype], device: str, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation with its floating-point tensors cast to the dtype that ``choose`` selects from theirs."""

    def is_cast(value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == device and value.is_floating_point()

    dtypes = [value.dtype for value in values_of((args, kwargs)) if is_cast(value)]
    with torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(getattr(DispatchKey, KEY))):
        if dtypes:
            dtype = choose(dtypes)
            args, kwargs = map_values(lambda value: value.to(dtype) if is_cast(value) else value, (args, kwargs))
        return op(*args, **kwargs)
