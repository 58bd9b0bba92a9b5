"""The preference page: people choose between two responses, and their choices become preference rows."""

from rlhf.label.command import label, serve_pairs

__all__ = ["label", "serve_pairs"]
