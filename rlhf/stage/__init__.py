"""What all training stages share: the base class of their modules, and the result that they export."""

from rlhf.stage.module import Result, StageModule
from rlhf.stage.step_metrics import Mean, Metrics

__all__ = ["Mean", "Metrics", "Result", "StageModule"]
