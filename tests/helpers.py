"""Old names of tests/harness.py; the file goes away when no test imports it."""

from harness import PROMPTS, RESPONSES, FakeSource

ANSWERS = RESPONSES
Fixed = FakeSource
__all__ = ["ANSWERS", "PROMPTS", "Fixed"]
