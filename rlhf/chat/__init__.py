"""``stage=chat``: talk to the models of a run, side by side, with the scores of the reward model."""

from rlhf.chat.command import chat

__all__ = ["chat"]
