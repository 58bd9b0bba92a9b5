"""Data of the on-policy stages."""

from rlhf.data import PromptDataModule
from rlhf.rl.loader import ExperienceLoader
from rlhf.rl.module import OnPolicyModule


class RolloutDataModule(PromptDataModule):
    """Prompts of records of any kind, for on-policy training.

    Args:
        batch_size: Number of prompts per rollout and device. The remaining keys are those of ``RecordDataModule``.
    """

    bucket_by_length = False  # A rollout is a random sample of the prompts.
    drop_last = True  # All iterations have the same number of minibatches.

    def train_dataloader(self) -> ExperienceLoader:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, OnPolicyModule)
        prompts = self.loader("train", training=True)
        minibatches = module.minibatches_per_iteration(prompts.batch_sampler.batch_size)
        return ExperienceLoader(prompts, module.iteration, minibatches)
