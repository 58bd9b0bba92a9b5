"""What all training stages share: the base class of their modules, and the result that they export."""

from rlhf.stage.module import Metrics, Result, StageModule

__all__ = ["Metrics", "Result", "StageModule"]
