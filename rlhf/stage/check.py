"""The result of one pre-flight check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One property of a stage, measured before training.

    Attributes:
        name: What should hold, as a short statement.
        passed: Whether it holds.
        measured: The measurement, as text.
        limit: The values that would have been accepted, as text.
        fault: What a failure means for training, and where to look for the cause.
    """

    name: str
    passed: bool
    measured: str
    limit: str
    fault: str
