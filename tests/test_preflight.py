"""``check=true``: sound stages pass, planted faults are found and named, and training does not notice."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from transformers import GPT2Config, LlamaConfig, Mamba2Config  # isort: skip

from helpers import PROMPTS, Fixed
from rlhf.data import (
    EncodedResponse,
    Encoder,
    PreferenceDataModule,
    RecordDataModule,
    SequenceBatch,
    UnpairedDataModule,
)
from rlhf.dpo import DPOModule, KTOModule
from rlhf.errors import UserError, plain_errors
from rlhf.export import Export, save_result
from rlhf.grpo import GRPOModule
from rlhf.models import Pretrained, ScalarHead, ScalarModel
from rlhf.ppo import PPOModule
from rlhf.preflight import ChecksFailed
from rlhf.preflight.measurements import corrupt_padding, difference
from rlhf.reward import RewardDataModule, RewardModule
from rlhf.reward_functions import ModelReward
from rlhf.rl import KLController, RolloutDataModule, ScoreShaping, UpdateLimits
from rlhf.rl.advantages import grpo
from rlhf.run import _Checked, _SelfCheck
from rlhf.sampling import SamplingParams
from rlhf.sft import SFTDataModule, SFTModule
from rlhf.stage import Result, StageModule

STAGES = ("sft", "reward", "dpo", "kto", "ppo", "grpo")
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FOLDERS = {
    "gpt2": GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=2, **SPECIAL),
    "llama": LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **SPECIAL,
    ),
    "mamba2": Mamba2Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=4,
        **SPECIAL,
    ),
}


class Bench:
    """A stage on a few records, and what its checks say. Every stage starts from the same source."""

    def __init__(self, folder: Path, source: Any, tokenizer: Any) -> None:
        self.folder, self.source, self.tokenizer = folder, source, tokenizer
        self.file = folder / "records.jsonl"
        rows = [
            {"prompt": prompt, "target": "So. " * (i + 1), "chosen": "Yes! " * (1 + i % 3), "rejected": "No" + "o" * i}
            for i, prompt in enumerate(PROMPTS)
        ]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def judge(self) -> Fixed:
        torch.manual_seed(1)
        lm = self.source.language_model(self.tokenizer)
        return Fixed(ScalarModel(lm.base_model, ScalarHead(lm.config.hidden_size)))

    def online(self) -> dict[str, Any]:
        """Keys of the stages that learn from their own answers."""
        return {
            "policy": self.source,
            "reward_model": self.judge(),
            "reward": ModelReward(),
            "kl": KLController(),
            "sampling": SamplingParams(max_new_tokens=8, temperature=0.7),
            "scores": ScoreShaping(),
            "limits": UpdateLimits(),
            "minibatch_size": 4,
            "ppo_epochs": 2,
            "learning_rate": 1e-2,
        }

    def module(self, stage: str) -> StageModule:
        kinds: dict[str, Callable[[], StageModule]] = {
            "sft": lambda: SFTModule(policy=self.source, samples=0, learning_rate=1e-2),
            "reward": lambda: RewardModule(policy=self.source, learning_rate=1e-2),
            "dpo": lambda: DPOModule(policy=self.source, learning_rate=1e-2),
            "kto": lambda: KTOModule(policy=self.source, learning_rate=1e-2),
            "ppo": lambda: PPOModule(**self.online()),
            "grpo": lambda: GRPOModule(advantage=grpo, num_generations=2, **self.online()),
        }
        module = kinds[stage]()
        module.tokenizer = self.tokenizer
        return module

    def data(self, stage: str, **keys: Any) -> RecordDataModule:
        kinds: dict[str, type[RecordDataModule]] = {
            "sft": SFTDataModule,
            "reward": RewardDataModule,
            "dpo": PreferenceDataModule,
            "kto": UnpairedDataModule,
            "ppo": RolloutDataModule,
            "grpo": RolloutDataModule,
        }
        return kinds[stage](**{"train": str(self.file), "val_fraction": 0, "max_length": 128, "batch_size": 8, **keys})

    def fit(self, module: StageModule, data: RecordDataModule, check: Any = None, **trainer: Any) -> None:
        """Train for an epoch, with ``check=`` true, ``only`` or null."""
        data.tokenizer = self.tokenizer
        lightning.seed_everything(7, verbose=False)
        callbacks = [_SelfCheck(self.folder, {}, only=check == "only")] if check else []
        lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            max_epochs=1,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=callbacks,
            **trainer,
        ).fit(module, data)

    def assert_passes(self, stage: str, **keys: Any) -> None:
        with pytest.raises(_Checked):
            self.fit(self.module(stage), self.data(stage), "only", **keys)

    def faults(self, module: StageModule, data: RecordDataModule) -> str:
        """What is said of the checks that fail."""
        with pytest.raises(ChecksFailed) as failed:
            self.fit(module, data, "only")
        assert failed.value.exit_code == 1
        return str(failed.value)


@pytest.fixture
def bench(tmp_path: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Bench:
    return Bench(tmp_path, Fixed(lm), tokenizer)


@pytest.fixture
def one_bench(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Bench:
    """Where one architecture says it all: GPT-2, which has dropout of 0.1."""
    torch.manual_seed(0)
    return Bench(tmp_path, Fixed(AutoModelForCausalLM.from_config(deepcopy(FOLDERS["gpt2"]))), tokenizer)


# sound stages pass


@pytest.mark.parametrize("stage", STAGES)
def test_a_sound_stage_passes(bench: Bench, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench.assert_passes(stage)
    assert "all passed" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", FOLDERS)
def test_what_transformers_saved_passes(
    name: str, stage: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Dropout of 0.1 and learned positions (GPT-2) among them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(deepcopy(FOLDERS[name])).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = Pretrained(str(tmp_path / "model"))
    Bench(tmp_path, source, source.tokenizer()).assert_passes(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_mixed_precision_passes(one_bench: Bench, stage: str) -> None:
    """bfloat16 rounds by the shape of a batch; what is compared is then compared in float32, as the weights are."""
    one_bench.assert_passes(stage, precision="bf16-mixed")


def test_a_text_as_long_as_the_model_reads_passes(one_bench: Bench) -> None:
    """128 learned positions, a text of 128 tokens: there is no room for more padding, and none is added."""
    long = json.dumps({"prompt": "word " * 200, "target": "yes"}) + "\n"
    one_bench.file.write_text(long + one_bench.file.read_text())
    one_bench.assert_passes("sft")


# training does not notice


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_as_if_nothing_had_been(one_bench: Bench, stage: str) -> None:
    """With and without check=true: the same weights, moments and random state, to the last bit."""
    ends = []
    for check in (None, True):
        module = one_bench.module(stage)
        one_bench.fit(module, one_bench.data(stage), check, max_steps=3)
        ends.append(({**module.state_dict(), "random state": torch.get_rng_state()}, module.training))
    (plain, mode), (checked, checked_mode) = ends
    torch.testing.assert_close(checked, plain, rtol=0.0, atol=0.0)
    assert mode == checked_mode


# planted faults are found and named


def test_a_tokenizer_without_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Found before any weight is loaded."""
    mute = deepcopy(tokenizer)
    mute.eos_token = None
    mute.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token"):
        Pretrained(str(tmp_path)).tokenizer()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_pad_is_eos_and_eos_is_masked(one_bench: Bench, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding found by its token id takes every EOS out of the loss."""
    collate = SequenceBatch.collate

    def collate_by_id(rows: Sequence[EncodedResponse]) -> SequenceBatch:
        batch = collate(rows)
        batch.response_mask &= batch.input_ids != one_bench.tokenizer.eos_token_id
        return batch

    monkeypatch.setattr(SequenceBatch, "collate", collate_by_id)
    said = one_bench.faults(one_bench.module(stage), one_bench.data(stage))
    rows = {"sft": 8, "dpo": 16}[stage]
    assert f"EOS carries loss: in 0 of {rows} answers that end in EOS" in said
    assert "never learns to end an answer" in said


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_an_answer_without_eos(one_bench: Bench, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "_one_eos", lambda self, answer: [token for token in answer if token != 2])
    said = one_bench.faults(one_bench.module(stage), one_bench.data(stage))
    assert ("every answer ends in EOS: 0 of" if stage == "reward" else "whole answers have none") in said


@pytest.mark.parametrize("stage", STAGES)
def test_two_bos(one_bench: Bench, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_single_bos = Encoder._one_bos
    monkeypatch.setattr(Encoder, "_one_bos", lambda self, prompt: [1, *check_single_bos(self, prompt)])
    said = one_bench.faults(one_bench.module(stage), one_bench.data(stage))
    assert "a text begins with one BOS: BOS at the beginning: 2" in said


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("reward", ["reward model"]),
        ("dpo", ["policy", "reference", "first rewards exactly 0", "first loss ln 2"]),
        ("ppo", ["policy", "reference", "reward model", "critic", "first ratio exactly 1"]),
    ],
)
def test_dropout_left_on(one_bench: Bench, stage: str, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are named, with their rate."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rlhf.") and hasattr(module, "disable_dropout"):
            monkeypatch.setattr(module, "disable_dropout", lambda model: model)
    said = one_bench.faults(one_bench.module(stage), one_bench.data(stage))
    assert [part for part in parts if part not in said] == []
    assert "drop 0.1" in said


def drop_head(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["weights"] = {name: weight for name, weight in content["weights"].items() if not name.startswith("head.")}
    torch.save(content, path)


def test_a_reward_head_dropped_from_the_file(one_bench: Bench) -> None:
    """Loading is strict and says which weights are not there."""
    path = one_bench.folder / "reward.pt"
    save_result(Result(one_bench.judge().model, one_bench.tokenizer), path, {})
    drop_head(path)
    with pytest.raises((UserError, RuntimeError), match=r"head\.layers\.0\.weight"):
        Export(str(path)).scalar_model(one_bench.tokenizer)


def test_a_reward_head_that_would_not_be_saved(one_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_without(result: Result, path: Path, provenance: Any) -> None:
        save_result(result, path, provenance)
        drop_head(path)

    monkeypatch.setattr("rlhf.run.save_result", save_without)
    said = one_bench.faults(one_bench.module("reward"), one_bench.data("reward"))
    assert "scores reproduced after saving and opening: it cannot be opened" in said
    assert "head.layers.0.weight" in said


@pytest.mark.parametrize("stage", STAGES)
def test_padding_that_leaks(bench: Bench, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that sees the whole row, padding included."""
    from rlhf.models import backbone

    sound = backbone.hidden_states

    def leaky(trunk: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = sound(trunk, tokens, mask)
        return hidden + hidden.mean(dim=1, keepdim=True)

    for place in ("backbone", "scalar"):
        monkeypatch.setattr(f"rlhf.models.{place}.hidden_states", leaky)
    said = bench.faults(bench.module(stage), bench.data(stage))
    assert "padding or neighbours leak into the numbers (in a batch, more padding, padding left)" in said
    assert "other tokens on padding change nothing" in said


class Unweighed(SFTModule):
    """Forgets that a micro-batch is a part of a step."""

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) / batch.loss_weight


def test_accumulation_that_is_not_the_big_batch(one_bench: Bench) -> None:
    module = Unweighed(policy=one_bench.source, samples=0, learning_rate=1e-3)
    module.tokenizer = one_bench.tokenizer
    assert "gradient of 4 micro-batches = gradient of one batch" in one_bench.faults(module, one_bench.data("sft"))


def test_a_loss_that_multiplies_by_its_mask(one_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """nan * 0 is nan."""

    def careless(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **keys: Any) -> Tensor:
        return -((logprobs - old).exp() * advantages * mask).sum() / mask.sum()

    monkeypatch.setattr("rlhf.rl.module.clipped_policy_loss", careless)
    said = one_bench.faults(one_bench.module("ppo"), one_bench.data("ppo"))
    assert "garbage on padding changes neither loss nor gradient: loss nan" in said


def after_configuring(module: Any, change: Callable[[Any], object]) -> Any:
    """The module, whose models are changed as soon as it has them."""
    configure = module.configure_model

    def configure_and_change() -> None:
        configure()
        with torch.no_grad():
            change(module)

    module.configure_model = configure_and_change
    return module


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("reference is in train mode", lambda module: module.reference.model.train()),
        ("reference has a gradient", lambda module: module.reference.model.requires_grad_(True)),
        (
            "reference shares weights with what is trained",
            lambda module: module.reference.model.lm.set_input_embeddings(module.policy.lm.get_input_embeddings()),
        ),
    ],
)
def test_a_reference_that_is_not_frozen(one_bench: Bench, fault: str, change: Callable[[Any], object]) -> None:
    module = after_configuring(one_bench.module("dpo"), change)
    said = one_bench.faults(module, one_bench.data("dpo"))
    assert "frozen models stay frozen: " in said
    assert fault in said


@pytest.mark.parametrize(
    ("stage", "name"), [("dpo", "first rewards exactly 0: largest"), ("ppo", "first KL exactly 0: largest sum")]
)
def test_a_reference_that_is_another_model(one_bench: Bench, stage: str, name: str) -> None:
    def move(module: Any) -> None:
        next(module.reference.model.parameters()).mul_(1.5)

    module = after_configuring(one_bench.module(stage), move)
    assert name in one_bench.faults(module, one_bench.data(stage))


# arithmetic


def test_difference_by_hand() -> None:
    """|2.2 - 2| / 3 = 0.0667 is the largest; |0.01 - 0| / 1 = 0.01. What is no number differs from everything."""
    assert difference(torch.tensor([2.2, 0.01]), torch.tensor([2.0, 0.0])) == pytest.approx(0.2 / 3)
    assert difference(torch.tensor([torch.nan]), torch.tensor([1.0])) != 0
    assert not difference(torch.tensor([torch.nan]), torch.tensor([1.0])) <= 1
    assert not difference(torch.ones(2), torch.ones(3)) <= 1


def test_spoiled_changes_padding_only() -> None:
    """Real tokens 5 6 7 and 8 stay; the two slots of padding hold something else than 0."""
    batch = SequenceBatch.collate([EncodedResponse([5, 6, 7], 1), EncodedResponse([8], 0)])
    changed = corrupt_padding(batch)
    assert changed.input_ids[batch.attention_mask].tolist() == [5, 6, 7, 8]
    assert 0 not in changed.input_ids[~batch.attention_mask].tolist()
    assert batch.input_ids[~batch.attention_mask].tolist() == [0, 0]


# as a user types it


def test_a_failure_leaves_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, plain_errors():
        raise ChecksFailed("1 of 9 checks failed", "hint")
    assert left.value.code == 1
    assert capsys.readouterr().err == "1 of 9 checks failed\n  hint\n"


@pytest.mark.slow
def test_check_only_trains_nothing(repo: Path, tmp_path: Path) -> None:
    """Exit code 0, the table, the log, and no result; a word it does not know is a mistake of the user."""
    keys = ["stage=sft", "trainer=cpu", "data.max_rows=40", "model.vocab_size=300", f"paths.root={tmp_path}"]

    def typed(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "train.py", *keys, *more]
        wide = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(command, cwd=repo, env=wide, capture_output=True, text=True, check=False)

    done = typed("check=only")
    assert done.returncode == 0, done.stderr
    assert "7 properties, all passed" in done.stdout
    files = {path.name for path in (tmp_path / "rlhf" / "sft").iterdir()}
    assert "sft_final.pt" not in files
    assert not [name for name in files if name.startswith("check-")]
    assert (tmp_path / "rlhf" / "sft" / "sft.log").read_text().count("check passed: ") == 7
    wrong = typed("check=maybe")
    assert wrong.returncode == 2
    assert "check=maybe" in wrong.stderr
