"""The stage of supervised fine-tuning."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import RecordDataModule, SequenceBatch
from rlhf.models import ModelSource, Policy
from rlhf.sampling import LocalSampler, Sampler, SamplingParams
from rlhf.schema import FractionBelowOne, NonNegativeInt, PositiveFloat, PositiveInt
from rlhf.sft.objective import cross_entropy_loss
from rlhf.sft.preflight import checks
from rlhf.stage import Metrics, Result, StageModule
from rlhf.stage.check import Check
from rlhf.stage.sample_table import show_samples
from rlhf.tensors import masked_fraction, masked_mean


class SFTModule(StageModule):
    """Fine-tunes a language model on demonstrations.

    Args:
        policy: Model to start from: the ``*_final.pt`` of a stage or a Hugging Face folder. null: the base model that
            ``model=`` selects.
        samples: Number of validation prompts to which responses are sampled after each epoch, greedily. TensorBoard
            shows them. 0 disables it.
        max_new_tokens: Maximum length of these responses, in tokens; less if the model has too few positions.
        sampler: Sampler of these responses. null: ``LocalSampler``.
        learning_rate: Peak learning rate of AdamW.
        betas: AdamW decay rates of the first and second moment.
        warmup_ratio: Fraction of all optimizer steps over which the learning rate rises linearly from 0.
        keys: Further arguments of ``StageModule``.
    """

    monitor = "val/loss"
    policy: Policy

    def __init__(
        self,
        *,
        policy: ModelSource,
        tokenizer: PreTrainedTokenizerBase | None = None,
        samples: NonNegativeInt = 4,
        max_new_tokens: PositiveInt = 64,
        sampler: Sampler | None = None,
        learning_rate: PositiveFloat = 5e-4,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.98),
        warmup_ratio: FractionBelowOne = 0.05,
        **keys: Any,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer, learning_rate=learning_rate, betas=betas, warmup_ratio=warmup_ratio, **keys
        )
        self.source = policy
        self.samples = samples
        self.sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        self.sampler = sampler or LocalSampler()

    def open_models(self) -> None:
        # Pretrained models are loaded in eval mode. In this stage their dropout is active.
        self.policy = Policy(self.source.language_model(self.tokenizer)).train()

    def training_loss(self, batch: SequenceBatch) -> tuple[Tensor, Metrics]:
        output = self.policy(**batch.inputs, entropy="value", is_argmax=True)
        loss = cross_entropy_loss(output.logprobs, batch.response_mask)
        return loss * batch.loss_weight, {
            "train/loss": loss,
            "train/token_accuracy": masked_fraction(output.is_argmax, batch.response_mask),
            "train/entropy": masked_mean(output.entropy, batch.response_mask),
        }

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        output = self.policy(**batch.inputs, is_argmax=True)
        self.log_val(
            {
                "loss": cross_entropy_loss(output.logprobs, batch.response_mask),
                "token_accuracy": masked_fraction(output.is_argmax, batch.response_mask),
            },
            batch.loss_terms,
        )

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        show_samples(self)

    def preflight_checks(self, datamodule: RecordDataModule) -> Iterator[Check]:
        return checks(self, datamodule)

    def result(self) -> Result:
        return Result(self.policy.lm, self.tokenizer)
