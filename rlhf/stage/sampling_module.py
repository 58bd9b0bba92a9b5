"""Base class of stages that sample a response to every prompt without training."""

from collections.abc import Mapping, Sequence

import lightning

from rlhf.data import PromptBatch
from rlhf.models import ModelSource, as_sequence
from rlhf.sampling import LocalSampler, Sampler, SamplingParams
from rlhf.stage.positions import check_source_positions


class SamplingModule(lightning.LightningModule):
    """Collects the prompts of this rank in ``batches``, for ``on_test_epoch_end`` of a subclass.

    One model is in memory at a time: each of them works on all prompts before the next one is loaded.

    Args:
        reward_model: Reward model that scores the responses, or several as an ensemble.
        sampling: Sampling settings.
        sampler: Sampler of the responses. None: ``LocalSampler``.
    """

    def __init__(
        self,
        reward_model: ModelSource | Sequence[ModelSource] | None,
        sampling: SamplingParams | None,
        sampler: Sampler | None,
    ) -> None:
        super().__init__()
        self.reward_sources = as_sequence(reward_model)
        self.sampling = sampling or SamplingParams()
        self.sampler = sampler or LocalSampler()
        self.batches: list[PromptBatch] = []

    @property
    def response_budget(self) -> int:
        """Maximum response length in tokens, which the data module reserves in ``max_length``."""
        return self.sampling.max_new_tokens

    def check_positions(
        self, policies: Mapping[str, ModelSource], reward_models: Sequence[ModelSource], split: str
    ) -> None:
        """Reject prompts that do not fit a model, before any model is opened.

        Args:
            policies: The models that respond, by the names to use in messages.
            reward_models: The models that score the responses.
            split: The split of the prompts.
        """
        check_source_positions(
            policies,
            reward_models,
            sampler=self.sampler,
            budget=self.response_budget,
            datamodule=getattr(self.trainer, "datamodule", None),
            split=split,
        )

    def on_test_start(self) -> None:
        self.batches = []

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        if not batch.is_filler:
            self.batches.append(batch)
