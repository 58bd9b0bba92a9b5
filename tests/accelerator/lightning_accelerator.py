"""Lightning's view of the emulated device: ``Trainer(**emulated_trainer("bf16-mixed"))``."""

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from accelerator.device import DEVICE, NAME

ACCELERATOR = "emulated"


class EmulatedAccelerator(Accelerator):
    """One emulated device."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME

    def teardown(self) -> None:
        """There is nothing to release."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        assert devices in (1, "1", "auto")
        return 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [DEVICE] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return torch.get_device_module(NAME).is_available()

    @staticmethod
    def name() -> str:
        return ACCELERATOR


if ACCELERATOR not in AcceleratorRegistry:
    AcceleratorRegistry.register(ACCELERATOR, EmulatedAccelerator, description="a device that exists only in Python")
    StrategyRegistry.register(ACCELERATOR, SingleDeviceStrategy, device=DEVICE, accelerator=EmulatedAccelerator())


def emulated_trainer(precision: str = "32-true") -> dict[str, Any]:
    """Return flags of ``lightning.Trainer`` for the emulated device.

    Lightning takes the device of an unknown accelerator for the CPU and that of mixed precision for CUDA. The strategy
    and the plugin state the right one.

    Args:
        precision: ``32-true`` or ``bf16-mixed``.
    """
    flags: dict[str, Any] = {"accelerator": ACCELERATOR, "devices": 1, "strategy": ACCELERATOR}
    if precision == "bf16-mixed":
        return {**flags, "plugins": [MixedPrecision("bf16-mixed", device=NAME)]}
    assert precision == "32-true"
    return flags
