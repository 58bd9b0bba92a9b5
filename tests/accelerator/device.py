"""An accelerator that exists only in Python, so that tests find faults of device placement without a GPU.

A tensor on ``emu:0`` is a plain ``torch.Tensor`` of PyTorch's backend for external devices, with its bytes in main
memory. Its operations run the kernels of the CPU on these bytes, so every value is the CPU's. What a real accelerator
refuses or delays is emulated:

- Operations on tensors of both devices raise ``RuntimeError``. As on CUDA, elementwise operations accept CPU tensors
  without dimensions.
- Tensors in float64 raise ``TypeError``, as on Apple's devices.
- Reads of the host are recorded, see ``reads.py``.
- ``torch.autocast("emu")`` casts the operations that CUDA casts, see ``autocast.py``.
- The device has its own random number generator.

    with emulated_device(), recorded_reads() as reads:
        torch.ones(2, device=DEVICE).sum().item()
    assert len(reads) == 1
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from accelerator.autocast import KEY, register_autocast
from accelerator.nested import map_values, values_of
from accelerator.reads import is_read, record_read, recorded_reads

__all__ = ["DEVICE", "NAME", "emulated_device", "recorded_reads"]

NAME = "emu"
CPU_KERNELS = DispatchKeySet(DispatchKey.CPU)
aten = torch.ops.aten


class _State:
    """State of the device.

    Attributes:
        is_available: Whether PyTorch and Lightning see the device.
        random_state: State of the device's generator; None: the device draws from the CPU's generator.
    """

    is_available = False
    random_state: Tensor | None = None


@contextmanager
def emulated_device(*, own_generator: bool = True) -> Iterator[torch.device]:
    """Make the device available to PyTorch and Lightning, with a generator in its initial state.

    Args:
        own_generator: Whether the device has its own random number generator, as a real one has. False: it draws from
            the CPU's, so that a run on the device draws the same numbers as a run on the CPU.
    """
    before = _State.is_available, _State.random_state, torch.__future__.get_swap_module_params_on_conversion()
    _State.is_available = True
    _State.random_state = torch.Generator().manual_seed(0).get_state() if own_generator else None
    # ``module.to`` keeps the identity of parameters, and with it tied weights, on CUDA. On an external device, only
    # this setting does.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield DEVICE
    finally:
        _State.is_available, _State.random_state, swap = before
        torch.__future__.set_swap_module_params_on_conversion(swap)


# -- tensors and storages


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _device_storage(cpu_storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a storage of the device on the bytes of a CPU storage."""
    storage: Any = torch._C._construct_storage_from_data_pointer(cpu_storage.data_ptr(), DEVICE, cpu_storage.nbytes())
    storage.cpu_storage = cpu_storage  # Keeps the bytes alive as long as the storage of the device.
    return storage


def _device_tensor(values: Tensor, storage: torch.UntypedStorage | None = None) -> Tensor:
    """Return a tensor of the device on the bytes of a CPU tensor.

    Args:
        values: The CPU tensor.
        storage: The storage of the device on these bytes; None: make one.
    """
    if values.dtype in (torch.float64, torch.complex128):
        raise TypeError(f"cannot create a tensor of {values.dtype} on {DEVICE}, which does not support it")
    storage = _device_storage(values.untyped_storage()) if storage is None else storage
    tensor = torch._C._acc.create_empty_tensor([0], values.dtype)
    geometry = values.storage_offset(), values.shape, values.stride()
    return aten.set_.source_Storage_storage_offset.redispatch(CPU_KERNELS, tensor, storage, *geometry)


def _cpu_tensor(tensor: Tensor) -> Tensor:
    """Return a CPU tensor on the bytes of a tensor of the device."""
    storage: Any = tensor.untyped_storage()
    values = torch.empty(0, dtype=tensor.dtype)
    return values.set_(storage.cpu_storage, tensor.storage_offset(), tensor.shape, tensor.stride())


# -- kernels

# These accept CPU tensors without dimensions, as elementwise operations do.
ACCEPT_SCALARS = {"fill", "masked_fill", "index_fill", "_index_put_impl"}
INDEXING = {"index", "_index_put_impl"}  # As on CUDA, the indices may be on the CPU.
GEOMETRY = {"view", "as_strided", "_reshape_alias", "set"}  # These only make or change a view of a storage.


class _Arguments:
    """Translates the arguments of one operation to the CPU, and its results back."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}  # Each tensor among the arguments, by the id of its CPU tensor.
        self.storages: dict[int, torch.UntypedStorage] = {}  # Each storage, by the address of its CPU storage.

    def lower(self, value: Any) -> Any:
        """Return a CPU tensor for a tensor, the CPU for a device, and any other value as it is."""
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor):
            return value
        values = _cpu_tensor(value) if _is_on_device(value) else value
        self.tensors[id(values)] = value
        if values is not value:
            self.storages[values.untyped_storage()._cdata] = value.untyped_storage()
        return values

    def lift(self, value: Any) -> Any:
        """Return the argument that a CPU tensor stands for, or a new tensor of the device."""
        if not isinstance(value, Tensor):
            return value
        tensor = self.tensors.get(id(value))
        if tensor is None:
            return _device_tensor(value, self.storages.get(value.untyped_storage()._cdata))
        if tensor.shape != value.shape or tensor.data_ptr() != value.data_ptr():  # ``out=`` has been resized.
            resized = _device_tensor(value)
            tensor.set_(resized.untyped_storage(), resized.storage_offset(), resized.shape, resized.stride())
        return tensor


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation with the kernel of the CPU, on the bytes of the device's tensors."""
    name = op._schema.name.removeprefix("aten::").removesuffix("_")
    if name in GEOMETRY:
        return op.redispatch(CPU_KERNELS, *args, **kwargs)
    if name != "copy":
        _refuse_mixed_devices(op, name, args, kwargs)
    if is_read(name, args, kwargs, NAME):
        record_read(name)
    arguments = _Arguments()
    cpu_args, cpu_kwargs = map_values(arguments.lower, (args, kwargs))
    draws = torch.Tag.nondeterministic_seeded in op.tags and _State.random_state is not None
    with _generator_of_device(op, kwargs.get("generator")) if draws else nullcontext():
        return map_values(arguments.lift, _overload(op, args)(*cpu_args, **cpu_kwargs))


def _refuse_mixed_devices(op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise an error if there are tensors of both devices among the arguments."""
    if name in INDEXING and _is_on_device(args[0]):
        args = (args[0], *args[2:])
    tensors = [value for value in values_of((args, kwargs)) if isinstance(value, Tensor)]
    accepts_scalars = name in ACCEPT_SCALARS or torch.Tag.pointwise in op.tags
    written = args[0] if op._schema.name.endswith("_") else kwargs.get("out")
    on_cpu = [
        tensor
        for tensor in tensors
        if not _is_on_device(tensor) and not (accepts_scalars and tensor.dim() == 0 and tensor is not written)
    ]
    if on_cpu and any(map(_is_on_device, tensors)):
        shape = list(on_cpu[0].shape)
        raise RuntimeError(f"{op}: expected all tensors to be on {DEVICE}, but a tensor of shape {shape} is on cpu")


def _overload(op: Any, args: tuple[Any, ...]) -> Any:
    """Return the operation, or all its overloads if a tensor argument arrives as a number."""
    pairs = zip(args, op._schema.arguments, strict=False)
    as_number = any(isinstance(value, int | float) and isinstance(arg.type, torch.TensorType) for value, arg in pairs)
    return op.overloadpacket if as_number else op


@contextmanager
def _generator_of_device(op: Any, generator: torch.Generator | None) -> Iterator[None]:
    """Let an operation draw its random numbers from the generator of the device."""
    if generator is not None:
        raise RuntimeError(f"{op}: expected a generator on {DEVICE}, but it is on {generator.device}")
    state_of_cpu = torch.get_rng_state()
    torch.set_rng_state(_State.random_state)
    try:
        yield
    finally:
        _State.random_state = torch.get_rng_state()
        torch.set_rng_state(state_of_cpu)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return _kernel(aten.copy_.default, target, source, non_blocking)


def _convolution(*args: Any) -> Tensor:
    return _kernel(aten.convolution.default, *args)


def _convolution_backward(grad: Tensor, inputs: Tensor, weight: Tensor, *settings: Any) -> Any:
    bias_sizes = [weight.shape[0]]
    return _kernel(aten.convolution_backward.default, grad, inputs, weight, bias_sizes, *settings)


# Operations that an external device implements under a separate name.
SEPARATE_KERNELS = {
    "_copy_from": _copy_from,
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
}


# -- what PyTorch expects of a device


class _DeviceModule:
    """``torch.emu``, the counterpart of ``torch.cuda``."""

    def is_available(self) -> bool:
        return _State.is_available

    is_initialized = is_available

    def device_count(self) -> int:
        return int(_State.is_available)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """There is one device."""

    def synchronize(self, device: Any = None) -> None:
        """Operations are complete when they return."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        if _State.random_state is not None:
            _State.random_state = torch.Generator().manual_seed(seed).get_state()

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state() if _State.random_state is None else _State.random_state.clone()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        if _State.random_state is None:
            torch.set_rng_state(state)
        else:
            _State.random_state = state.clone()


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _State.is_available

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True


def _clone_storage(storage: Any) -> torch.UntypedStorage:
    """Clone a storage of any device. ``copy.deepcopy`` calls this; an allocator would have to be written in C++."""
    if storage.device.type == NAME:
        return _device_storage(storage.cpu_storage.clone())
    return _clone_other_storage(storage)


def _format_values(tensor: Tensor, indent: int) -> str:
    """Format a tensor of any device. PyTorch would convert its values to float64 on the device."""
    return _format_other_values(tensor.cpu() if _is_on_device(tensor) else tensor, indent)


def _operation(name: str) -> Any:
    name, _, overload = name.partition(".")
    return getattr(getattr(aten, name), overload or "default")


def _register() -> list[torch.library.Library]:
    """Register the device. A process can do this once.

    Returns:
        The libraries. The kernels are removed when they are deleted.
    """
    _setup_privateuseone_for_python_backend(NAME, backend_module=_DeviceModule(), hook=_Hooks())
    torch.serialization.register_package(
        0,
        lambda storage: str(DEVICE) if storage.device.type == NAME else None,
        lambda storage, location: _device_storage(storage) if location.startswith(NAME) else None,
    )
    operations, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            name = name.removeprefix("aten::")
            operations.impl(name, partial(_kernel, _operation(name)), "PrivateUse1")
    for name, kernel in SEPARATE_KERNELS.items():
        operations.impl(name, kernel, "PrivateUse1")
    register_autocast(operations, NAME, _operation)
    rest.fallback(_kernel, "PrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, KEY)
    return [operations, rest]


_libraries = _register()
DEVICE = torch.device(NAME, 0)
_clone_other_storage, torch.UntypedStorage.clone = torch.UntypedStorage.clone, _clone_storage
_format_other_values, torch._tensor_str._tensor_str = torch._tensor_str._tensor_str, _format_values
