"""Evaluation: compares the responses of several models to held-out prompts."""

from rlhf.evaluate.module import EvaluateModule

__all__ = ["EvaluateModule"]
