"""Best-of-n sampling as a baseline: of n responses to a prompt, the one with the highest reward counts."""

from collections.abc import Collection, Sequence

import torch

from rlhf.errors import ConfigError
from rlhf.evaluate.objective import best_of_n_kl_bound
from rlhf.evaluate.responses import ResponseBatch
from rlhf.metrics.evaluation_names import KL_TO
from rlhf.sampling import Rollout, SamplingParams


def best_of_n_name(model: str, n: int) -> str:
    """Return the name under which best-of-n is listed with the models, such as ``sft_best_of_4``."""
    return f"{model}_best_of_{n}"


def check_best_of_n(
    sizes: Sequence[int], model: str, models: Collection[str], sampling: SamplingParams, *, has_reward_model: bool
) -> None:
    """Reject settings with which best-of-n cannot be evaluated.

    Args:
        sizes: The values of n.
        model: Name of the model that samples.
        models: Names of all models.
        sampling: Sampling settings.
        has_reward_model: Whether there is a reward model that can choose.

    Raises:
        ConfigError: The message names the key and the fix.
    """
    if not sizes:
        return
    setting = f"stage.best_of_n=[{','.join(map(str, sizes))}]"
    if model not in models:
        raise ConfigError(
            f"stage.best_of_n_model must be one of the models ({', '.join(models)}), got {model}.",
            f"Set stage.best_of_n_model={next(iter(models))}.",
        )
    if not has_reward_model:
        raise ConfigError(
            f"{setting} requires a reward model, which chooses the responses.", "Set stage.reward_model=<path>"
        )
    if sampling.temperature == 0:
        raise ConfigError(
            f"{setting} has no effect with stage.sampling.temperature=0: all responses to a prompt are the same.",
            "Set stage.sampling.temperature=0.7.",
        )
    if taken := [name for n in sizes if (name := best_of_n_name(model, n)) in models]:
        raise ConfigError(
            f"{setting}: there is already a model with the name {taken[0]}.",
            "Choose the models and give them other names: stage.models={<name>: <path>}",
        )


def choose_best(candidates: Sequence[Sequence[ResponseBatch]], model: str, n: int) -> list[ResponseBatch]:
    """Choose the best of the first n candidates for each prompt. If several have the highest reward, the first counts.

    Args:
        candidates: Scored candidates for each batch of prompts: the same prompts with another response each time.
        model: Name of the model that sampled them.
        n: Number of candidates to choose from.

    Returns:
        The chosen responses, with a bound instead of an estimate as ``kl_to_<model>``.
    """
    return [_best(batches[:n], model) for batches in candidates]


def _best(batches: Sequence[ResponseBatch], model: str) -> ResponseBatch:
    rewards = torch.stack([torch.as_tensor(batch.metrics["reward"]) for batch in batches])
    chosen: list[int] = rewards.argmax(dim=0).tolist()
    rows = list(enumerate(chosen))
    responses = [batches[which].rollout.response_ids()[row] for row, which in rows]
    prompts = batches[0].prompts
    rollout = Rollout.from_responses(prompts.input_ids, responses, stop_ids=())
    metrics = {
        name: [float(batches[which].metrics[name][row]) for row, which in rows]
        for name in ("length", "truncated", "reward")
    }
    metrics[KL_TO + model] = [best_of_n_kl_bound(len(batches))] * len(rows)
    return ResponseBatch(prompts, rollout, [batches[which].texts[row] for row, which in rows], metrics=metrics)
