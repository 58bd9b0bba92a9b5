"""Every stage on the emulated device: each kind of model, in each precision."""

from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from accelerator.device import DEVICE
from accelerator.runs import PAIRINGS, DeviceRuns, logged
from harness import EXACT, Run
from rlhf.models import Pretrained

on_every_model = pytest.mark.parametrize("runs", ["transformer", "mamba", "pretrained"], indirect=True)
in_every_stage = pytest.mark.parametrize(("runs", "kind"), PAIRINGS, indirect=["runs"])


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers on the CPU, by name."""
    return {name: value.detach().cpu() for name, value in (*module.named_parameters(), *module.named_buffers())}


def is_trained(run: Run) -> bool:
    """Return whether any parameter has changed since the first step."""
    initial, final = run.recorder.initial_weights, run.module.named_parameters()
    return any(not torch.equal(initial[name].cpu(), weight.detach()) for name, weight in final)


class OutputDtypes(lightning.Callback):
    """Records the dtypes of the outputs of all linear layers that are trained."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        for layer in module.modules():
            if isinstance(layer, nn.Linear | Conv1D):
                layer.register_forward_hook(lambda layer, inputs, output: self.dtypes.add(output.dtype))


@in_every_stage
def test_training_equals_training_on_the_cpu(runs: DeviceRuns, kind: str) -> None:
    """In 32-true, to the last bit, given the same random numbers."""
    on_device, on_cpu = runs.both(kind)
    assert on_device.trainer.strategy.root_device == DEVICE
    assert on_device.trainer.global_step == on_cpu.trainer.global_step >= 2
    torch.testing.assert_close(weights(on_device.module), weights(on_cpu.module), **EXACT)
    assert logged(on_device) == logged(on_cpu)
    assert is_trained(on_device)


@in_every_stage
def test_training_in_mixed_precision(runs: DeviceRuns, kind: str) -> None:
    """Linear layers compute in bfloat16; the weights stay in float32 and finite, and they change."""
    outputs = OutputDtypes()
    run = runs.run(kind, precision="bf16-mixed", callbacks=[outputs]).fit()
    assert torch.bfloat16 in outputs.dtypes
    final = weights(run.module)
    assert {weight.dtype for weight in final.values() if weight.is_floating_point()} == {torch.float32}
    assert all(bool(weight.isfinite().all()) for weight in final.values())
    assert is_trained(run)


@on_every_model
def test_evaluation_equals_evaluation_on_the_cpu(runs: DeviceRuns) -> None:
    on_device = runs.evaluate()
    assert on_device.metrics == runs.evaluate(accelerator="cpu").metrics
    models = on_device.metrics["models"]
    assert models["sft"]["kl_to_sft"]["mean"] == 0.0
    assert models["sft"]["length"]["mean"] > 1


@on_every_model
def test_evaluation_in_mixed_precision(runs: DeviceRuns) -> None:
    models = runs.evaluate(precision="bf16-mixed").metrics["models"]
    assert models["ppo"]["kl_to_sft"]["mean"] == 0.0
    assert all(torch.tensor(model["reward"]["mean"]).isfinite() for model in models.values())


@pytest.mark.parametrize("kind", ["sft", "dpo", "ppo"])
@pytest.mark.parametrize("runs", ["pretrained"], indirect=True)
def test_pretrained_models_are_opened_on_the_cpu(runs: DeviceRuns, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning opens models in the context of the device, where transformers would place them itself.

    For that, transformers requires accelerate.
    """
    places: list[tuple[torch.device, torch.device]] = []
    language_model = Pretrained.language_model

    def recording(self: Pretrained, tokenizer: Any) -> Any:
        lm = language_model(self, tokenizer)
        places.append((torch.get_default_device(), lm.device))
        return lm

    monkeypatch.setattr(Pretrained, "language_model", recording)
    runs.run(kind, trainer={"max_steps": 1}).fit()
    assert set(places) == {(torch.device("cpu"), torch.device("cpu"))}
