"""The results of stages as files: ``*_final.pt``, which ``load_model`` opens, and Hugging Face folders."""

from rlhf.export.file import (
    FINAL_PATTERN,
    Export,
    describe,
    load_model,
    open_model_source,
    save_result,
)

__all__ = [
    "FINAL_PATTERN",
    "Export",
    "describe",
    "load_model",
    "open_model_source",
    "save_result",
]
