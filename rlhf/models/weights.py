"""The weights of models in files: all of them, or an adapter and a head without the frozen base."""

from collections.abc import Mapping

from torch import Tensor, nn

from rlhf.errors import DataError, listed
from rlhf.models.adapters import base_weights
from rlhf.models.opening import REPLACE_FILE


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and buffers that a file of the model contains: all except the frozen base of an adapter."""
    base = base_weights(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in base}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Load exactly the weights that ``stored_weights`` names.

    A missing weight is an error and never initialized at random (trl#1379).

    Args:
        model: The model.
        weights: The weights of a file, by name.
        path: The path of the file, for messages.
    """
    check_fit(model, weights, path)
    model.load_state_dict(weights, strict=False)


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Raise a ``DataError`` if the weights are not exactly those of the model, which may be on the meta device."""
    check_complete(model, weights, path)
    expected = stored_weights(model)
    misfits = [name for name in weights if name not in expected or weights[name].shape != expected[name].shape]
    if misfits:
        raise DataError(f"{path}: these weights do not fit the model configuration: {listed(misfits)}.", REPLACE_FILE)


def check_complete(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Raise a ``DataError`` if weights that ``stored_weights`` names are missing. Arguments as for ``load_weights``."""
    expected = stored_weights(model)
    if missing := sorted(expected.keys() - weights.keys(), key=lambda name: (not name.startswith("head."), name)):
        what = "the reward head is" if missing[0].startswith("head.") else "these weights are"
        raise DataError(f"{path}: {what} missing from the file: {listed(missing)}.", REPLACE_FILE)
