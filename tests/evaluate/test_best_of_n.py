"""Best-of-n: the choice by hand, the bound of the KL, and its place in the evaluation."""

import json
from collections.abc import Sequence
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from harness import DEMONSTRATIONS, FakeSource, isolated_score, quick_trainer
from rlhf.data import Prompt, PromptBatch, PromptDataModule
from rlhf.errors import ConfigError
from rlhf.evaluate import EvaluateModule
from rlhf.evaluate.best_of_n import choose_best
from rlhf.evaluate.objective import best_of_n_kl_bound
from rlhf.evaluate.responses import ResponseBatch
from rlhf.sampling import LocalSampler, Rollout, SamplingParams

PARAMS = SamplingParams(max_new_tokens=8, temperature=1.0)


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


@pytest.mark.parametrize(("n", "expected"), [(1, 0.0), (2, 0.19315), (4, 0.63629), (16, 1.83509)])
def test_kl_bound_by_hand(n: int, expected: float) -> None:
    """log 2 - 1/2 = 0.69315 - 0.5;  log 4 - 3/4 = 1.38629 - 0.75;  log 16 - 15/16 = 2.77259 - 0.9375."""
    assert best_of_n_kl_bound(n) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_bound_holds_for_discrete_responses_and_is_reached_by_many(n: int) -> None:
    """K equally likely responses of different reward: the best of n is the k-th worst with (k/K)^n - ((k-1)/K)^n."""

    def exact_kl(responses: int) -> float:
        steps = [(k / responses) ** n for k in range(responses + 1)]
        chances = [after - before for before, after in pairwise(steps)]
        return sum(chance * log(chance * responses) for chance in chances if chance > 0)

    assert exact_kl(4) < best_of_n_kl_bound(n) - 0.01
    assert exact_kl(4000) == pytest.approx(best_of_n_kl_bound(n), abs=0.01)
    assert exact_kl(4000) <= best_of_n_kl_bound(n)


def candidate(number: int, rewards: Sequence[float]) -> ResponseBatch:
    """Responses to two prompts: token ``10 * number + row``, once more for each number, then EOS (2)."""
    responses = [[*[10 * number + row] * number, 2] for row in range(2)]
    prompts = PromptBatch([[5], [6, 7]], [Prompt([{"role": "user", "content": text}], text) for text in "ab"])
    rollout = Rollout.from_responses(prompts.input_ids, responses, [2])
    metrics: dict[str, Any] = {
        "length": rollout.lengths,
        "truncated": torch.tensor([number == 3] * 2),
        "reward": torch.tensor(rewards),
    }
    return ResponseBatch(prompts, rollout, [f"{number}{row}" for row in "ab"], metrics=metrics)


def test_choice_by_hand() -> None:
    """Rewards of three candidates (rows) for two prompts (columns); the first of equal ones counts.

    1.0  5.0        best of 2: the second, the first
    3.0  4.0        best of 3: the second, the third
    3.0  9.0
    """
    candidates = [[candidate(1, [1.0, 5.0]), candidate(2, [3.0, 4.0]), candidate(3, [3.0, 9.0])]]
    (two,), (three,) = (choose_best(candidates, "sft", n) for n in (2, 3))
    assert two.texts == ["2a", "1b"]
    assert two.metrics == {
        "length": [3.0, 2.0],
        "truncated": [0.0, 0.0],
        "reward": [3.0, 5.0],
        "kl_to_sft": [pytest.approx(0.19315, abs=1e-5)] * 2,
    }
    assert two.rollout.response_ids() == [[20, 20, 2], [11, 2]]
    assert two.rollout.input_ids.tolist() == [[5, 20, 20, 2], [6, 7, 11, 2]]
    assert three.texts == ["2a", "3b"]
    assert three.metrics["reward"] == [3.0, 9.0]
    assert three.metrics["truncated"] == [0.0, 1.0]
    assert three.metrics["kl_to_sft"] == [pytest.approx(log(3) - 2 / 3)] * 2


class RecordingSampler(LocalSampler):
    """Records all rollouts, in the order in which they were sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[Rollout] = []

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        self.rollouts.append(super().sample(prompts, params))
        return self.rollouts[-1]


class Evaluation:
    """Evaluates two tiny models on the 8 prompts of the harness, in one batch."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, policy: FakeSource, reward_model: FakeSource
    ) -> None:
        self.folder, self.tokenizer, self.reward_model = folder, tokenizer, reward_model
        other = FakeSource(policy.language_model(None))
        with torch.no_grad():
            other.model.get_output_embeddings().weight.mul_(1.5)
        self.models = {"sft": policy, "ppo": other}
        (folder / "gold.py").write_text("def score(prompts, responses): return [len(r) for r in responses]")

    def run(self, **keys: Any) -> EvaluateModule:
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
        defaults = {
            "models": self.models,
            "reward_model": self.reward_model,
            "gold": f"{self.folder / 'gold.py'}:score",
            "sampling": PARAMS,
            "sampler": RecordingSampler(),
            "output": str(self.folder / "out"),
            "bootstrap": 20,
        }
        module = EvaluateModule(tokenizer=self.tokenizer, **{**defaults, **keys})
        data = PromptDataModule(
            test=str(self.folder / "prompts.jsonl"), max_length=64, eval_batch_size=8, tokenizer=self.tokenizer
        )
        torch.manual_seed(7)
        quick_trainer(default_root_dir=self.folder).test(module, data, verbose=False)
        return module

    def samples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out" / "samples.jsonl").open(newline="\n")]


@pytest.fixture
def evaluation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, policy: FakeSource, reward_model: FakeSource
) -> Evaluation:
    return Evaluation(tmp_path, tokenizer, policy, reward_model)


def test_best_of_n_in_an_evaluation(evaluation: Evaluation, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each chosen response is the candidate to which the reward model, applied to it alone, gives the highest score."""
    module = evaluation.run(best_of_n=[2, 4])
    rollouts = module.sampler.rollouts
    assert len(rollouts) == 1 + 1 + 4, "of ppo, of sft, and the candidates of sft"
    scores = torch.tensor(
        [
            [
                isolated_score(evaluation.reward_model.model, ids[mask])
                for ids, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True)
            ]
            for rollout in rollouts[2:]
        ]
    )
    texts = [rollout.decode(tokenizer) for rollout in rollouts[2:]]
    assert len({tuple(column) for column in texts}) == 4, "the candidates differ"
    for n in (2, 4):
        best, which = scores[:n].max(dim=0)
        summary = module.metrics["models"][f"sft_best_of_{n}"]
        chosen = [sample["responses"][f"sft_best_of_{n}"] for sample in evaluation.samples()]
        assert [response["text"] for response in chosen] == [texts[int(i)][row] for row, i in enumerate(which)]
        assert [response["reward"] for response in chosen] == pytest.approx(best.tolist(), abs=1e-4)
        assert [response["gold"] for response in chosen] == [len(response["text"]) for response in chosen]
        assert summary["reward"]["mean"] == pytest.approx(float(best.mean()), abs=1e-5)
        bound = log(n) - (n - 1) / n
        assert summary["kl_to_sft"] == pytest.approx({"mean": bound, "low": bound, "high": bound})
        own = torch.tensor([sample["responses"]["sft"]["reward"] for sample in evaluation.samples()])
        wins = (best > own).double() + 0.5 * (best == own).double()
        assert summary["win_rate_vs_sft"]["reward"]["value"] == pytest.approx(float(wins.mean()))
        assert "gold" in summary["win_rate_vs_sft"]
        assert "win_rate_vs_target" in summary
        assert "rougeL" in summary
    assert list(module.metrics["models"]) == ["sft", "ppo", "sft_best_of_2", "sft_best_of_4", "target"]


def test_best_of_n_changes_no_other_result(evaluation: Evaluation) -> None:
    """The models, the targets and the metric of a sweep are those of an evaluation without it."""
    module = evaluation.run(best_of_n=[3])
    without = evaluation.run()
    assert {name: module.metrics["models"][name] for name in without.metrics["models"]} == without.metrics["models"]
    assert module.monitored == without.monitored
    assert "upper bound" in str(module.table().caption)
    assert "upper bound" not in str(without.table().caption)


def test_another_model_than_the_baseline_can_sample(evaluation: Evaluation) -> None:
    """The bound refers to the model that samples, so there is no KL to the baseline."""
    module = evaluation.run(best_of_n=[2], best_of_n_model="ppo")
    summary = module.metrics["models"]["ppo_best_of_2"]
    assert summary["kl_to_ppo"]["mean"] == pytest.approx(0.19315, abs=1e-5)
    assert "kl_to_sft" not in summary
    assert module.monitored == module.metrics["models"]["ppo"]["win_rate_vs_sft"]["gold"]["value"]


def test_responses_survive_a_gold_function_that_fails_on_the_chosen_ones(evaluation: Evaluation) -> None:
    """It fails in its fourth call, after those for two models and for the targets."""
    (evaluation.folder / "gold.py").write_text(
        "calls = []\n"
        "def score(prompts, responses):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: raise KeyError('fourth call')\n"
        "    return [0.0] * len(responses)\n"
    )
    with pytest.raises(KeyError, match="fourth call"):
        evaluation.run(best_of_n=[2])
    lines = (evaluation.folder / "out" / "unscored_samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in lines} >= {"sft", "ppo"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward_model": None}, r"^stage\.best_of_n=\[4\] requires a reward model"),
        ({"best_of_n": [4, 1]}, r"^stage\.best_of_n must be a list of integers of at least 2 or null, got \[4,1\]"),
        ({"best_of_n_model": "dpo"}, r"^stage\.best_of_n_model must be one of the models \(sft, ppo\), got dpo"),
        ({"sampling": SamplingParams(temperature=0)}, r"^stage\.best_of_n=\[4\] has no effect with .*temperature=0"),
    ],
)
def test_settings_that_cannot_work(evaluation: Evaluation, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluation.run(**{"best_of_n": [4], **keys})


def test_a_name_that_is_taken(evaluation: Evaluation) -> None:
    evaluation.models["sft_best_of_4"] = evaluation.models["ppo"]
    with pytest.raises(ConfigError, match="there is already a model with the name sft_best_of_4"):
        evaluation.run(best_of_n=[4])
