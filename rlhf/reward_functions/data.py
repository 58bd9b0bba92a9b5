"""What a reward function reads of the data, before anything is sampled."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data import PromptDataModule, RecordDataModule
from rlhf.data.files import location
from rlhf.data.records import prompt_of
from rlhf.errors import DataError
from rlhf.reward_functions.base import RewardFunction


def check_targets(reward: RewardFunction, datamodule: RecordDataModule, splits: Sequence[str]) -> None:
    """Check that a reward function can score responses to all prompts.

    Args:
        reward: The reward function.
        datamodule: The prompts.
        splits: The splits that responses are sampled for.

    Raises:
        DataError: It cannot, because of a missing or unsuitable reference response.
    """
    if not reward.needs_targets:
        return
    for split in splits:
        for record in datamodule.records(split):
            prompt = prompt_of(record)
            try:
                reward.check_target(prompt.target)
            except DataError as error:
                path = datamodule.paths[split] or datamodule.paths["train"]  # Validation prompts may be held out.
                place = path if path is None or prompt.row is None else location(path, prompt.row)
                raise DataError(f"{place}: {error.args[0]}", error.hint) from None


def read_columns(
    columns: Mapping[str, bool], datamodule: Any, splits: Sequence[str], reader: str = "the reward function"
) -> None:
    """Add further columns of the data to the prompts. Data modules of other classes have none.

    Args:
        columns: The columns, each with whether it is required.
        datamodule: The prompts.
        splits: The splits that responses are sampled for.
        reader: What reads the columns, for the error message.

    Raises:
        DataError: The data lack a required column.
    """
    if isinstance(datamodule, PromptDataModule):
        for split in splits:
            datamodule.read_columns(columns, split, reader)
