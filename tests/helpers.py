"""What the tests of several stages build their tiny runs from."""

from copy import deepcopy
from typing import Any

from torch import nn

PROMPTS = [
    "The bridge opens.",
    "It rains.",
    "Nadia Falk sells a camera in Dunmore.",
    "May",
    "Who won?",
    "A",
    "B b",
    "See",
]

# one answer a prompt, and one more: pairs are each with the next
ANSWERS = [
    "May",
    "Nadia Falk, camera, Dunmore, May, 90 euros.",
    "In short, it rains.",
    "90 euros",
    "A",
    "The mayor opened it.",
    "B b",
    "Monday",
    "children, weather",
]


class Fixed:
    """A source of one model: every copy has the same weights, as with the file of an earlier stage."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def language_model(self, tokenizer: Any) -> Any:
        return deepcopy(self.model)

    scalar_model = language_model
