"""Training metrics of one optimizer step: weighted means over its micro-batches and over all ranks."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rlhf.distributed import gather_objects


class Mean(NamedTuple):
    """A metric that is a mean over other terms than the loss.

    Args:
        value: The mean, a scalar.
        weight: The number of terms, or a number in proportion to it. 0: there is no value.
    """

    value: Tensor | float
    weight: float


Metrics: TypeAlias = Mapping[str, Tensor | float | Mean]


class StepMetrics:
    """Collects the metrics of one optimizer step.

    Tensors stay on their device until ``reduce`` reads all of them at once.
    """

    def __init__(self) -> None:
        self._means: dict[str, list[Mean]] = defaultdict(list)

    def add(self, metrics: Metrics, weight: float = 1.0) -> None:
        """Add metrics of a micro-batch.

        Args:
            metrics: Values by name.
            weight: Weight of the values that are not ``Mean``.
        """
        for name, value in metrics.items():
            mean = value if isinstance(value, Mean) else Mean(value, weight)
            if mean.weight:
                held = mean.value.detach() if isinstance(mean.value, Tensor) else mean.value
                self._means[name].append(Mean(held, mean.weight))

    def reduce(self) -> dict[str, float]:
        """Return the weighted mean of each metric over micro-batches and ranks, and forget all values.

        This is one collective operation. A metric may be missing on some ranks.
        """
        own = _means_by_name(self._read())
        self._means.clear()
        ranks = gather_objects(own)
        if len(ranks) == 1:
            return {name: float(mean.value) for name, mean in own.items()}
        names = sorted({name for rank in ranks for name in rank})
        means = _means_by_name({name: [rank[name] for rank in ranks if name in rank] for name in names})
        return {name: float(mean.value) for name, mean in means.items()}

    def _read(self) -> dict[str, list[Mean]]:
        """Return the collected values as floats. The host waits for the device once."""
        tensors = [mean.value for means in self._means.values() for mean in means if isinstance(mean.value, Tensor)]
        device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), "cpu")
        values = iter(torch.stack([tensor.to(device).float() for tensor in tensors]).tolist() if tensors else [])
        return {
            name: [Mean(next(values), mean.weight) if isinstance(mean.value, Tensor) else mean for mean in means]
            for name, means in self._means.items()
        }


def _means_by_name(means: Mapping[str, list[Mean]]) -> dict[str, Mean]:
    """Return the weighted mean of each list, with the sum of its weights. The mean of one value is that value."""
    reduced = {}
    for name, values in means.items():
        total = sum(mean.weight for mean in values)
        reduced[name] = Mean(sum(float(mean.value) * (mean.weight / total) for mean in values), total)
    return reduced
