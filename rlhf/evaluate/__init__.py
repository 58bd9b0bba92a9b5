"""Evaluation: what the models of a run answer to held-out prompts, and how good that is."""

from rlhf.evaluate.module import EvaluateModule

__all__ = ["EvaluateModule"]
