"""``stage=doctor``: examine data before training. Nothing is written."""

from rlhf.doctor.command import examine

__all__ = ["examine"]
