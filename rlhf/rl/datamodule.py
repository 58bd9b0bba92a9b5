"""Prompts that become experience."""

from typing import Any

from rlhf.data import PromptDataModule
from rlhf.rl.experience import ExperienceLoader


class RolloutDataModule(PromptDataModule):
    """Prompts of records of any form. See RecordDataModule for the keys; ``batch_size`` is the prompts of a rollout."""

    bucket = False  # a rollout is a random sample of the prompts
    whole_batches = True  # every iteration has the same number of minibatches

    def train_dataloader(self) -> ExperienceLoader:
        module: Any = self.trainer.lightning_module
        prompts = self.loader("train", training=True)
        return ExperienceLoader(prompts, module.iteration, module.minibatches_of(prompts.batch_sampler.batch_size))
