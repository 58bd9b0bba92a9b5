"""Training metrics: weighted means over micro-batches and over all ranks."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rlhf.distributed import gather_objects
from rlhf.models import full_tensor


class Mean(NamedTuple):
    """A metric that is a mean over terms other than those of the loss.

    Attributes:
        value: The mean, a scalar.
        weight: The number of terms, or a number in proportion to it. 0: there is no value.
    """

    value: Tensor | float
    weight: float


Metrics: TypeAlias = Mapping[str, Tensor | float | Mean]


class StepMetrics:
    """Collects the metrics of one optimizer step, or of several.

    Tensors stay on their device until ``reduce`` reads all of them at once.

    Attributes:
        means: The values of each metric, with their weights.
    """

    def __init__(self) -> None:
        self.means: dict[str, list[Mean]] = defaultdict(list)

    def add(self, metrics: Metrics, weight: float = 1.0) -> None:
        """Add metrics of a micro-batch.

        Args:
            metrics: Values by name.
            weight: Weight of the values that are not ``Mean``.
        """
        for name, value in metrics.items():
            mean = value if isinstance(value, Mean) else Mean(value, weight)
            if mean.weight:
                held = full_tensor(mean.value.detach()) if isinstance(mean.value, Tensor) else mean.value
                self.means[name].append(Mean(held, mean.weight))

    def take(self, other: "StepMetrics") -> None:
        """Move all values of another collection to this one."""
        for name, means in other.means.items():
            self.means[name] += means
        other.means.clear()

    def reduce(self) -> dict[str, float]:
        """Return the weighted mean of each metric over micro-batches and ranks, and forget all values.

        This is one collective operation. A metric may be missing on some ranks.
        """
        own = _means_by_name(self._read())
        self.means.clear()
        ranks = gather_objects(own)
        if len(ranks) == 1:
            return {name: float(mean.value) for name, mean in own.items()}
        names = sorted({name for rank in ranks for name in rank})
        means = _means_by_name({name: [rank[name] for rank in ranks if name in rank] for name in names})
        return {name: float(mean.value) for name, mean in means.items()}

    def _read(self) -> dict[str, list[Mean]]:
        """Return the collected values as floats. The host waits for the device once."""
        tensors = [mean.value for means in self.means.values() for mean in means if isinstance(mean.value, Tensor)]
        device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), "cpu")
        values = iter(torch.stack([tensor.to(device).float() for tensor in tensors]).tolist() if tensors else [])
        return {
            name: [Mean(next(values), mean.weight) if isinstance(mean.value, Tensor) else mean for mean in means]
            for name, means in self.means.items()
        }


def _means_by_name(means: Mapping[str, list[Mean]]) -> dict[str, Mean]:
    """Return the weighted mean of each list, with the sum of its weights. The mean of one value is that value."""
    reduced = {}
    for name, values in means.items():
        total = sum(mean.weight for mean in values)
        reduced[name] = Mean(sum(float(mean.value) * (mean.weight / total) for mean in values), total)
    return reduced
