"""Where rewards come from: reward models, functions of the user, checkable answers, and weighted sums of these."""

from rlhf.reward_functions.base import ScoringBatch
from rlhf.reward_functions.exact_match import ExactMatchReward
from rlhf.reward_functions.model import ModelReward
from rlhf.reward_functions.python import PythonReward, load_scorer
from rlhf.reward_functions.weighted_sum import RewardFunction, WeightedSumReward

__all__ = [
    "ExactMatchReward",
    "ModelReward",
    "PythonReward",
    "RewardFunction",
    "ScoringBatch",
    "WeightedSumReward",
    "load_scorer",
]
