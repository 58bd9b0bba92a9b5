"""Models with fewer positions than the sequences of a stage need."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from harness import PROMPTS, STAGES, TinyRun, quick_trainer, tiny_reward_model
from rlhf.collect import CollectDataModule, CollectModule
from rlhf.data import PromptDataModule
from rlhf.errors import ConfigError
from rlhf.evaluate import EvaluateModule
from rlhf.export import Export, save_result
from rlhf.models import Transformer
from rlhf.reward_functions import ModelReward
from rlhf.sampling import LocalSampler, Rollout, SamplingParams
from rlhf.stage import Result
from rlhf.stage.sample_table import _warn_of_positions

LONG = " ".join(PROMPTS) * 4  # more than 96 tokens


@pytest.fixture(scope="session")
def architecture() -> str:
    """State-space models have no positions."""
    return "transformer"


def run_with_positions(folder: Path, tokenizer: PreTrainedTokenizerFast, positions: int) -> TinyRun:
    """Return runs of a model with rotary positions, which can be trained on longer sequences than it samples."""
    return TinyRun(folder, tokenizer, rotary(tokenizer, positions))


def rotary(tokenizer: PreTrainedTokenizerFast, positions: int) -> PreTrainedModel:
    torch.manual_seed(0)
    source = Transformer(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_length=positions)
    return source.language_model(tokenizer)


def learned(positions: int) -> PreTrainedModel:
    """Return a model with an embedding of each position."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=positions, n_embd=32, n_layer=1, n_head=2))


class RecordingSampler(LocalSampler):
    """Records the lengths of the prompts and the maximum length of responses of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[int], int]] = []

    def sample(self, prompts: Any, params: SamplingParams) -> Rollout:
        self.calls.append((list(map(len, prompts)), params.max_new_tokens))
        return super().sample(prompts, params)


# Tables of samples


@pytest.mark.parametrize(
    ("positions", "wanted", "lengths"),
    [
        (64, 60, ([64 - 32], 32)),  # Prompt and response get one half each.
        (64, 20, ([64 - 20], 20)),  # The prompt is shortened: it gets what the response leaves.
        (128, 60, ([96 - 48], 60)),  # The data allow 96 tokens, of which the response gets at most one half.
    ],
)
@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_a_table_of_samples_fits_the_positions(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    positions: int,
    wanted: int,
    lengths: tuple[list[int], int],
) -> None:
    """A prompt of more than 96 tokens is trained on, and it is in the table after training."""
    short = run_with_positions(tmp_path, tokenizer, positions)
    _warn_of_positions.cache_clear()  # It warns once per process.
    rows = [{**STAGES[stage].records[0], "prompt": LONG}, *STAGES[stage].records[1:]]
    val, sampler = short.write("val", rows), RecordingSampler()
    with caplog.at_level(logging.WARNING, "rlhf.stage.sample_table"):
        run = short.train(stage, data={"val": val}, samples=1, max_new_tokens=wanted, sampler=sampler)
    assert run.trainer.global_step == (2 if stage == "kto" else 1)  # A pair is two rows of KTO.
    assert sampler.calls == [lengths]
    warnings = [message for message in caplog.messages if message.startswith("Responses in the table of samples")]
    shortened = "at most 32 tokens instead of stage.max_new_tokens=60: the model has 64 positions"
    assert [shortened in message for message in warnings] == ([True] if lengths[1] < wanted else [])


# Checks at start-up


class EndingSampler:
    """Responds with EOS to a prompt of any length."""

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.eos = tokenizer.eos_token_id

    def sample(self, prompts: Any, params: SamplingParams) -> Rollout:
        return Rollout.from_responses(prompts, [[self.eos]] * len(prompts), [self.eos])


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_prompts_that_leave_no_room_for_responses_are_refused_before_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, stage: str, split: str
) -> None:
    """Of 96 tokens, the response gets 8, so the longest prompt has 88. The data fit where 64 tokens are allowed."""
    short, sampler = run_with_positions(tmp_path, tokenizer, 64), RecordingSampler()
    data = {split: short.write("long", [{"prompt": LONG}, *STAGES[stage].records])}
    message = (
        r"^data\.max_length=96 allows prompts of 88 tokens, which need 96 positions with "
        r"stage\.sampling\.max_new_tokens=8, but the policy has 64\.\n  Set data\.max_length=64$"
    )
    with pytest.raises(ConfigError, match=message):
        short.train(stage, data=data, sampler=sampler)
    assert sampler.calls == []
    run = short.train(stage, data={**data, "max_length": 64}, sampler=sampler)
    assert run.trainer.global_step > 0
    assert max(length for lengths, _ in sampler.calls for length in lengths) == 64 - 8


def test_responses_longer_than_the_positions_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """6 positions and responses of 8 tokens: a smaller ``data.max_length`` alone would not do."""
    short = run_with_positions(tmp_path, tokenizer, 6)
    with pytest.raises(ConfigError, match=r"Set data\.max_length=6 stage\.sampling\.max_new_tokens=3$"):
        short.train("ppo")


def test_rotary_positions_do_not_limit_other_samplers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Training has no limit either, as in SFT."""
    short = run_with_positions(tmp_path, tokenizer, 16)
    train = short.write("long", [{"prompt": LONG}] * 8)
    assert short.train("ppo", data={"train": train}, sampler=EndingSampler()).trainer.global_step > 0


@pytest.mark.parametrize(("critic_init", "name"), [("sft", "reward model"), ("reward_model", "critic")])
def test_every_model_of_the_stage_needs_the_positions(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, critic_init: str, name: str
) -> None:
    """Policy and reference model have 128 positions; the reward model, and a critic that starts from it, have 40."""
    long = run_with_positions(tmp_path, tokenizer, 128)
    long.reward_model = tiny_reward_model(learned(40))
    train = long.write("long", [{"prompt": LONG}] * 8)
    with pytest.raises(ConfigError, match=rf"need 96 positions .* but the {name} has 40\.\n  Set data.max_length=40$"):
        long.train("ppo", data={"train": train}, critic_init=critic_init)


def export(folder: Path, name: str, model: Any, tokenizer: PreTrainedTokenizerFast) -> Export:
    save_result(Result(model, tokenizer), folder / f"{name}_final.pt", {})
    return Export(str(folder / f"{name}_final.pt"))


@pytest.mark.parametrize(
    ("positions", "name"),
    [
        ({"sft": 128, "ppo": 64, "reward": 128}, "model ppo"),
        ({"sft": 128, "ppo": 128, "reward": 64}, "reward model"),
        ({"sft": 128, "ppo": 96, "reward": 96}, None),
    ],
)
def test_stages_without_training_check_all_models_before_they_sample(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, positions: dict[str, int], name: str | None
) -> None:
    """Prompts of 88 tokens with responses of 8: ``stage=evaluate`` opens its models one after the other."""
    models = {key: export(tmp_path, key, rotary(tokenizer, positions[key]), tokenizer) for key in ("sft", "ppo")}
    reward = export(tmp_path, "reward", tiny_reward_model(learned(positions["reward"])), tokenizer)
    rows = run_with_positions(tmp_path, tokenizer, 128).write("long", [{"prompt": LONG}, {"prompt": LONG + "?"}])
    sampler, trainer = RecordingSampler(), quick_trainer(default_root_dir=tmp_path)
    keys: dict[str, Any] = {"sampler": sampler, "sampling": SamplingParams(max_new_tokens=8), "reward_model": reward}
    evaluation = EvaluateModule(models=models, output=str(tmp_path / "out"), bootstrap=2, **keys)
    data = PromptDataModule(test=rows, max_length=96, tokenizer=tokenizer)
    if name is None:
        trainer.test(evaluation, data, verbose=False)
        assert sampler.calls == [([88, 88], 8)] * 2
        return
    message = (
        rf"^data\.max_length=96 allows prompts of 88 tokens.*=8, but the {name} has 64\.\n  Set data.max_length=64$"
    )
    with pytest.raises(ConfigError, match=message):
        trainer.test(evaluation, data, verbose=False)
    collection = CollectModule(policy=models["ppo"], reward=ModelReward(), output=str(tmp_path / "x.jsonl"), **keys)
    data = CollectDataModule(train=rows, val_fraction=0, max_length=96, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=message.replace("model ppo", "policy")):
        trainer.test(collection, data, verbose=False)
    assert sampler.calls == []
