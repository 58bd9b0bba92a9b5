"""Base class of the modules that train on preferences."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from rlhf.data import RecordDataModule, SequenceBatch
from rlhf.data.labeled_batches import LabeledBatch
from rlhf.declared import declared_arguments, unwrapped
from rlhf.distributed import gather_objects
from rlhf.dpo.metrics import MetricGroup
from rlhf.dpo.objective import response_lengths
from rlhf.dpo.preflight import checks
from rlhf.dpo.reference import ReferenceModule
from rlhf.dpo.samples import rewards_and_kl
from rlhf.errors import ConfigError
from rlhf.models import ModelSource, Policy, allows_shared_prompts, disable_dropout
from rlhf.sampling import LocalSampler, Sampler, SamplingParams
from rlhf.schema import (
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_arguments,
)
from rlhf.stage import Mean, Metrics, Result
from rlhf.stage.check import Check
from rlhf.stage.optimizer import Schedule
from rlhf.stage.sample_table import show_samples
from rlhf.tensors import masked_mean

log = logging.getLogger(__name__)


class PreferenceModule(ReferenceModule):
    """Trains a policy on preference data, by default regularized towards a frozen reference model.

    Args:
        policy: Model to start from. It is also the reference model. null: the SFT model of the run.
        loss: Preference loss, see ``rlhf.dpo.objective``: a function with its settings filled in, or an ``nn.Module``.
        beta: Strength of the regularization towards the reference model, in reward units per nat. Some losses define it
            differently.
        length_normalized: Average log-probs over the tokens of a response instead of summing them.
        sft_coef: Weight of the SFT term, the negative log-likelihood per token of the chosen responses.
        samples: Number of validation prompts to which responses are sampled after each validation and after training,
            greedily. TensorBoard and the log show them with their implicit rewards. If the reference model has been
            freed, it is opened again for each table. 0 disables it.
        max_new_tokens: Maximum length of these responses, in tokens; less if the model has too few positions.
        sampler: Sampler of these responses. null: ``LocalSampler``.
        learning_rate: Peak learning rate of AdamW.
        schedule: Learning rate schedule: ``cosine`` or ``linear`` decay to 0, or ``constant``.
        warmup_ratio: Fraction of all optimizer steps over which the learning rate rises linearly from 0.
        keys: Further keywords of ``ReferenceModule``.
    """

    monitor = "val/rewards/accuracies"

    def __init__(
        self,
        *,
        policy: ModelSource,
        loss: Callable[..., Tensor],
        beta: PositiveFloat = 0.3,
        length_normalized: bool = False,
        sft_coef: NonNegativeFloat = 0.0,
        samples: NonNegativeInt = 4,
        max_new_tokens: PositiveInt = 64,
        sampler: Sampler | None = None,
        learning_rate: PositiveFloat = 1e-4,
        schedule: Schedule = "linear",
        warmup_ratio: FractionBelowOne = 0.05,
        **keys: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, schedule=schedule, warmup_ratio=warmup_ratio, **keys)
        self.source = policy
        self.loss = loss
        self.beta = beta
        self.length_normalized = length_normalized
        self.sft_coef = sft_coef
        self.samples = samples
        self.sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        self.sampler = sampler or LocalSampler()
        if isinstance(loss, partial):
            check_arguments(loss.func, "stage.loss", loss.keywords)
        self._check_loss()

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """The loss without the settings that have been filled in."""
        return unwrapped(self.loss)

    def _check_loss(self) -> None:
        """Reject settings that the loss is not defined for."""
        if isinstance(self.loss, partial) and isinstance(self.loss_function, type):
            raise ConfigError(
                f"stage.loss._partial_ must be false for the class {self._loss_name()}, got true.",
                "Set stage.loss._partial_=false.",
            )
        for switch, needed in getattr(self.loss_function, "needs", {}).items():
            if getattr(self, switch) != needed:
                needed_word, given_word = str(needed).lower(), str(not needed).lower()
                raise ConfigError(
                    f"stage.{switch} must be {needed_word} with stage.loss._target_={self._loss_name()}, "
                    f"got stage.{switch}={given_word}.",
                    f"Set stage.{switch}={needed_word}, or choose another loss, such as loss=sigmoid.",
                )

    def _loss_name(self) -> str:
        """Return the import path of the loss."""
        loss = self.loss_function
        named = loss if hasattr(loss, "__qualname__") else type(loss)
        return f"{named.__module__}.{named.__qualname__}"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        has_margins = getattr(getattr(self.trainer, "datamodule", None), "has_margins", False)
        if stage == "fit" and has_margins and "margins" not in declared_arguments(self.loss):
            log.warning(
                "The preference data have margins, which have no effect: stage.loss._target_=%s does not read them. "
                "A loss of pairs reads them if it declares the argument 'margins'.",
                self._loss_name(),
            )

    def open_models(self) -> None:
        self.policy = Policy(disable_dropout(self.source.language_model(self.tokenizer)))
        allows_shared_prompts(self.policy.lm.base_model)
        if not self.reference_free:
            self.reference = self.open_reference()

    # Loss

    @abstractmethod
    def loss_and_metrics(self, batch: Any) -> tuple[Tensor, Tensor, list[MetricGroup]]:
        """Compute the preference loss and the SFT term of a batch, which are scalars, and the metrics to log.

        Args:
            batch: A batch with its reference log-probs, see ``fill_ref_logprobs``.
        """

    def training_loss(self, batch: LabeledBatch) -> tuple[Tensor, Metrics]:
        self.fill_ref_logprobs(batch, "train")
        loss, nll, groups = self.loss_and_metrics(batch)
        # The two means have their own weights: one runs over pairs or responses, the other over tokens. The weight of
        # the metric is that of the first, so the second one is rescaled.
        rescaled = nll * (batch.sft_loss_weight / batch.loss_weight if batch.loss_weight else 0.0)
        metrics: dict[str, Tensor | float | Mean] = {"train/loss": loss + self.sft_coef * rescaled}
        for terms, values in self._terms_and_values(batch, nll, groups):
            metrics |= {name: Mean(value, terms) for name, value in values.items()}
        return loss * batch.loss_weight + self.sft_coef * nll * batch.sft_loss_weight, metrics

    def validation_step(self, batch: LabeledBatch, batch_idx: int) -> None:
        self.fill_ref_logprobs(batch, "val")
        loss, nll, groups = self.loss_and_metrics(batch)
        self.log_val({"preference_loss" if self.sft_coef else "loss": loss}, batch.loss_terms)
        groups = self._terms_and_values(batch, nll, groups)
        # Lightning would log NaN for a group without terms. All ranks must log the same metrics.
        terms_of_ranks = gather_objects([group.terms for group in groups])
        for group, *terms in zip(groups, *terms_of_ranks, strict=True):
            if any(terms):
                self.log_val(group.values, group.terms)

    def derived_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        if not metrics.keys() >= {"preference_loss", "nll"}:
            return {}
        return {"loss": metrics["preference_loss"] + self.sft_coef * metrics["nll"]}

    def _terms_and_values(self, batch: LabeledBatch, nll: Tensor, groups: list[MetricGroup]) -> list[MetricGroup]:
        groups = [MetricGroup(batch.sft_terms, {"nll": nll}), *groups]
        return [MetricGroup(0 if batch.is_filler else terms, values) for terms, values in groups]

    # Samples

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        show_samples(self, rewards_and_kl)

    def on_train_end(self) -> None:
        if self.validated_step != self.global_step:
            show_samples(self, rewards_and_kl)

    def response_logprobs(self, sequences: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Compute the summed log-probs of responses under the policy, and the mean entropy per token.

        Returns:
            [batch] log-probs and a scalar entropy, both in nats.
        """
        output = self.policy(**sequences.inputs, entropy="value")
        return output.logprobs.sum(dim=1), masked_mean(output.entropy, sequences.response_mask)

    def response_scores(self, logprobs: Tensor, ref_logprobs: Tensor | None, sequences: SequenceBatch) -> Tensor:
        """Log-prob or log-ratio of each response, as the loss expects it.

        Args:
            logprobs: [batch] summed log-probs of the responses under the policy, in nats.
            ref_logprobs: [batch] the same under the reference model; None without a reference model.
            sequences: The responses, for their lengths.

        Returns:
            [batch], in nats, or nats per token with ``length_normalized``.
        """
        scores = logprobs if ref_logprobs is None else logprobs - ref_logprobs
        return scores / response_lengths(sequences.response_mask) if self.length_normalized else scores

    def preflight_checks(self, datamodule: RecordDataModule) -> Iterator[Check]:
        return checks(self, datamodule)

    def result(self) -> Result:
        return Result(self.policy.lm, self.tokenizer)
