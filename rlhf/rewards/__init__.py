"""Where rewards come from: reward models, functions of the user, checkable answers, and weighted sums of these."""

from rlhf.rewards.answers import Answers
from rlhf.rewards.exact import ExactAnswer
from rlhf.rewards.function import FunctionReward, load_scorer
from rlhf.rewards.model import RewardModel
from rlhf.rewards.total import Reward, WeightedSum

__all__ = ["Answers", "ExactAnswer", "FunctionReward", "Reward", "RewardModel", "WeightedSum", "load_scorer"]
