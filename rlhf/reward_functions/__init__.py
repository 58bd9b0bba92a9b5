"""Reward functions: reward models, Python functions, verifiable responses, and weighted sums of these."""

from rlhf.reward_functions.base import RewardFunction, ScoringBatch, check_rewards, columns_of
from rlhf.reward_functions.data import check_targets, read_columns
from rlhf.reward_functions.endings import end_as_in_training
from rlhf.reward_functions.exact_match import ExactMatchReward
from rlhf.reward_functions.model import ModelReward, load_reward_models
from rlhf.reward_functions.objective import pessimistic_score
from rlhf.reward_functions.python import PythonReward, load_scorer
from rlhf.reward_functions.weighted_sum import WeightedSumReward

__all__ = [
    "ExactMatchReward",
    "ModelReward",
    "PythonReward",
    "RewardFunction",
    "ScoringBatch",
    "WeightedSumReward",
    "check_rewards",
    "check_targets",
    "columns_of",
    "end_as_in_training",
    "load_reward_models",
    "load_scorer",
    "pessimistic_score",
    "read_columns",
]
