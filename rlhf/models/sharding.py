"""Sharding of models over processes with FSDP2: every rank stores a part of each parameter."""

from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlhf.distributed import gather_objects, is_rank_zero
from rlhf.errors import ConfigError
from rlhf.models.backbone import Policy, PolicyOutput
from rlhf.models.frozen import Frozen
from rlhf.models.scalar import ScalarHead, ScalarModel

# Methods other than forward that use parameters. FSDP gathers the parameters of a model while one of them runs.
FORWARD_METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    Policy: ("logits",),
    ScalarModel: ("scores", "token_values"),
    ScalarHead: ("scores",),
}
_ROOTS: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()  # language model: its Policy
_GATHERED: WeakSet[nn.Module] = WeakSet()


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard all models of a stage: policies, reward models and critics, trained or frozen.

    Each decoder layer is gathered separately, immediately before it is used. What is outside the layers, such as
    embeddings, is gathered together.

    Args:
        module: The stage.
        mesh: The device mesh of Lightning's ``ModelParallelStrategy``.

    Raises:
        ConfigError: The mesh has a tensor-parallel dimension, or a trainable parameter belongs to no model.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            "trainer.strategy must not split layers over ranks: models are sharded only, got a tensor-parallel size of "
            f"{mesh['tensor_parallel'].size()}.",
            "Set trainer=fsdp.",
        )
    _register_output()
    for model in _models(module):
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh["data_parallel"], reshard_after_forward=True)
        fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=True)
        for name in next(names for kind, names in FORWARD_METHODS.items() if isinstance(model, kind)):
            register_fsdp_forward_method(model, name)
        if isinstance(model, Policy):
            _ROOTS[model.lm] = ref(model)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ConfigError(
                f"trainer=fsdp shards policies, reward models and critics only, but {name} is trained as well.",
                "Set trainer=ddp.",
            )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep all parameters of a model gathered on every rank in this context. Without sharding, nothing happens.

    Entering is a collective operation. Forward passes in the context are not, so that ranks may run different numbers
    of them. The parameters must not be changed in the context. An inner context of the same model does nothing.

    Args:
        model: A language model, or one of the models that ``shard`` has sharded.
    """
    found = _ROOTS.get(model)
    root: Any = model if found is None else found()
    parts: list[FSDPModule] = [part for part in root.modules() if isinstance(part, FSDPModule)]
    if root not in parts or root in _GATHERED:
        yield
        return
    root.set_reshard_after_forward(False)
    _GATHERED.add(root)
    try:
        with torch.no_grad():
            _initialize(root)
        for part in parts:
            part.unshard()
        yield
    finally:
        _GATHERED.discard(root)
        root.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Return whether the parameters of a model are sharded."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def common_count(model: nn.Module, count: int) -> int:
    """Return how often each rank must run a model that this rank needs ``count`` times.

    The forward passes of a sharded model are collective operations: the result is the largest count of all ranks.
    """
    return max(gather_objects(count)) if is_sharded(model) else count


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor; tensors that are not sharded are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor; tensors that are not sharded are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state_dict(model: nn.Module, without: Container[str] = ()) -> dict[str, Any]:
    """Return the complete state dict of a model on the CPU. Of a sharded model, only rank 0 receives it.

    All ranks must call this function. Weights that are tied in the model share their memory in the result.

    Args:
        model: The model.
        without: Names to leave out.

    Returns:
        Tensors and extra state by name; of a sharded model an empty dictionary on ranks other than 0.
    """
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in without}
    receives = is_rank_zero() or not any(isinstance(value, DTensor) for value in state.values())
    copies: dict[int, Tensor] = {}
    for value in state.values():
        if isinstance(value, Tensor) and id(value) not in copies:
            full = full_tensor(value.detach())  # One gathered tensor at a time.
            copies[id(value)] = full.cpu() if receives else full.new_empty(0)
    return {name: copies.get(id(value), value) for name, value in state.items()} if receives else {}


def _models(module: nn.Module) -> Iterator[nn.Module]:
    """Yield each model in a module that is to be sharded as a whole, including those that ``Frozen`` hides."""
    if isinstance(module, Frozen):
        yield from _models(module.model)
    elif isinstance(module, tuple(FORWARD_METHODS)):
        yield module
    else:
        for child in module.children():
            yield from _models(child)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a model: the modules that transformers declares not to be split over devices.

    A layer that shares a parameter with another part of the model is left out. It belongs to the whole.
    """
    declared = [getattr(part, "_no_split_modules", None) or () for part in model.modules()]
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    layers = _outermost(model, set(chain.from_iterable(declared)))
    return [layer for layer in layers if all(uses[id(parameter)] == 1 for parameter in layer.parameters())]


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    """Yield the largest modules whose class has one of these names."""
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


@cache
def _register_output() -> None:
    """Let FSDP find the tensors in the output of a policy, where the backward pass through the policy starts."""
    torch.export.register_dataclass(PolicyOutput)


def _initialize(root: Any) -> None:
    """Make a model the root of its layers, as its first forward pass would. Sampling runs the layers directly."""
    if not hasattr(root, "initialize_shards"):
        root.initialize_shards = lambda: None
        register_fsdp_forward_method(root, "initialize_shards")
    root.initialize_shards()
