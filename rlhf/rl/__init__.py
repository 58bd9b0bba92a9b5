"""Learning from one's own answers: what PPO and the critic-free stages share."""

from rlhf.rl.datamodule import PromptDataModule
from rlhf.rl.experience import Experience, Minibatch
from rlhf.rl.kl import KLControl
from rlhf.rl.limits import Limits
from rlhf.rl.module import OnlineModule
from rlhf.rl.scores import ScoreShaping

__all__ = ["Experience", "KLControl", "Limits", "Minibatch", "OnlineModule", "PromptDataModule", "ScoreShaping"]
