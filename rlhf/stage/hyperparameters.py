"""Constructor arguments of a module that checkpoints store as hyperparameters."""

from collections.abc import Sequence
from types import FrameType
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.parsing import collect_init_args

PLAIN = (bool, int, float, str, type(None))  # Types that checkpoints can hold without pickle.


def plain_arguments(frame: FrameType | None) -> dict[str, Any]:
    """Return the constructor arguments that are numbers, strings, booleans, None, or sequences of these.

    Models, functions and settings objects are left out: a checkpoint that contained them could not be opened with
    ``torch.load(weights_only=True)``.

    Args:
        frame: Frame of the base class's ``__init__``. The arguments of subclasses are found from there.
    """
    assert frame is not None, "this Python implementation has no stack frames"
    plain: dict[str, Any] = {}
    for arguments in collect_init_args(frame, [], classes=(HyperparametersMixin,)):
        for name, value in arguments.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                value = list(value)  # From Hydra, it is a ListConfig, which would be pickled.
            if all(isinstance(item, PLAIN) for item in (value if isinstance(value, list) else [value])):
                plain[name] = value
    return plain
