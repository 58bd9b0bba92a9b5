"""Checkpoints: when they are written, how a run is resumed from them, and what a signal does."""

from rlhf.checkpoint.callback import AtomicCheckpointIO, RunCheckpoint

__all__ = ["AtomicCheckpointIO", "RunCheckpoint"]
