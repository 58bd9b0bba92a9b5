"""The evaluation stage: samples responses with every model and scores them."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import PromptBatch
from rlhf.errors import ConfigError, DataError
from rlhf.evaluate.best_of_n import best_of_n_name, check_best_of_n, choose_best
from rlhf.evaluate.metrics import (
    compare_with_targets,
    monitored_win_rate,
    point_estimates,
    summarize,
)
from rlhf.evaluate.report_output import comparison_table, write_samples, write_unscored
from rlhf.evaluate.responses import Evaluation, ResponseBatch
from rlhf.files import write_json
from rlhf.metrics.evaluation_names import KL_TO, TARGET
from rlhf.models import Frozen, ModelSource, Policy
from rlhf.reward_functions import columns_of, end_as_in_training, load_reward_models, load_scorer, read_columns
from rlhf.sampling import Rollout, Sampler, SamplingParams
from rlhf.schema import PositiveInt, ScorerPath, check_arguments
from rlhf.stage.precision import frozen_on_device
from rlhf.stage.sampling_module import SamplingModule
from rlhf.tensors import masked_sum

log = logging.getLogger(__name__)


class EvaluateModule(SamplingModule):
    """Compares the responses of several models to held-out prompts.

    One model at a time is in memory. With several processes, each of them evaluates a share of the prompts.

    Args:
        models: Models to compare, by name. null: all policies of the run.
        baseline: Name of the model that win rates and KL refer to.
        reward_model: Reward model that scores the responses, or several as an ensemble. null: the reward model of the
            run, if there is one.
        gold: Additional function that scores the responses, as ``file.py:function``; see ``PythonReward``. null: none.
        sampling: Sampling settings, equal for all models.
        sampler: Sampler of the responses. null: ``LocalSampler``.
        output: Directory of metrics.json and samples.jsonl.
        bootstrap: Number of resamples behind each bootstrap interval.
        best_of_n: Also evaluate best-of-n sampling for these n: of n further responses to a prompt, the one that the
            reward model scores highest counts. It is listed as ``<model>_best_of_<n>``. null: none.
        best_of_n_model: Name of the model that best-of-n samples from. null: the baseline.
        tokenizer: Tokenizer of all models. null: the tokenizer of the baseline.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, ModelSource],
        baseline: str = "sft",
        reward_model: ModelSource | Sequence[ModelSource] | None = None,
        gold: ScorerPath | None = None,
        sampling: SamplingParams | None = None,
        sampler: Sampler | None = None,
        output: str,
        bootstrap: PositiveInt = 2000,
        best_of_n: Sequence[Annotated[int, ">= 2"]] | None = None,
        best_of_n_model: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(reward_model, sampling, sampler)
        check_arguments(EvaluateModule, "stage", locals())
        if baseline not in models:
            raise ConfigError(
                f"stage.baseline must be one of the models ({', '.join(models)}), got {baseline}.",
                f"Set stage.baseline={next(iter(models), '<model>')}.",
            )
        if TARGET in models:
            raise ConfigError(
                f"stage.models.{TARGET}: the name {TARGET} is reserved for the reference responses of the data.",
                "Give the model another name: stage.models={<name>: <path>}",
            )
        self.sources = dict(models)
        self.baseline = baseline
        self.gold = load_scorer(gold, key="stage.gold") if gold else None
        self.output = Path(output)
        self.bootstrap = bootstrap
        self.best_of_n = sorted(set(best_of_n or ()))
        self.best_of_n_model = best_of_n_model or baseline
        check_best_of_n(
            self.best_of_n,
            self.best_of_n_model,
            self.sources.keys(),
            self.sampling,
            has_reward_model=bool(self.reward_sources),
        )
        self.tokenizer = tokenizer or self.sources[baseline].tokenizer(())
        self.metrics: dict[str, Any] = {}

    def on_test_start(self) -> None:
        super().on_test_start()
        policies = {f"model {name}": source for name, source in self.sources.items()}
        self.check_positions(policies, self.reward_sources, "test")
        if self.gold is not None:
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            read_columns(self.gold.columns, datamodule, ("test",), self.gold.name)

    def on_test_epoch_end(self) -> None:
        responses: dict[str, list[ResponseBatch]] = {name: [] for name in self.sources}
        try:
            candidates = self.sample_models(responses)
            has_targets = all(prompt.target is not None for batch in self.batches for prompt in batch.prompts)
            targets = [self.encode_targets(batch) for batch in self.batches] if has_targets else []
            self.score_with_reward_model([*chain(*responses.values()), *targets, *chain(*candidates)])
            for n in self.best_of_n:
                chosen = choose_best(candidates, self.best_of_n_model, n)
                responses[best_of_n_name(self.best_of_n_model, n)] = chosen
                for batch in chosen:
                    batch.metrics |= self.gold_scores(batch.prompts, batch.texts)
        except Exception:
            self.keep(responses)
            raise
        if has_targets:
            responses[TARGET] = targets
        evaluation = Evaluation.of_batches(self.batches, responses).gather(self.batches)
        self.report(evaluation)

    def sample_models(self, sampled: dict[str, list[ResponseBatch]]) -> list[list[ResponseBatch]]:
        """Sample responses with every model, and estimate the KL to the baseline.

        The baseline comes last: it then evaluates the responses of all models. Every model samples from the same seed,
        so that its responses do not depend on which other models are evaluated.

        Args:
            sampled: The responses of each model by name, which this method appends to.

        Returns:
            The candidates of best-of-n sampling for each batch of prompts; no candidates without ``best_of_n``.
        """
        seed, candidates = torch.initial_seed(), []
        for name in sorted(self.sources, key=lambda name: name == self.baseline):
            started = time.perf_counter()
            torch.manual_seed(seed + self.global_rank)
            with frozen_on_device(self, Frozen(Policy(self.sources[name].language_model(self.tokenizer)))) as policy:
                self.sampler.sync(policy.model.lm, self.tokenizer)
                for batch in self.batches:
                    responses = self.sample_responses(policy, batch)
                    sampled[name].append(responses)
                    responses.metrics |= self.gold_scores(batch, responses.texts)
                if name == self.baseline:
                    for responses in chain.from_iterable(sampled.values()):
                        self.compare_with_baseline(policy, responses)
                if self.best_of_n and name == self.best_of_n_model:
                    candidates = [self.sample_candidates(batch) for batch in self.batches]
            log.info("%s: responses to all prompts took %.0f s", name, time.perf_counter() - started)
        return candidates

    def keep(self, sampled: Mapping[str, Sequence[ResponseBatch]]) -> None:
        """Write the responses of an evaluation that failed to unscored_samples.jsonl, one file for each process."""
        if not any(sampled.values()):
            return
        rank = f"_{self.global_rank}" if self.trainer.world_size > 1 else ""
        path = self.output / f"unscored_samples{rank}.jsonl"
        self.output.mkdir(parents=True, exist_ok=True)
        write_unscored(path, sampled)
        log.error("The evaluation failed. The responses sampled so far are in %s.", path)

    def sample_responses(self, policy: Frozen, batch: PromptBatch) -> ResponseBatch:
        """Sample a response to each prompt, and compute everything that needs no other model."""
        responses = self.sample_once(batch)
        with self.trainer.precision_plugin.forward_context():
            responses.logprobs = self.logprobs(policy, responses.rollout)
        return responses

    def sample_candidates(self, batch: PromptBatch) -> list[ResponseBatch]:
        """Sample as many responses to each prompt as the largest n of best-of-n needs."""
        return [self.sample_once(batch) for _ in range(max(self.best_of_n))]

    def sample_once(self, batch: PromptBatch) -> ResponseBatch:
        """Sample a response to each prompt with the current model of the sampler."""
        with self.trainer.precision_plugin.forward_context():
            rollout = self.sampler.sample(batch.input_ids, self.sampling)
        texts = rollout.decode(self.tokenizer)
        metrics = {"length": rollout.lengths.cpu(), "truncated": (~rollout.finished).cpu()}
        return ResponseBatch(batch, rollout.to("cpu"), texts, metrics=metrics)

    def compare_with_baseline(self, baseline: Frozen, batch: ResponseBatch) -> None:
        """Estimate the KL of the model that sampled the responses to the baseline, at the sampling temperature."""
        assert batch.logprobs is not None, "sampled responses have log-probs"
        with self.trainer.precision_plugin.forward_context():
            difference = batch.logprobs - self.logprobs(baseline, batch.rollout)
        batch.metrics[KL_TO + self.baseline] = masked_sum(difference, batch.rollout.response_mask)

    def logprobs(self, policy: Frozen, rollout: Rollout) -> Tensor:
        """Return the log-probs of the responses at the sampling temperature: [batch, time], on the CPU."""
        rollout, temperature = rollout.to(self.device), self.sampling.temperature or 1.0
        output = policy(rollout.input_ids, rollout.attention_mask, rollout.response_mask, temperature)
        logprobs: Tensor = output.logprobs.float().cpu()
        return logprobs

    def encode_targets(self, batch: PromptBatch) -> ResponseBatch:
        """Encode the reference responses of the data."""
        encoder = self.trainer.datamodule.encoder()  # type: ignore[attr-defined]
        texts = [str(prompt.target) for prompt in batch.prompts]
        rows = [
            encoder.encode_response(prompt.messages, text) for prompt, text in zip(batch.prompts, texts, strict=True)
        ]
        rollout = Rollout.from_responses(
            [row.input_ids[: row.start] for row in rows],
            [row.input_ids[row.start :] for row in rows],
            stop_ids=[self.tokenizer.eos_token_id],
        )
        metrics = {"length": rollout.lengths, **self.gold_scores(batch, texts)}
        return ResponseBatch(batch, rollout, texts, metrics=metrics)

    def gold_scores(self, batch: PromptBatch, texts: list[str]) -> dict[str, Sequence[float]]:
        """Score responses with the gold function, if there is one."""
        if self.gold is None:
            return {}
        prompts, targets = ([getattr(prompt, name) for prompt in batch.prompts] for name in ("raw_text", "target"))
        return {"gold": self.gold(prompts, texts, targets, columns_of(batch.prompts))}

    def score_with_reward_model(self, batches: Sequence[ResponseBatch]) -> None:
        """Score responses with the reward model, if there is one.

        Raises:
            DataError: A score is not finite.
        """
        if not self.reward_sources:
            return
        with frozen_on_device(self, load_reward_models(self.reward_sources, self.tokenizer)) as model:
            for batch in batches:
                tokens = end_as_in_training(batch.rollout.to(self.device), self.tokenizer)
                with self.trainer.precision_plugin.forward_context():
                    batch.metrics["reward"] = scores = model(*tokens).cpu()
                for score, text in zip(scores.tolist(), batch.texts, strict=True):
                    if not math.isfinite(score):
                        raise DataError(
                            f"The reward model returned the non-finite score {score} for the response {text!r}.",
                            "Choose another reward model: stage.reward_model=<path>",
                        )

    def report(self, evaluation: Evaluation) -> None:
        """Compute the metrics over all prompts, log them, and write them to files."""
        compare_with_targets(evaluation.responses, len(evaluation.prompts))
        summary = summarize(evaluation.responses, baseline=self.baseline, bootstrap=self.bootstrap)
        self.metrics = {"prompts": len(evaluation.prompts), "models": summary}
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.warning("trainer.fast_dev_run=true: metrics and samples are not written.")
        elif self.trainer.is_global_zero:
            self.output.mkdir(parents=True, exist_ok=True)
            self.write(evaluation)
        self.trainer.strategy.barrier()
        for logger in self.loggers:
            logger.log_metrics(point_estimates(summary), step=0)

    def write(self, evaluation: Evaluation) -> None:
        """Write samples.jsonl, and then metrics.json, which marks the evaluation as finished.

        The files of an earlier evaluation are replaced together: if the process is killed in between, there is no
        metrics.json, and if the new samples cannot be written, both earlier files stay.
        """
        samples, metrics, new = (self.output / name for name in ("samples.jsonl", "metrics.json", "samples.jsonl.new"))
        write_samples(new, evaluation.prompts, evaluation.targets, evaluation.responses)
        metrics.unlink(missing_ok=True)
        new.replace(samples)
        write_json(metrics, self.metrics)

    @property
    def monitored(self) -> float:
        """Win rate of the last model against the baseline, which ``train.py`` returns for sweeps."""
        of_models = {name: self.metrics["models"][name] for name in self.sources}
        return monitored_win_rate(of_models, self.baseline)

    def table(self) -> Table:
        """Return the comparison as a table for the terminal."""
        note = f" Best of n: the KL to {self.best_of_n_model} is an upper bound." if self.best_of_n else ""
        output = None if self.trainer.fast_dev_run else self.output  # type: ignore[attr-defined]
        return comparison_table(self.metrics, baseline=self.baseline, output=output, note=note)
