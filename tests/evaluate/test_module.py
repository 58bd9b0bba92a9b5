"""The evaluation stage in Lightning's test loop."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from harness import DEMONSTRATIONS, FakeSource, MetricsLogger, quick_trainer, tiny_reward_model
from rlhf.data import PromptDataModule
from rlhf.errors import ConfigError
from rlhf.evaluate import EvaluateModule
from rlhf.models import Policy
from rlhf.sampling import Rollout, SamplingParams

PARAMS = SamplingParams(max_new_tokens=8, temperature=0.7)


class FakeSampler:
    """Responds with the first token of the prompt and EOS, and records the policies that it is synchronized with."""

    def __init__(self) -> None:
        self.policies: list[PreTrainedModel] = []

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.policies.append(policy)
        self.eos = tokenizer.eos_token_id

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        return Rollout.from_responses(prompts, [[prompt[1], self.eos] for prompt in prompts], [self.eos])


class Evaluation:
    """Evaluates tiny models on the 8 prompts of the harness, in batches of 3."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.logger = MetricsLogger()

    def run(self, rows: list[dict[str, Any]] = DEMONSTRATIONS, **keys: Any) -> EvaluateModule:
        path = self.folder / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"sampling": PARAMS, "output": str(self.folder / "out"), "bootstrap": 20, **keys}
        module = EvaluateModule(tokenizer=self.tokenizer, **keys)
        datamodule = PromptDataModule(test=str(path), max_length=64, eval_batch_size=3, tokenizer=self.tokenizer)
        torch.manual_seed(7)
        quick_trainer(default_root_dir=self.folder, logger=self.logger).test(module, datamodule, verbose=False)
        return module


@pytest.fixture
def evaluation(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Evaluation:
    return Evaluation(tmp_path, tokenizer)


def shifted(source: FakeSource) -> FakeSource:
    """A source of the same model with other weights."""
    other = FakeSource(source.language_model(None))
    with torch.no_grad():
        other.model.get_output_embeddings().weight.mul_(1.5)
    return other


def test_models_are_sampled_scored_and_compared(
    evaluation: Evaluation, policy: FakeSource, reward_model: FakeSource, tmp_path: Path
) -> None:
    """All metrics of two models and of the targets; files and logger agree with the module."""
    gold = tmp_path / "gold.py"
    gold.write_text("def score(prompts, responses): return [len(response) for response in responses]")
    models = {"sft": policy, "ppo": shifted(policy)}
    module = evaluation.run(models=models, reward_model=reward_model, gold=f"{gold}:score")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == module.metrics
    assert written["prompts"] == 8
    assert list(written["models"]) == ["sft", "ppo", "target"]
    metrics = ["length", "truncated", "kl_to_sft", "reward", "gold", "rougeL"]
    assert list(written["models"]["sft"]) == [*metrics, "win_rate_vs_target"]
    assert list(written["models"]["ppo"]) == [*metrics, "win_rate_vs_sft", "win_rate_vs_target"]
    assert list(written["models"]["target"]) == ["length", "reward", "gold", "rougeL", "win_rate_vs_sft"]
    assert written["models"]["target"]["rougeL"]["mean"] == 1.0
    assert written["models"]["sft"]["kl_to_sft"]["mean"] == 0.0
    assert module.monitored == written["models"]["ppo"]["win_rate_vs_sft"]["gold"]["value"]
    (logged,) = evaluation.logger.calls
    assert logged["ppo/gold"] == written["models"]["ppo"]["gold"]["mean"]
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in samples} == {row["prompt"] for row in DEMONSTRATIONS}


def test_responses_come_from_the_configured_sampler(evaluation: Evaluation, policy: FakeSource) -> None:
    """The sampler is synchronized with each model before each of the 3 batches."""
    sampler = FakeSampler()
    module = evaluation.run(models={"sft": policy, "ppo": shifted(policy)}, sampler=sampler)
    of_models = [module.policies[name].model.lm for name in ("sft", "ppo")]
    assert [id(lm) for lm in sampler.policies] == [id(lm) for lm in of_models] * 3
    assert module.metrics["models"]["ppo"]["length"]["mean"] == 2.0
    assert module.metrics["models"]["ppo"]["truncated"]["mean"] == 0.0


def test_kl_to_the_baseline_by_hand(
    evaluation: Evaluation, policy: FakeSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The sum over each response of log pi - log pi_baseline at the sampling temperature, averaged over responses."""
    other, sampler = shifted(policy), FakeSampler()
    module = evaluation.run(models={"sft": policy, "ppo": other}, sampler=sampler)
    encoder = module.trainer.datamodule.encoder()
    differences = []
    for row in DEMONSTRATIONS:
        prompt = encoder.encode_prompt([{"role": "user", "content": row["prompt"]}], reserve=8)
        ids = torch.tensor([[*prompt, prompt[1], tokenizer.eos_token_id]])
        everything = torch.ones_like(ids, dtype=torch.bool)
        response = torch.arange(ids.shape[1])[None] >= len(prompt)
        with torch.no_grad():
            logprobs, baseline = (
                Policy(source.model.eval())(ids, everything, response, 0.7).logprobs.sum() for source in (other, policy)
            )
        differences.append(float(logprobs - baseline))
    expected = sum(differences) / len(differences)
    assert module.metrics["models"]["ppo"]["kl_to_sft"]["mean"] == pytest.approx(expected, rel=1e-4)


def test_several_reward_models_score_as_an_ensemble(evaluation: Evaluation, policy: FakeSource) -> None:
    """Members whose scores are s and s + 2 give s + 1 on average."""
    member = tiny_reward_model(policy.model)
    other = FakeSource(member).scalar_model(None)
    other.reward_mean.sub_(2.0)
    runs = [
        evaluation.run(models={"sft": policy}, sampler=FakeSampler(), reward_model=reward_model)
        for reward_model in (FakeSource(member), [FakeSource(member)], [FakeSource(member), FakeSource(other)])
    ]
    single, listed, ensemble = (run.metrics["models"]["sft"]["reward"]["mean"] for run in runs)
    assert listed == single
    assert ensemble == pytest.approx(single + 1.0, rel=1e-5)


def test_targets_are_left_out_if_a_prompt_has_none(evaluation: Evaluation, policy: FakeSource) -> None:
    rows = [*DEMONSTRATIONS[:4], {"prompt": "Who won?"}]
    module = evaluation.run(rows, models={"sft": policy}, sampler=FakeSampler())
    assert list(module.metrics["models"]) == ["sft"]
    assert "rougeL" not in module.metrics["models"]["sft"]


def test_baseline_must_be_one_of_the_models(policy: FakeSource) -> None:
    with pytest.raises(ConfigError, match=r"stage\.baseline must be one of the models \(ppo\), got sft"):
        EvaluateModule(models={"ppo": policy}, output="unused")
