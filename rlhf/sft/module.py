"""The supervised stage."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rlhf.data import Prompt, SequenceBatch
from rlhf.models import ModelSource, Policy
from rlhf.preflight import Check
from rlhf.sampling import SamplingParams, generate
from rlhf.sft.objective import cross_entropy_loss
from rlhf.sft.preflight import checks
from rlhf.stage import Result, StageModule, as_fraction


class SFTModule(StageModule):
    """Learns demonstrations.

    Args:
        policy: what to start from; null: the base model of ``model=``. A run's ``*_final.pt`` or a folder works too.
        samples: validation prompts answered after each epoch, shown in TensorBoard; 0 for none.
        max_new_tokens: longest of those answers, tokens.
        optimizer keys: see StageModule.
    """

    monitor = "val/loss"

    def __init__(self, *, policy: ModelSource, samples: int = 4, max_new_tokens: int = 64, **optimizer: Any) -> None:
        super().__init__(**optimizer)
        self.source = policy
        self.samples = samples
        self.sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        self.policy: Policy | None = None

    def configure_model(self) -> None:
        if self.policy is None:
            # a model that was opened comes in eval mode: its dropout is meant for this stage
            self.policy = Policy(self.source.language_model(self.tokenizer)).train()

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        scores = self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        loss = cross_entropy_loss(scores.logprobs, batch.response_mask)
        self.log_train(
            {
                "train/loss": loss,
                "train/token_accuracy": as_fraction(scores.correct, batch.response_mask),
                "train/entropy": scores.entropy[batch.response_mask].mean(),
            }
        )
        return loss * batch.loss_weight

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        scores = self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        self.log_val(
            {
                "loss": cross_entropy_loss(scores.logprobs, batch.response_mask),
                "token_accuracy": as_fraction(scores.correct, batch.response_mask),
            },
            batch.loss_terms,
        )

    def on_validation_epoch_end(self) -> None:
        if self.samples and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self.log_samples(self._answers(self.trainer.datamodule.samples(self.samples)))

    def _answers(self, prompts: list[tuple[list[int], Prompt]]) -> list[tuple[str, str]]:
        stops = self.sampling.stop_ids(self.tokenizer)
        rollout = generate(self.policy.lm, [input_ids for input_ids, _ in prompts], self.sampling, stops)
        texts = rollout.decode(self.tokenizer)
        return [(prompt.raw_text, text) for (_, prompt), text in zip(prompts, texts, strict=True)]

    def checks(self, datamodule: Any) -> Iterator[Check]:
        return checks(self, datamodule)

    def result(self) -> Result:
        return Result(self.policy.lm, self.tokenizer)
