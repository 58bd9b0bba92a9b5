"""Optimizations of models that change time and memory, and results only by rounding; see ``rlhf.speed``."""
