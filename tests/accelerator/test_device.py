"""The emulated device itself."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accelerator.autocast import IN_FLOAT32, IN_LOWER_PRECISION
from accelerator.device import DEVICE, NAME, emulated_device
from accelerator.reads import recorded_reads, summarize
from harness import EXACT

EMU = {"device": DEVICE}


def same(on_device: Tensor, on_cpu: Tensor) -> bool:
    """Return whether a tensor is on the device and equal to a CPU tensor in dtype, shape and every bit."""
    assert on_device.device == DEVICE
    assert on_device.dtype == on_cpu.dtype
    return torch.equal(on_device.cpu(), on_cpu)


# Values and geometry


def test_factories_place_tensors_on_the_device() -> None:
    assert same(torch.arange(5, **EMU), torch.arange(5))
    assert same(torch.full((2, 3), 0.5, **EMU), torch.full((2, 3), 0.5))
    assert same(torch.tensor([[1, 2], [3, 4]], **EMU), torch.tensor([[1, 2], [3, 4]]))
    assert same(torch.tensor([1.0], **EMU).new_zeros(4), torch.zeros(4))
    assert same(torch.ones_like(torch.ones(2), **EMU), torch.ones(2))
    assert same(torch.linspace(0, 1, 5, **EMU), torch.linspace(0, 1, 5))
    with DEVICE:
        assert torch.zeros(2).device == nn.Linear(2, 2).weight.device == DEVICE


def test_views_share_their_bytes() -> None:
    x = torch.arange(12.0, **EMU)
    view = x.view(3, 4).transpose(0, 1)[1:, ::2].unsqueeze(0).expand(2, -1, -1)
    assert same(view, torch.arange(12.0).view(3, 4).T[1:, ::2].expand(2, -1, -1))
    x.zero_()
    assert same(view, torch.zeros(2, 3, 2))
    x.view(3, 4)[2].add_(2)
    del x
    assert view.sum().item() == 12  # The view contains three values of row 2, twice. Its bytes outlive ``x``.


def test_in_place_and_out_operations_return_their_target() -> None:
    x = torch.ones(2, 3, **EMU)
    assert x.add_(1).mul_(2) is x
    assert same(x, torch.full((2, 3), 4.0))
    out = torch.empty(0, **EMU)
    assert torch.cat([x, x], out=out) is out
    assert same(out, torch.full((4, 3), 4.0))
    out.resize_(1)
    assert same(out, torch.tensor([4.0]))


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([2, 0]),
        torch.tensor([2, 0], **EMU),
        torch.tensor([True, False, True], **EMU),
        (slice(None), torch.tensor([1, 0, 3, 3], **EMU)),
        (torch.tensor([0, 2], **EMU)[:, None], torch.tensor([1, 3], **EMU)),
        (..., None, -1),
    ],
    ids=["cpu", "device", "mask", "columns", "grid", "ellipsis"],
)
def test_indexing(index: Any) -> None:
    x = torch.arange(12.0).view(3, 4)
    on_cpu = tuple(i.cpu() if isinstance(i, Tensor) else i for i in index) if isinstance(index, tuple) else index
    on_cpu = on_cpu.cpu() if isinstance(on_cpu, Tensor) else on_cpu
    y = x.to(DEVICE)
    assert same(y[index], x[on_cpu])
    y[index] = 7.0
    x[on_cpu] = 7.0
    assert same(y, x)


def test_copies_in_both_directions() -> None:
    x, y = torch.rand(3), torch.zeros(3, **EMU)
    assert same(y.copy_(x), x)
    assert torch.equal(torch.zeros(3).copy_(y), x)
    assert torch.equal(y.to("cpu"), x)
    assert x.to(DEVICE, torch.bfloat16).dtype == torch.bfloat16
    assert y.to(DEVICE) is y
    assert torch.equal(copy.deepcopy(y).cpu(), x)
    assert "0." in repr(y)
    assert "device='emu:0'" in repr(y)


def test_checkpoints_hold_tensors_of_the_device(tmp_path: Path) -> None:
    x = torch.rand(3, **EMU)
    torch.save({"x": x}, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", map_location="cpu")["x"], x.cpu())
    assert same(torch.load(tmp_path / "x.pt")["x"], x.cpu())


# What the device refuses


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y.T,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.mul_(y),
        lambda x, y: y.mul_(x),
        lambda x, y: F.linear(x, y),
        lambda x, y: F.embedding(torch.zeros(2, dtype=torch.long), x),
        lambda x, y: x.gather(0, torch.zeros(1, 3, dtype=torch.long)),
        lambda x, y: torch.stack([x.sum(), y.sum()]),
        lambda x, y: y[x > 0],
        lambda x, y: y.sum().add_(x.sum()),
    ],
)
def test_tensors_of_both_devices_do_not_mix(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"expected all tensors to be on emu:0, but a tensor of shape .* is on cpu"):
        mix(torch.ones(2, 3, **EMU), torch.ones(2, 3))


def test_elementwise_operations_accept_cpu_scalars() -> None:
    x, scalar = torch.ones(2, 3, **EMU), torch.tensor(2.0)
    assert same(x * scalar, torch.full((2, 3), 2.0))
    assert same(torch.where(x > 0, scalar, x), torch.full((2, 3), 2.0))
    assert same(x.masked_fill(x > 0, scalar), torch.full((2, 3), 2.0))
    assert same(x % 3, torch.ones(2, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, dtype=torch.float64, **EMU),
        lambda: torch.zeros(2, **EMU).double(),
        lambda: torch.zeros(2, dtype=torch.float64).to(DEVICE),
        lambda: torch.zeros(2, **EMU).softmax(dim=-1, dtype=torch.float64),
        lambda: nn.BatchNorm1d(2).double().to(DEVICE),
    ],
)
def test_float64_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"cannot create a tensor of torch\.float64 on emu:0"):
        make()


def test_numpy_is_refused() -> None:
    with pytest.raises(TypeError, match="can't convert emu:0 device type tensor to numpy"):
        torch.ones(2, **EMU).numpy()


# Reads of the host


@pytest.mark.parametrize(
    ("read", "count"),
    {
        "item": (lambda x: x.sum().item(), 1),
        "float": (lambda x: float(x.sum()), 1),
        "bool": (lambda x: bool((x > 0).any()), 1),
        "tolist": (lambda x: x.tolist(), 1),
        "cpu": (lambda x: x.cpu(), 1),
        "copy_": (lambda x: torch.zeros(2, 3).copy_(x), 1),
        "nonzero": (lambda x: (x > 0).nonzero(as_tuple=True), 1),
        "mask": (lambda x: x[x > 0], 1),
        "masked_select": (lambda x: x.masked_select(x > 0), 1),
        "where": (lambda x: torch.where(x > 0), 1),
        "equal": (lambda x: torch.equal(x, x), 1),
        "allclose": (lambda x: torch.allclose(x, x), 1),
        "unique": (lambda x: x.unique(), 1),
        "repeat_interleave": (lambda x: x.repeat_interleave(torch.arange(1, 3, **EMU), dim=0), 1),
        "multinomial": (lambda x: x.multinomial(1), 1),
        "in": (lambda x: 1.0 in x, 1),
        "set_mask": (lambda x: x.__setitem__(x > 0, torch.ones(6, **EMU)), 1),
        "fill_mask": (lambda x: x.__setitem__(x > 0, 0.0), 0),
        "masked_fill": (lambda x: x.masked_fill(x > 0, 0.0), 0),
        "output_size": (lambda x: x.repeat_interleave(torch.arange(1, 3, **EMU), dim=0, output_size=3), 0),
        "repeat": (lambda x: x.repeat_interleave(2, dim=0), 0),
        "index": (lambda x: x[torch.arange(2, **EMU)], 0),
        "sort": (lambda x: x.sort().values.cumsum(0).argmax(-1), 0),
        "upload": (lambda x: x + torch.rand(2, 3).to(DEVICE), 1),
        "numbers": (lambda x: x + torch.tensor([1.0, 2.0, 3.0], **EMU), 1),
        "non_blocking": (lambda x: x + torch.rand(2, 3).to(DEVICE, non_blocking=True), 0),
        "iterate": (lambda x: [row.sum() for row in x], 0),
        "isin": (lambda x: torch.isin(x, x), 0),
    }.values(),
)
def test_reads_are_recorded(read: Callable[[Tensor], Any], count: int) -> None:
    x = torch.ones(2, 3, **EMU)
    with recorded_reads() as reads:
        read(x)
    assert len(reads) == count, summarize(reads)
    x.sum().item()
    assert len(reads) == count, "a recording ends with its context"


def test_reads_name_their_source() -> None:
    with recorded_reads() as reads:
        torch.ones(2, **EMU).sum().item()
    assert reads[0].stack[0].endswith("test_reads_name_their_source")
    assert summarize(reads).startswith("   1 _local_scalar_dense in tests/accelerator/test_device.py:")
    assert not reads[0].is_logging


# Training


def test_modules_keep_their_parameters_and_tied_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    parameter = model[0].weight
    model.to(DEVICE)
    assert model[0].weight is model[1].weight is parameter
    assert parameter.device == DEVICE
    model.cpu()
    assert model[0].weight is model[1].weight is parameter
    assert parameter.device.type == "cpu"


def trained(device: torch.device | str, **adamw: Any) -> dict[str, Tensor]:
    """Train a network of common layers for three steps and return its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(7, 8),
        nn.Conv1d(5, 5, 3, padding=1, groups=5),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
        nn.SiLU(),
        nn.Linear(8, 7),
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **adamw)
    for step in range(3):
        ids = (torch.arange(10, device=device).view(2, 5) + step) % 7
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("adamw", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_training_equals_training_on_the_cpu(adamw: dict[str, Any]) -> None:
    with recorded_reads() as reads:
        on_device = trained(DEVICE, **adamw)
    weights = len(on_device)  # ``to`` copies each of them.
    assert len(reads) == weights or not adamw.get("fused"), summarize(reads)
    assert all(weight.device == DEVICE for weight in on_device.values())
    on_cpu = trained("cpu", **adamw)
    torch.testing.assert_close({name: weight.cpu() for name, weight in on_device.items()}, on_cpu, **EXACT)


def test_attention_equals_attention_on_the_cpu() -> None:
    """To rounding: an external device uses another kernel. A second backward pass adds to the gradients."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 4, 6, 8)
    on_cpu = queries.clone().requires_grad_()
    on_device = queries.to(DEVICE).requires_grad_()
    for q, k, v in 2 * [(on_cpu, keys, values), (on_device, keys.to(DEVICE), values.to(DEVICE))]:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum().backward()
    assert on_device.grad is not None
    torch.testing.assert_close(on_device.grad.cpu(), on_cpu.grad)


# Autocast

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "addmm": lambda x: torch.addmm(x, x, x),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x[None]),
    "conv1d": lambda x: F.conv1d(x[None], x[:, :, None]),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "exp": torch.exp,
    "log_softmax.int": lambda x: x.log_softmax(-1),
    "softmax.int": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "cumsum": lambda x: x.cumsum(-1),
    "sum": lambda x: x.sum(),
    "softplus": F.softplus,
    "pow.Tensor_Scalar": lambda x: x**2,
    "mse_loss": lambda x: F.mse_loss(x, x),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_what_cuda_casts(name: str, dtype: torch.dtype) -> None:
    x = torch.rand(4, 4, dtype=dtype, **EMU)
    assert CALLS[name](x).dtype == dtype
    with torch.autocast(NAME, torch.bfloat16):
        assert CALLS[name](x).dtype == (torch.bfloat16 if name in IN_LOWER_PRECISION.split() else torch.float32)
        assert name in (IN_LOWER_PRECISION + IN_FLOAT32).split()
        with torch.autocast(NAME, enabled=False):
            assert CALLS[name](x).dtype == dtype


def test_autocast_promotes_and_trains_in_float32() -> None:
    linear = nn.Linear(4, 4).to(DEVICE)
    with torch.autocast(NAME, torch.bfloat16):
        output = linear(torch.rand(4, 4, **EMU))
        assert torch.cat([output, linear.weight]).dtype == torch.float32
        assert torch.cat([output, output]).dtype == torch.bfloat16
        output.float().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32
    torch.autocast("cpu", torch.bfloat16)
    assert (torch.rand(4, 4) @ torch.rand(4, 4)).dtype == torch.float32  # The CPU's autocast is another one.


# Random numbers

DRAWS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3, **EMU),
    "randn": lambda: torch.randn(3, **EMU),
    "randint": lambda: torch.randint(100, (3,), **EMU),
    "randperm": lambda: torch.randperm(9, **EMU),
    "multinomial": lambda: torch.ones(9, **EMU).multinomial(3),
    "exponential_": lambda: torch.empty(3, **EMU).exponential_(),
    "bernoulli": lambda: torch.full((64,), 0.5, **EMU).bernoulli(),
    "dropout": lambda: F.dropout(torch.ones(64, **EMU)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_device_has_its_own_generator(name: str) -> None:
    """It is seeded with the CPU's generator, its state can be restored, and draws leave the CPU's generator alone."""
    torch.manual_seed(3)
    state_of_cpu = torch.get_rng_state()
    first = DRAWS[name]()
    state = torch.get_device_module(NAME).get_rng_state()
    second = DRAWS[name]()
    assert torch.equal(torch.get_rng_state(), state_of_cpu)
    assert not torch.equal(first, second)
    torch.get_device_module(NAME).set_rng_state(state)
    assert torch.equal(DRAWS[name](), second)
    torch.manual_seed(3)
    assert torch.equal(DRAWS[name](), first)


def test_the_device_can_draw_from_the_generator_of_the_cpu() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with emulated_device(own_generator=False):
        assert same(torch.rand(3, **EMU), expected)


def test_generators_of_the_cpu_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"expected a generator on emu:0, but it is on cpu"):
        torch.rand(3, generator=torch.Generator(), **EMU)


# Availability


def test_the_device_is_visible_in_its_context_only(device: torch.device) -> None:
    """Tests that run later in the same process see a machine without accelerator again."""
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device(NAME)
    assert torch.accelerator.device_count() == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerator.device._State.is_available", False)
        assert torch.accelerator.current_accelerator(check_available=True) is None
        assert not torch.accelerator.is_available()
