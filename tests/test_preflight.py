"""Pre-flight checks: correct stages pass, injected faults are found and named, and training is not affected."""

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from harness import EXACT, PROMPTS, STAGES, TINY_DATA, Run, TinyRun, one_architecture, run_train, tiny_reward_model
from rlhf.callbacks import PreflightChecks, PreflightOnly
from rlhf.data import EncodedResponse, Encoder, SequenceBatch
from rlhf.errors import UserError
from rlhf.export import Export, save_result
from rlhf.models import Pretrained
from rlhf.models import trunk as trunk_module
from rlhf.preflight import Check, PreflightFailed
from rlhf.preflight.measurements import corrupt_padding, extreme_sequences, pad_left, relative_difference, sample_rows
from rlhf.preflight.runner import check_table
from rlhf.rl import KLController
from rlhf.sft import SFTModule
from rlhf.stage import Metrics, Result

# Responses of different lengths, the longest one with the last prompt.
RECORDS = [
    {"prompt": prompt, "target": "So. " * (i + 1), "chosen": "Yes! " * (1 + i % 3), "rejected": "No" + "o" * i}
    for i, prompt in enumerate(PROMPTS)
]


def gpt2() -> PreTrainedModel:
    """A tiny GPT-2 with random weights, whose dropout is 0.1."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=2, **ids))


def harness(folder: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> TinyRun:
    """Return a harness whose runs read ``RECORDS`` and allow sequences of 128 tokens."""
    tiny_run = TinyRun(folder, tokenizer, lm)
    tiny_run.data_keys = {"train": tiny_run.write("records", RECORDS), "max_length": 128}
    return tiny_run


@pytest.fixture
def tiny_run(tmp_path: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> TinyRun:
    """A harness for each architecture."""
    return harness(tmp_path, tokenizer, lm)


@pytest.fixture
def gpt2_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TinyRun:
    """A harness for GPT-2, for tests that need one architecture only."""
    return harness(tmp_path, tokenizer, gpt2())


def build(tiny_run: TinyRun, stage: str, *, only: bool = True, **keys: Any) -> Run:
    """Build a run with pre-flight checks, by default without training."""
    return tiny_run.build(stage, callbacks=[PreflightChecks(tiny_run.folder, {}, only=only)], **keys)


def assert_passes(run: Run) -> None:
    with pytest.raises(PreflightOnly):
        run.fit()


def failures(run: Run) -> str:
    """Run checks that fail and return the error message."""
    with pytest.raises(PreflightFailed) as error:
        run.fit()
    assert error.value.exit_code == 1
    return str(error.value)


# Correct stages pass


@pytest.mark.parametrize("stage", STAGES)
def test_correct_stage_passes(tiny_run: TinyRun, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_passes(build(tiny_run, stage))
    assert "all passed" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_pretrained_model_passes(stage: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """GPT-2 has dropout and learned positions, unlike the models of the other tests."""
    lm = gpt2()
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = Pretrained(str(tmp_path / "model"))
    assert_passes(build(harness(tmp_path, source.tokenizer(), lm), stage, policy=source))


def test_unpaired_losses_may_depend_on_the_batch(gpt2_run: TinyRun) -> None:
    """The KL baseline is a statistic of the batch, also in a loss of a user. It is 0 until the policy changes."""

    def loss(log_ratios: Tensor, kl: Tensor, beta: float) -> Tensor:
        return torch.sigmoid(beta * (kl - log_ratios)).mean()

    run = gpt2_run.train("kto", loss=loss, learning_rate=1e-2, trainer={"max_epochs": 3})
    assert run.curve("kto/kl")[-1] > 1
    run.trainer.save_checkpoint(path := gpt2_run.folder / "last.ckpt")
    with pytest.raises(PreflightOnly):
        build(gpt2_run, "kto", loss=loss).fit(path)


def test_stage_without_reference_model_passes(gpt2_run: TinyRun) -> None:
    assert_passes(build(gpt2_run, "grpo", kl=KLController(monitor=False), kl_coef=0.0))


@pytest.mark.parametrize("stage", STAGES)
def test_mixed_precision_passes(gpt2_run: TinyRun, stage: str) -> None:
    """Rounding of bfloat16 depends on the shape of a batch, so values are compared in float32, as the weights are."""
    assert_passes(build(gpt2_run, stage, trainer={"precision": "bf16-mixed"}))


def test_sequence_of_maximum_length_passes(gpt2_run: TinyRun) -> None:
    """The model has 128 positions and a sequence has 128 tokens, so the checks cannot add padding."""
    long = {"prompt": "word " * 200, "target": "yes"}
    assert_passes(build(gpt2_run, "sft", data={"train": gpt2_run.write("long", [long, *RECORDS])}))


# Checks do not affect training


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_bit_identical_with_and_without_checks(gpt2_run: TinyRun, stage: str) -> None:
    """Weights, buffers, the random state and the training mode are equal after 3 steps."""
    states = []
    for checked in (False, True):
        keys: dict[str, Any] = {"learning_rate": 1e-2, "trainer": {"max_steps": 3}}
        run = (build(gpt2_run, stage, only=False, **keys) if checked else gpt2_run.build(stage, **keys)).fit()
        states.append(({**run.weights, "random state": torch.get_rng_state()}, run.module.training))
    (expected, expected_mode), (actual, mode) = states
    torch.testing.assert_close(actual, expected, **EXACT)
    assert mode == expected_mode


# Injected faults are found and named


def test_tokenizer_without_eos_is_rejected(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """It is rejected before any weights are loaded."""
    without_eos = deepcopy(tokenizer)
    without_eos.eos_token = None
    without_eos.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="EOS"):
        Pretrained(str(tmp_path)).tokenizer()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_masked_eos_is_found(gpt2_run: TinyRun, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If pad_token = eos_token and padding is found by its token id, every EOS is masked out of the loss."""
    collate = SequenceBatch.collate

    def collate_by_id(rows: Sequence[EncodedResponse]) -> SequenceBatch:
        batch = collate(rows)
        batch.response_mask &= batch.input_ids != gpt2_run.tokenizer.eos_token_id
        return batch

    monkeypatch.setattr(SequenceBatch, "collate", collate_by_id)
    message = failures(build(gpt2_run, stage))
    assert "EOS contributes to the loss: in 0 of 8 responses that end with EOS" in message
    assert "never learns to end a response" in message


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_missing_eos_is_found(gpt2_run: TinyRun, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "_one_eos", lambda self, response: [token for token in response if token != 2])
    message = failures(build(gpt2_run, stage))
    assert ("every response ends with EOS: 0 of" if stage == "reward" else "complete responses have no EOS") in message


@pytest.mark.parametrize("stage", STAGES)
def test_double_bos_is_found(gpt2_run: TinyRun, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_bos = Encoder._one_bos
    monkeypatch.setattr(Encoder, "_one_bos", lambda self, prompt: [1, *one_bos(self, prompt)])
    assert "every sequence begins with one BOS: BOS tokens at the beginning: 2" in failures(build(gpt2_run, stage))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("reward", ["reward model"]),
        ("dpo", ["policy", "reference", "first rewards exactly 0", "first loss ln 2"]),
        ("ppo", ["policy", "reference", "reward model", "critic", "first ratio exactly 1"]),
    ],
)
def test_dropout_is_found(gpt2_run: TinyRun, stage: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the dropout layers with their probabilities."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rlhf.") and hasattr(module, "disable_dropout"):
            monkeypatch.setattr(module, "disable_dropout", lambda model: model)
    message = failures(build(gpt2_run, stage))
    assert [text for text in expected if text not in message] == []
    assert "drop 0.1" in message


def drop_head(path: Path) -> None:
    """Remove the reward head from an exported file."""
    content = torch.load(path, weights_only=True)
    content["weights"] = {name: weight for name, weight in content["weights"].items() if not name.startswith("head.")}
    torch.save(content, path)


def test_loading_without_reward_head_fails(gpt2_run: TinyRun) -> None:
    """The error names the missing weights."""
    path = gpt2_run.folder / "reward.pt"
    save_result(Result(tiny_reward_model(gpt2_run.lm), gpt2_run.tokenizer), path, {})
    drop_head(path)
    with pytest.raises((UserError, RuntimeError), match=r"head\.layers\.0\.weight"):
        Export(str(path)).scalar_model(gpt2_run.tokenizer)


def test_reward_head_missing_from_export_is_found(gpt2_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_without_head(result: Result, path: Path, provenance: Any) -> None:
        save_result(result, path, provenance)
        drop_head(path)

    monkeypatch.setattr("rlhf.callbacks.save_result", save_without_head)
    message = failures(build(gpt2_run, "reward"))
    assert "scores are reproduced after saving and loading: loading fails" in message
    assert "head.layers.0.weight" in message


@one_architecture
@pytest.mark.parametrize("stage", STAGES)
def test_leaking_padding_is_found(tiny_run: TinyRun, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trunk mixes all columns of a row, padding included."""
    correct = trunk_module.hidden_states

    def leaky(
        trunk: nn.Module, input_ids: Tensor, mask: Tensor, positions: tuple[Tensor, Tensor], **layout: Any
    ) -> Tensor:
        embedding: Any = trunk.get_input_embeddings()
        mean = embedding(input_ids).mean(dim=1)
        return correct(trunk, input_ids, mask, positions, **layout) + mean[positions[0]]

    for name in ("trunk", "scalar"):
        monkeypatch.setattr(f"rlhf.models.{name}.hidden_states", leaky)
    message = failures(build(tiny_run, stage))
    assert "Padding or other sequences affect the values (in a batch, more padding, padding on the left)" in message
    assert "do not depend on the token ids of padding" in message


class UnweightedSFT(SFTModule):
    """Ignores the weight of a micro-batch."""

    def training_loss(self, batch: SequenceBatch) -> tuple[Tensor, Metrics]:
        loss, metrics = super().training_loss(batch)
        return loss / batch.loss_weight, metrics


def test_wrong_accumulation_is_found(gpt2_run: TinyRun) -> None:
    run = build(gpt2_run, "sft")
    run.module = UnweightedSFT(policy=run.module.source, samples=0, learning_rate=1e-3, tokenizer=gpt2_run.tokenizer)
    assert "accumulating 4 micro-batches gives the gradient of one batch: loss" in failures(run)


def test_loss_that_multiplies_by_its_mask_is_found(gpt2_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """nan * 0 is nan."""

    def careless(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, **keys: Any
    ) -> Tensor:
        return -((logprobs - old_logprobs).exp() * advantages * response_mask).sum() / response_mask.sum()

    monkeypatch.setattr("rlhf.rl.updates.clipped_policy_loss", careless)
    assert "loss and gradient do not depend on padding: loss nan" in failures(build(gpt2_run, "ppo"))


def change_models(module: Any, change: Callable[[Any], object]) -> None:
    """Change the models of a module right after it has opened them."""
    configure_model = module.configure_model

    def configure_and_change() -> None:
        configure_model()
        with torch.no_grad():
            change(module)

    module.configure_model = configure_and_change


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("reference is in train mode", lambda module: module.reference.model.train()),
        ("reference has gradients", lambda module: module.reference.model.requires_grad_(True)),
        (
            "reference shares weights with a trained model",
            lambda module: module.reference.model.lm.set_input_embeddings(module.policy.lm.get_input_embeddings()),
        ),
    ],
)
def test_reference_that_is_not_frozen_is_found(gpt2_run: TinyRun, fault: str, change: Callable[[Any], object]) -> None:
    run = build(gpt2_run, "dpo")
    change_models(run.module, change)
    message = failures(run)
    assert "frozen models stay frozen: " in message
    assert fault in message


@pytest.mark.parametrize(
    ("stage", "expected"), [("dpo", "first rewards exactly 0: largest"), ("ppo", "first KL exactly 0: largest sum")]
)
def test_wrong_reference_model_is_found(gpt2_run: TinyRun, stage: str, expected: str) -> None:
    run = build(gpt2_run, stage)
    change_models(run.module, lambda module: next(module.reference.model.parameters()).mul_(1.5))
    assert expected in failures(run)


# Rows and progress


def test_checks_use_short_rows_and_the_longest_sequence(gpt2_run: TinyRun) -> None:
    """Long rows would take minutes with large models. Rows that are all long are used as they are."""
    rows = [{"prompt": "A", "target": "word " * count} for count in range(1, 60)]
    data = gpt2_run.datamodule("sft", train=gpt2_run.write("rows", rows), max_length=1000)
    lengths = sorted(map(data.length, data.encoded("train")))
    short = [length for length in lengths if length <= 96]
    assert 8 < len(short) < len(lengths)
    assert [data.length(row) for row in sample_rows(data)] == [*short[:4], *short[-4:]]
    assert [data.length(row) for row in sample_rows(data, 4)] == [*short[:2], *short[-2:]]
    assert extreme_sequences(data).attention_mask.sum(dim=1).tolist() == [lengths[0], lengths[-1]]
    long = gpt2_run.datamodule("sft", train=gpt2_run.write("long", rows[-10:]), max_length=1000)
    assert [long.length(row) for row in sample_rows(long)] == lengths[-10:-2]


def test_each_check_is_reported_when_it_is_complete(
    gpt2_run: TinyRun, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last check saves the result. By then, the log contains the six others."""
    reported: list[int] = []

    def save_and_count(*args: Any) -> None:
        reported.append(caplog.text.count("check passed: "))
        save_result(*args)

    monkeypatch.setattr("rlhf.callbacks.save_result", save_and_count)
    with caplog.at_level("INFO", logger="rlhf"):
        assert_passes(build(gpt2_run, "sft"))
    assert reported == [6]
    assert caplog.text.count("check passed: ") == 7


# Measurements


def test_relative_difference_by_hand() -> None:
    """|2.2 - 2| / 3 = 0.0667 is larger than |0.01 - 0| / 1. NaN and other shapes are never within a limit."""
    assert relative_difference(torch.tensor([2.2, 0.01]), torch.tensor([2.0, 0.0])) == pytest.approx(0.2 / 3)
    assert not relative_difference(torch.tensor([torch.nan]), torch.tensor([1.0])) <= 1
    assert not relative_difference(torch.ones(2), torch.ones(3)) <= 1


def test_corrupt_padding_changes_padding_only() -> None:
    """The tokens 5, 6, 7 and 8 stay. The two padding tokens are no longer 0."""
    batch = SequenceBatch.collate([EncodedResponse([5, 6, 7], 1), EncodedResponse([8], 0)])
    corrupted = corrupt_padding(batch)
    assert corrupted.input_ids[batch.attention_mask].tolist() == [5, 6, 7, 8]
    assert 0 not in corrupted.input_ids[~batch.attention_mask].tolist()
    assert batch.input_ids[~batch.attention_mask].tolist() == [0, 0]


def test_pad_left_by_hand() -> None:
    batch = pad_left(SequenceBatch.collate([EncodedResponse([5, 6, 7], 1), EncodedResponse([8], 0)]))
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.attention_mask.tolist() == [[True] * 3, [False, False, True]]


# On the command line


@pytest.mark.slow
def test_check_only_trains_nothing(repo: Path, tmp_path: Path) -> None:
    """The command prints and logs 7 checks, exits with 0 and writes no result."""
    done = run_train(repo, tmp_path, "stage=sft", *TINY_DATA, "check=only")
    assert "7 pre-flight checks, all passed" in done.stdout
    files = {path.name for path in (tmp_path / "rlhf" / "sft").iterdir()}
    assert "sft_final.pt" not in files
    assert not [name for name in files if name.startswith("check-")]
    assert (tmp_path / "rlhf" / "sft" / "sft.log").read_text().count("check passed: ") == 7


@pytest.mark.slow
def test_unknown_value_of_check_is_rejected(repo: Path, tmp_path: Path) -> None:
    done = run_train(repo, tmp_path, "stage=sft", "check=maybe", check=False)
    assert done.returncode == 2
    assert "check" in done.stderr
    assert "maybe" in done.stderr


def test_measurements_in_the_table_are_text() -> None:
    """Brackets, as of special tokens, are not the markup of rich, and control characters are escaped."""
    check = Check("no [/INST] in texts", False, "[INST] in 3 rows\x1b", "[a] 0", "A fault.")
    console = Console(file=StringIO(), width=200)
    console.print(check_table([check], 1.0))
    text = console.file.getvalue()
    assert [part for part in (check.name, "[INST] in 3 rows\\x1b", check.limit) if part not in text] == []
