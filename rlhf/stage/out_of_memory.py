"""Out of memory: a message that says what was running and which keys to change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, NamedTuple

from rlhf.errors import ConfigError, TrainingError, first_line
from rlhf.stage.memory import is_out_of_memory


@contextmanager
def report_out_of_memory(stage: str, module: Any, datamodule: Any) -> Iterator[None]:
    """Turn an error of memory in this context into one that names what was running and which keys to change.

    Args:
        stage: Name of the stage.
        module: Its module.
        datamodule: Its data.

    Raises:
        TrainingError: Memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Module and name of each function that was running.
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        running = {(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames}
        in_validation = any(function == "validation_step" for _, function in running)
        is_evaluation = in_validation or ("lightning.pytorch.trainer.trainer", "test") in running
        found = (phase for function, phase in PHASES.items() if function in running)
        phase = next(found, EVALUATION if is_evaluation else TRAINING)
        raise TrainingError(
            f"stage={stage} has run out of memory while {phase.text} ({first_line(error)}).",
            phase.advice(Advice(module, datamodule, in_validation)),
        ) from error


@dataclass
class Advice:
    """Keys to change when memory runs out, with values where one half of the current value is enough.

    Args:
        module: The stage.
        datamodule: Its data.
        in_validation: Memory has run out in a validation step.
    """

    module: Any
    datamodule: Any
    in_validation: bool = False

    def table(self) -> str:
        """Return what to change for a table of samples."""
        samples = self.module.samples
        overrides = [f"stage.samples={samples // 2}"]
        if samples > 1 and hasattr(self.module.sampler, "batch_size"):
            overrides.append(
                f"stage.sampler.batch_size={_half(min(self.module.sampler.batch_size or samples, samples))}"
            )
        return f"Set {', '.join(overrides)} or stage.max_new_tokens={_half(self.module.sampling.max_new_tokens)}."

    def sampling(self) -> str:
        """Return what to change for the responses to a batch of prompts."""
        if self._on_policy:
            key, size = "stage.rollout_batch_size", self.module.rollout_batch_size or self._responses
        else:
            key, size = "data.eval_batch_size", self.datamodule.eval_batch_size
        limit = getattr(self.module.sampler, "batch_size", None)
        if limit is not None and limit < self._responses:
            key, size = "stage.sampler.batch_size", min(limit, size)
        return f"Set {key}={_half(min(size, self._responses))}. Otherwise set {self._shorter}."

    def scoring(self) -> str:
        """Return what to change for the scores of a rollout."""
        parts = {"reward": self.module.reward}
        components = getattr(self.module.reward, "components", {})
        parts |= {f"reward.components.{name}": component for name, component in components.items()}
        sizes = {key: part.batch_size for key, part in parts.items() if hasattr(part, "batch_size")}
        overrides = [f"{key}.batch_size={_half(min(size, self._responses))}" for key, size in sizes.items()]
        return f"Set {' or '.join([*overrides, self._shorter])}."

    def rollout(self) -> str:
        """Return what to change for the log-probs and values of a rollout."""
        smaller = self._smaller_batches()
        return f"Set {self._shorter}." if smaller is None else f"Set {smaller}.\n  Otherwise set {self._shorter}."

    def evaluation(self) -> str:
        """Return what to change for passes over the data without training."""
        return f"Set data.eval_batch_size={_half(self.datamodule.eval_batch_size)}. Otherwise set {self._shorter}."

    def step(self) -> str:
        """Return what to change for training steps."""
        otherwise = self._shorter
        if not self.module.gradient_checkpointing:
            otherwise = f"stage.gradient_checkpointing=true or {otherwise}"
        # If batches have been split, a single row does not fit.
        smaller = self._smaller_batches() if self.module.splitter is None else None
        if smaller is None:
            return f"Set {otherwise}."
        if self._can_split:
            smaller += ", or stage.on_out_of_memory=halve, which splits batches when it is necessary"
        return f"Set {smaller}.\n  Otherwise set {otherwise}."

    def _smaller_batches(self) -> str | None:
        """Return the overrides that halve training batches and keep the size of updates; None for single rows."""
        if self._on_policy:
            key, size = "stage.minibatch_size", min(self.module.minibatch_size, self._responses)
            rows = self.datamodule.batch_size * self.module.num_generations  # of a rollout in training
            before, after = min(self.module.minibatch_size, rows), min(size // 2, rows)
        else:
            key, size = "data.batch_size", self.datamodule.batch_size
            rows, before, after = size, size, size // 2
        if size < 2:
            return None
        overrides = f"{key}={size // 2}"
        if after < before:
            if before != 2 * after or rows % before:
                return overrides
            overrides += self._twice_as_many_batches()
        return f"{overrides}, which keeps the size of updates" if self._can_split else overrides

    def _twice_as_many_batches(self) -> str:
        """Return the overrides for batches of one half: of an optimizer step, and of a limited epoch."""
        trainer = self.module.trainer
        overrides = f" trainer.accumulate_grad_batches={2 * trainer.accumulate_grad_batches}"
        key = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
        limit = getattr(trainer, key)
        return f"{overrides} trainer.{key}={2 * limit}" if isinstance(limit, int) else overrides

    @property
    def _on_policy(self) -> bool:
        return hasattr(self.module, "minibatch_size")

    @property
    def _responses(self) -> int:
        """Number of responses to the batch of prompts that was computed."""
        trains = self._on_policy and not self.in_validation
        prompts: int = self.datamodule.batch_size if trains else self.datamodule.eval_batch_size
        return prompts * int(getattr(self.module, "num_generations", 1))

    @property
    def _shorter(self) -> str:
        """The overrides that halve the length of sequences. A prompt needs a part of ``data.max_length``."""
        length, budget = max(self.datamodule.max_length // 2, 2), getattr(self.module, "response_budget", None)
        if budget is None:
            return f"data.max_length={length}"
        return f"stage.sampling.max_new_tokens={_half(budget)} data.max_length={max(length, _half(budget) + 1)}"

    @property
    def _can_split(self) -> bool:
        """Whether batches in chunks give the same result."""
        try:
            self.module.check_splitting()
        except ConfigError:
            return False
        return True


def _half(number: int) -> int:
    return max(number // 2, 1)


class Phase(NamedTuple):
    """What may be running when memory runs out.

    Attributes:
        text: Its name in the message.
        advice: What to change.
    """

    text: str
    advice: Callable[[Advice], str]


TABLE = Phase("computing a table of samples", Advice.table)
SAMPLING = Phase("sampling responses", Advice.sampling)
ROLLOUT = Phase("evaluating a rollout", Advice.rollout)
SCORING = Phase("scoring responses", Advice.scoring)
REFERENCE = Phase("computing reference log-probs", Advice.evaluation)
EVALUATION = Phase("computing validation or test metrics", Advice.evaluation)
TRAINING = Phase("computing a training step", Advice.step)
# By a function on the traceback. The first of these that is found counts.
PHASES = {
    ("rlhf.stage.sample_table", "show_samples"): TABLE,
    ("rlhf.sampling.sampler", "sample"): SAMPLING,
    ("rlhf.rl.collector", "sample"): SAMPLING,
    ("rlhf.rl.collector", "evaluate_rollout"): ROLLOUT,
    ("rlhf.rl.collector", "score"): SCORING,
    ("rlhf.collect.module", "score"): SCORING,
    ("rlhf.dpo.ref_logprobs", "fill"): REFERENCE,
}
