"""Two ranks with batches of B give the same update as one process with batches of 2 B, in every stage."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import ON_POLICY, STAGES, TinyRun, make_eos_likely
from ranks import DDP, in_ranks
from rlhf.rl.advantages import reinforce_pp
from rlhf.sampling import Rollout, SamplingParams

# 5 steps of 6 sequences: an epoch over 8 records ends with a batch of 2. The schedule and the clipping of gradients are
# the same whatever the number of ranks.
TRAINER = {"max_epochs": 3, "max_steps": 5, "gradient_clip_val": 0.5}
KEYS: dict[str, dict[str, Any]] = {
    "sft": {"schedule": "linear", "warmup_ratio": 0.2},
    "reward": {"num_heads": 2, "centering_coef": 0.1},
    "dpo": {"sft_coef": 0.5},
    "kto": {"sft_coef": 0.5},
    "ppo": {"whiten_rewards": True},
    "grpo": {},
    "reinforce_pp": {"advantage": reinforce_pp},
}
LOSS = ("sft", "reward", "dpo", "kto")
EPS = 1e-4  # AdamW then does not turn rounding errors of gradients that are nearly 0 into full steps.
LIMIT = 1e-5  # largest relative difference of weights


class FixedResponses:
    """A sampler whose responses depend on the prompt and on the number of the call only, not on random numbers."""

    def __init__(self) -> None:
        self.calls = 0

    def sync(self, policy: Any, tokenizer: Any) -> None:
        self.stop_id, self.device = tokenizer.eos_token_id, policy.device

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        self.calls += 1
        responses, seen = [], {}
        for prompt in prompts:
            seen[tuple(prompt)] = copy = seen.get(tuple(prompt), 0) + 1
            generator = torch.Generator().manual_seed(1000 * self.calls + 10 * sum(prompt) + copy)
            length = int(torch.randint(1, 8, (), generator=generator))
            tokens = torch.randint(3, 300, (length,), generator=generator).tolist()
            responses.append([*tokens, self.stop_id] if length < 6 else tokens)
        return Rollout.from_responses(prompts, responses, [self.stop_id], self.device)


def settings(stage: str, ranks: int) -> dict[str, Any]:
    """Return the keywords of a run whose global batch does not depend on the number of ranks."""
    if stage not in (*ON_POLICY, "reinforce_pp"):
        return {**KEYS[stage], "eps": EPS, "data": {"batch_size": 6 // ranks}, "trainer": TRAINER}
    generations = 1 if stage == "ppo" else 2
    return {
        **KEYS[stage],
        "eps": EPS,
        "sampler": FixedResponses(),
        "num_generations": generations,
        "ppo_epochs": 2,
        "minibatch_size": 4 * generations // ranks,  # The order within a rollout is random: one minibatch per pass.
        "data": {"batch_size": 4 // ranks},
        "trainer": {"max_steps": 4, "gradient_clip_val": 0.5},
    }


def train(rank: int, tiny_run: TinyRun, stages: Sequence[str], ranks: int) -> dict[str, Any]:
    """Train each stage and return its weights and all values that it has logged."""
    results = {}
    for stage in stages:
        keys = settings(stage, ranks)
        flags = {**keys.pop("trainer"), **(DDP if ranks > 1 else {}), "default_root_dir": tiny_run.folder}
        module = "grpo" if stage == "reinforce_pp" else stage
        rows = STAGES[module].records[:5]  # an odd number, so that the ranks have different weights
        data = {**keys.pop("data"), "val": tiny_run.write("val", rows), "eval_batch_size": 4 // ranks}
        run = tiny_run.train(module, trainer=flags, data=data, **keys)
        names = {name for call in run.logger.calls for name in call if not name.startswith(("throughput/", "report/"))}
        results[stage] = run.weights, {name: run.curve(name) for name in names}
    return results


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, source: Any) -> dict[str, Any]:
    """Weights and logged values of every stage: of one process, of rank 0 and of rank 1."""
    torch.manual_seed(0)
    lm = make_eos_likely(source.language_model(tokenizer).eval(), tokenizer.eos_token_id)
    runs = [TinyRun(Path(tmp_path_factory.mktemp("runs")), tokenizer, lm) for _ in range(2)]
    one = train(0, runs[0], list(KEYS), 1)
    two = in_ranks(train, runs[1], list(KEYS), 2)
    return {stage: (one[stage], two[0][stage], two[1][stage]) for stage in KEYS}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight relative to the largest one of its tensor."""
    assert one.keys() == other.keys()
    tensors = [name for name, value in one.items() if isinstance(value, Tensor)]
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp(min=1e-8)) for n in tensors)


@pytest.mark.parametrize("stage", KEYS)
def test_two_ranks_train_the_weights_of_one_process(results: dict[str, Any], stage: str) -> None:
    (one, _), (first, _), (second, _) = results[stage]
    assert largest_difference(first, second) == 0
    assert largest_difference(one, first) <= LIMIT


@pytest.mark.parametrize("stage", KEYS)
def test_two_ranks_log_the_metrics_of_one_process(results: dict[str, Any], stage: str) -> None:
    """Rewards of DPO are small differences of log-probs, whose rounding the first steps of AdamW amplify."""
    (_, one), (_, first), (_, second) = results[stage]
    assert one.keys() == first.keys() == second.keys()
    assert one.keys() > ({"train/loss", "val/loss"} if stage in LOSS else {"objective/kl", "val/score"})
    for name, values in one.items():
        assert all(map(math.isfinite, values)), name
        assert first[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
        assert second[name] == first[name], name
