"""The evaluation stage in Lightning's test loop."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from harness import DEMONSTRATIONS, FakeSource, MetricsLogger, quick_trainer, tiny_reward_model
from rlhf.data import PromptDataModule
from rlhf.errors import ConfigError, DataError
from rlhf.evaluate import EvaluateModule
from rlhf.models import Policy
from rlhf.sampling import Rollout, SamplingParams

PARAMS = SamplingParams(max_new_tokens=8, temperature=0.7)


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


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

    def run(
        self, rows: list[dict[str, Any]] = DEMONSTRATIONS, trainer: dict[str, Any] | None = None, **keys: Any
    ) -> EvaluateModule:
        path = self.folder / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"sampling": PARAMS, "output": str(self.folder / "out"), "bootstrap": 20, **keys}
        module = EvaluateModule(tokenizer=self.tokenizer, **keys)
        datamodule = PromptDataModule(test=str(path), max_length=64, eval_batch_size=3, tokenizer=self.tokenizer)
        torch.manual_seed(7)
        flags = {"default_root_dir": self.folder, "logger": self.logger, **(trainer or {})}
        quick_trainer(**flags).test(module, datamodule, verbose=False)
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
    metrics = ["length", "truncated", "gold", "kl_to_sft", "reward", "rougeL"]
    assert list(written["models"]["sft"]) == [*metrics, "win_rate_vs_target"]
    assert list(written["models"]["ppo"]) == [*metrics, "win_rate_vs_sft", "win_rate_vs_target"]
    assert list(written["models"]["target"]) == ["length", "gold", "reward", "rougeL", "win_rate_vs_sft"]
    assert written["models"]["target"]["rougeL"]["mean"] == 1.0
    assert written["models"]["sft"]["kl_to_sft"]["mean"] == 0.0
    assert module.monitored == written["models"]["ppo"]["win_rate_vs_sft"]["gold"]["value"]
    (logged,) = evaluation.logger.calls
    assert logged["ppo/gold"] == written["models"]["ppo"]["gold"]["mean"]
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in samples} == {row["prompt"] for row in DEMONSTRATIONS}


def test_responses_come_from_the_configured_sampler(evaluation: Evaluation, policy: FakeSource) -> None:
    """The sampler is synchronized with each model once, before its first batch."""
    sampler = FakeSampler()
    module = evaluation.run(models={"sft": policy, "ppo": shifted(policy)}, sampler=sampler)
    assert len(sampler.policies) == 2
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


def test_names_of_models_may_contain_dots(evaluation: Evaluation, policy: FakeSource) -> None:
    """Paths such as ``outputs/b/dpo/dpo_final.pt`` and variants such as ``dpo_0.1`` are names as well."""
    module = evaluation.run(models={"sft": policy, "dpo_0.1": policy}, sampler=FakeSampler())
    assert list(module.metrics["models"])[:2] == ["sft", "dpo_0.1"]


class CountedSource(FakeSource):
    """Counts the models that have been opened and still have weights in memory, at each opening of another one."""

    opened: ClassVar[list[torch.nn.Module]] = []
    counts: ClassVar[list[int]] = []

    def language_model(self, tokenizer: Any) -> Any:
        alive = [model for model in self.opened if any(not weight.is_meta for weight in model.parameters())]
        self.counts.append(len(alive))
        self.opened.append(super().language_model(tokenizer))
        return self.opened[-1]

    scalar_model = language_model


def test_one_model_at_a_time_is_in_memory(
    evaluation: Evaluation, policy: FakeSource, reward_model: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three policies and the reward model is opened once, when no other one has its weights any more.

    The sampler of this test keeps a reference to each of them.
    """
    monkeypatch.setattr(CountedSource, "opened", [])
    monkeypatch.setattr(CountedSource, "counts", [])
    models = {name: CountedSource(policy.model) for name in ("sft", "ppo", "dpo")}
    evaluation.run(models=models, reward_model=CountedSource(reward_model.model), sampler=FakeSampler())
    assert CountedSource.counts == [0] * 4


def test_responses_of_a_model_do_not_depend_on_the_other_models(evaluation: Evaluation, policy: FakeSource) -> None:
    """Every model samples from the same seed. A model that equals the baseline has the same responses."""
    alone = evaluation.run(models={"sft": policy}).metrics["models"]["sft"]
    models = {"sft": policy, "ppo": shifted(policy), "copy": policy}
    together = evaluation.run(models=models).metrics["models"]
    assert {name: together["sft"][name] for name in alone if "win" not in name} == {
        name: value for name, value in alone.items() if "win" not in name
    }
    assert together["copy"]["kl_to_sft"]["mean"] == 0.0
    assert together["copy"]["length"] == together["sft"]["length"]


class Casts(TorchDispatchMode):
    """Records the shape of each matrix that is cast from float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("_to_copy", "to") and args[0].dtype == torch.float32:
            self.shapes += [result.shape] if result.dtype == torch.bfloat16 else []
        return result


def test_frozen_policies_are_not_cast_at_every_step(evaluation: Evaluation, policy: FakeSource) -> None:
    """Each weight of a linear layer is cast once, when the model is opened.

    Autocast alone would cast the weights of a frozen model at each of the 8 decoding steps of 3 batches. The output
    embedding is tied to the input embedding and stays in float32.
    """
    layers = [part for part in policy.model.modules() if isinstance(part, torch.nn.Linear)]
    shapes = [layer.weight.shape for layer in layers if layer is not policy.model.get_output_embeddings()]
    with Casts() as casts:
        evaluation.run(models={"sft": policy}, trainer={"precision": "bf16-mixed"})
    assert {shape: casts.shapes.count(shape) for shape in shapes} == Counter(shapes)


class RecordingRewardModel(torch.nn.Module):
    """Records the last token of each sequence that it scores."""

    last: ClassVar[list[int]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        self.last.extend(int(row[mask][-1]) for row, mask in zip(input_ids, attention_mask, strict=True))
        return torch.zeros(len(input_ids))


@pytest.mark.parametrize("explicit", [True, False], ids=["stop_tokens", "generation_config"])
def test_responses_that_end_with_a_stop_token_are_completed_for_the_reward_model(
    evaluation: Evaluation, policy: FakeSource, monkeypatch: pytest.MonkeyPatch, explicit: bool
) -> None:
    """All tokens are stop tokens. 8 responses and 8 targets are scored, all of them at an EOS."""
    monkeypatch.setattr(RecordingRewardModel, "last", [])
    eos = evaluation.tokenizer.eos_token_id
    vocabulary = {text: token for text, token in evaluation.tokenizer.get_vocab().items() if token != eos}
    policy.model.generation_config.eos_token_id = list(vocabulary.values())
    sampling = SamplingParams(max_new_tokens=8, stop_tokens=list(vocabulary) if explicit else None)
    evaluation.run(models={"sft": policy}, reward_model=FakeSource(RecordingRewardModel()), sampling=sampling)
    assert RecordingRewardModel.last == [eos] * 16


def test_models_are_evaluated_in_half_precision(
    evaluation: Evaluation, policy: FakeSource, reward_model: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``trainer.precision=bf16-true`` holds for models that are opened during the test as well.

    The tolerance is that of bfloat16, which has three significant digits.
    """
    dtypes: list[torch.dtype] = []
    monkeypatch.setattr(FakeSampler, "sync", recording(FakeSampler.sync, dtypes))
    models = {"sft": policy, "ppo": shifted(policy)}
    keys = {"models": models, "reward_model": reward_model, "sampler": FakeSampler()}
    full, half = (evaluation.run(trainer={"precision": name}, **keys) for name in ("32-true", "bf16-true"))
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2
    scores = [run.metrics["models"]["ppo"]["reward"]["mean"] for run in (full, half)]
    assert scores[1] == pytest.approx(scores[0], abs=0.05)
    assert scores[1] != scores[0]


def recording(sync: Any, dtypes: list[torch.dtype]) -> Any:
    """Wrap ``sync`` so that it records the dtype of the policy."""

    def wrapper(self: FakeSampler, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        dtypes.append(policy.dtype)
        sync(self, policy, tokenizer)

    return wrapper


@pytest.mark.parametrize(
    ("function", "left"), [("write_samples", ["metrics.json", "samples.jsonl"]), ("write_json", ["samples.jsonl"])]
)
def test_an_evaluation_that_is_killed_while_it_writes_does_not_look_finished(
    evaluation: Evaluation,
    policy: FakeSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    left: Any,
) -> None:
    """metrics.json is written last, so that it never belongs to other samples. The second run has two prompts."""
    evaluation.run(models={"sft": policy}, sampler=FakeSampler())

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"rlhf.evaluate.module.{function}", kill)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluation.run(DEMONSTRATIONS[:2], models={"sft": policy}, sampler=FakeSampler())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == left
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == (8 if "metrics.json" in left else 2)


def test_targets_are_left_out_if_a_prompt_has_none(evaluation: Evaluation, policy: FakeSource) -> None:
    rows = [*DEMONSTRATIONS[:4], {"prompt": "Who won?"}]
    module = evaluation.run(rows, models={"sft": policy}, sampler=FakeSampler())
    assert list(module.metrics["models"]) == ["sft"]
    assert "rougeL" not in module.metrics["models"]["sft"]


def test_baseline_must_be_one_of_the_models(policy: FakeSource) -> None:
    with pytest.raises(ConfigError, match=r"stage\.baseline must be one of the models \(ppo\), got sft"):
        EvaluateModule(models={"ppo": policy}, output="unused")


def test_no_model_may_have_the_name_of_the_reference_responses(policy: FakeSource) -> None:
    """They are listed as ``target`` and would replace the model."""
    message = r"^stage\.models\.target: the name target is reserved .*\n  Give the model another name: stage\.models="
    with pytest.raises(ConfigError, match=message):
        EvaluateModule(models={"sft": policy, "target": policy}, output="unused")


@pytest.mark.parametrize("score", ["nan", "inf"])
def test_a_reward_that_is_not_finite_is_an_error(
    evaluation: Evaluation, policy: FakeSource, tmp_path: Path, score: str
) -> None:
    """The sampled responses are kept."""
    reward_model = tiny_reward_model(policy.model)
    reward_model.reward_mean.fill_(-float(score))
    message = (
        rf"^The reward model returned the non-finite score {score} for the response '.*'\.\n  .*stage\.reward_model="
    )
    with pytest.raises(DataError, match=message):
        evaluation.run(models={"sft": policy}, sampler=FakeSampler(), reward_model=FakeSource(reward_model))
    assert (tmp_path / "out" / "unscored_samples.jsonl").is_file()


def test_the_gold_function_reads_columns_of_the_data(
    evaluation: Evaluation, policy: FakeSource, tmp_path: Path
) -> None:
    gold = tmp_path / "gold.py"
    gold.write_text("def score(prompts, responses, *, level): return level")
    rows = [{**row, "level": number} for number, row in enumerate(DEMONSTRATIONS)]
    module = evaluation.run(rows, models={"sft": policy}, gold=f"{gold}:score")
    assert module.metrics["models"]["sft"]["gold"]["mean"] == sum(range(8)) / 8
    with pytest.raises(DataError, match=r"have no column 'level', which stage\.gold=.* requires"):
        evaluation.run(models={"sft": policy}, gold=f"{gold}:score")


def test_responses_survive_a_gold_function_that_raises(
    evaluation: Evaluation, policy: FakeSource, tmp_path: Path
) -> None:
    """The function raises on the third of three batches of 3, 3 and 2 prompts: 8 responses are sampled by then."""
    gold = tmp_path / "gold.py"
    gold.write_text("def score(prompts, responses): return [1 / (len(responses) - 2) for _ in responses]")
    with pytest.raises(ZeroDivisionError):
        evaluation.run(models={"sft": policy}, gold=f"{gold}:score", sampler=FakeSampler())
    written = [json.loads(line) for line in (tmp_path / "out" / "unscored_samples.jsonl").open(newline="\n")]
    prompts = [row["prompt"] for row in DEMONSTRATIONS]
    assert sorted((row["model"], row["prompt"]) for row in written) == sorted(("sft", prompt) for prompt in prompts)
    assert all(row["response"] for row in written)
