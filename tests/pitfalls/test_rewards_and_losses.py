"""Pitfalls 13 to 21 of the table in README.md: rewards, advantages and losses."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from contract.configs import compose_config
from harness import (
    EXACT,
    PAIRS,
    FakeSource,
    Run,
    TinyRun,
    isolated_logprobs,
    isolated_score,
    one_architecture,
    sequences,
)
from harness import STAGES as HARNESS_STAGES
from pitfalls.settings import ONE_STEP, PLAIN_SCORES, STAGES
from rlhf.dpo.objective import ipo_loss
from rlhf.errors import UserError
from rlhf.models import Policy, Pretrained, chat_template
from rlhf.rl import KLController, ScoreShaping
from rlhf.speed import speed, speed_settings

NAN = float("nan")


class CorruptPadding(lightning.Callback):
    """Adds padding to every rollout and every training batch, and optionally fills all padding with garbage.

    Args:
        columns: Number of padding columns to append.
        garbage: Fill padding with random tokens, per-token values outside the responses with NaN, and, during training,
            hidden states of padding with NaN.
    """

    def __init__(self, columns: int, *, garbage: bool) -> None:
        self.columns, self.garbage = columns, garbage
        self.generator = torch.Generator().manual_seed(0)
        self.attention_mask: Tensor | None = None
        self.corrupted_forwards = 0

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if hasattr(module, "collector"):  # on-policy stages
            sample = module.collector.sample
            module.collector.sample = lambda prompts: self.corrupt(sample(prompts))

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        for model in module.modules() if self.garbage else ():
            if isinstance(model, PreTrainedModel) and model.base_model is model:
                model.register_forward_hook(self.corrupt_states)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.attention_mask = self.corrupt(sequences(batch)).attention_mask

    def on_train_batch_end(self, *_: Any) -> None:
        self.attention_mask = None

    def corrupt(self, batch: Any) -> Any:
        """Corrupt tokens, masks and per-token values, [batch, time] each, in place."""
        shape = batch.attention_mask.shape
        for field in fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, Tensor) and value.shape == shape:
                setattr(batch, field.name, F.pad(value, (0, self.columns)))
        if self.garbage:
            noise = torch.randint(3, 300, batch.input_ids.shape, generator=self.generator)
            batch.input_ids = torch.where(batch.attention_mask, batch.input_ids, noise)
            for field in fields(batch):
                value = getattr(batch, field.name)
                if (
                    isinstance(value, Tensor)
                    and value.shape == batch.attention_mask.shape
                    and value.is_floating_point()
                ):
                    setattr(batch, field.name, torch.where(batch.response_mask, value, NAN))
        return batch

    def corrupt_states(self, trunk: Any, inputs: Any, output: Any) -> Any:
        states = output.last_hidden_state
        rows_are_those_of_the_batch = not speed_settings().packed_rows
        if self.attention_mask is not None and rows_are_those_of_the_batch:
            mask = self.attention_mask[:, : states.shape[1]]
            output.last_hidden_state = torch.where(mask[..., None], states, NAN)
            self.corrupted_forwards += 1
        return output


def logged_metrics(run: Run) -> list[dict[str, float]]:
    """Return everything that was logged, except throughput."""
    return [{name: value for name, value in call.items() if "throughput" not in name} for call in run.logger.calls]


def check_outcome(tiny_run: TinyRun, stage: str, corruption: CorruptPadding) -> None:
    """A run of 4 steps ends with the same weights and the same logged metrics, whatever the padding contains."""
    keys: dict[str, Any] = {"minibatch_size": 4, "ppo_epochs": 2} if stage == "ppo" else {}
    batches = {"batch_size": 8 if stage == "ppo" else 2}
    keys.update(eps=1.0, learning_rate=0.03)  # steps that do not amplify rounding
    clean = tiny_run.train(stage, data=batches, **keys)
    corrupted = tiny_run.train(stage, data=batches, callbacks=[corruption], **keys)
    assert clean.trainer.global_step == corrupted.trainer.global_step == 4
    assert (
        sequences(corrupted.batches[0]).attention_mask.shape[1]
        == sequences(clean.batches[0]).attention_mask.shape[1] + corruption.columns
    )
    assert len(logged_metrics(clean)) == len(logged_metrics(corrupted)) > 0
    for one, other in zip(logged_metrics(clean), logged_metrics(corrupted), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)  # float32 sums in another order
    torch.testing.assert_close(corrupted.weights, clean.weights)


@one_architecture
@pytest.mark.parametrize("stage", STAGES)
def test_13_means_do_not_count_padding(tiny_run: TinyRun, stage: str) -> None:
    """Five more columns of padding change no loss, no metric, no moment of the advantages and no weight."""
    check_outcome(tiny_run, stage, CorruptPadding(5, garbage=False))


@pytest.mark.parametrize("stage", STAGES)
def test_14_garbage_in_padding_changes_nothing(tiny_run: TinyRun, stage: str) -> None:
    """Random tokens, NaN values and NaN hidden states in padding have no effect."""
    check_outcome(tiny_run, stage, CorruptPadding(3, garbage=True))
    corruption = CorruptPadding(3, garbage=True)
    with speed(packed_rows=False, row_groups=1, shared_prompts=False):  # The trunk sees all padding of the batch.
        check_outcome(tiny_run, stage, corruption)
    assert corruption.corrupted_forwards == (8 if stage == "ppo" else 4)  # PPO has two trunks: policy and critic


@one_architecture
def test_15_the_score_is_at_the_last_response_token(tiny_run: TinyRun) -> None:
    """Without a KL penalty and with lambda 1, the return at a token is the score, discounted by 1/2 per later token.

    The last token has the full score. With the score one position later, it would have half of it.
    """
    run = tiny_run.train("ppo", gamma=0.5, gae_lambda=1.0, kl_coef=0.0, scores=ScoreShaping(**PLAIN_SCORES))
    (batch,) = run.batches
    assert len(set(batch.response_mask.sum(dim=1).tolist())) > 1, "responses of one length end in the same column"
    for row, real, response, returns in zip(
        batch.input_ids, batch.attention_mask, batch.response_mask, batch.returns, strict=True
    ):
        score, count = isolated_score(tiny_run.reward_model, row[real]), int(response.sum())
        expected = [score * 0.5 ** (count - 1 - position) for position in range(count)]
        assert returns[response].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)  # A + V in float32


@one_architecture
def test_16_whitening_is_masked_and_removes_the_mean(tiny_run: TinyRun) -> None:
    """Over the response tokens, advantages have mean 0 and standard deviation 1. Returns are not whitened."""
    run = tiny_run.train("ppo", minibatch_size=4)
    assert len(run.batches) == 2
    advantages, returns, values = (
        torch.cat([getattr(batch, name)[batch.response_mask] for batch in run.batches])
        for name in ("advantages", "returns", "old_values")
    )
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    raw = returns - values
    assert float(raw.mean().abs()) > 1e-3
    torch.testing.assert_close(advantages, (raw - raw.mean()) / raw.std(correction=0))


@pytest.mark.slow
def test_17_two_ranks_equal_one_big_batch(two_ranks: Path, architecture: str, tmp_path: Path) -> None:
    """SFT with 2 ranks x 4 rows gives the weights of 1 x 8 rows, up to rounding; response lengths differ by rank."""
    (one, terms), (other, other_terms) = (torch.load(two_ranks / architecture / rank / "sft.pt") for rank in "01")
    assert (len(terms), len(other_terms)) == (1, 1)
    assert terms != other_terms
    source = Pretrained(str(two_ranks / architecture))
    tiny_run = TinyRun(tmp_path, source.tokenizer(), source.language_model(source.tokenizer()))
    big = tiny_run.train("sft", trainer={"max_steps": 1}, **ONE_STEP)
    assert big.batches[0].loss_terms == sum(terms) + sum(other_terms)
    trained = big.module.policy.lm.state_dict()
    assert max(float((trained[name] - old).abs().max()) for name, old in tiny_run.lm.state_dict().items()) > 1e-3
    torch.testing.assert_close(one, other, **EXACT)
    torch.testing.assert_close(one, dict(trained))


# Key -> a value that differs from the one in `outcome`.
OPTIMIZER = {
    "learning_rate": 2e-3,
    "weight_decay": 0.5,
    "betas": [0.5, 0.9],
    "eps": 1e-2,
    "schedule": "linear",
    "warmup_ratio": 0.5,
}
STAGE = {**OPTIMIZER, "policy": None, "samples": 2, "max_new_tokens": 2}
DATA = {
    "train": "other",
    "val": "other",
    "val_fraction": 0.25,
    "columns": {"completion": "other"},
    "template": "[{prompt}]",
    "max_length": 12,
    "max_rows": 6,
    "batch_size": 4,
    "eval_batch_size": 3,
    "on_error": "skip",
    "seed": 3,
    "loss_on": "all",
}
ONLY_HUB = {"splits", "subset"}  # of hub data sets only
WITHOUT_EFFECT = {"cache_dir"}  # see tests/data/test_cache.py
TRAINER = {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}
# Settings that a key needs to have an effect: val_fraction, for example, applies if there is no validation file.
GIVEN = {"val_fraction": {"val": None}, "on_error": {"train": "broken"}}


def outcome(tiny_run: TinyRun, *, stage: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> Any:
    """Return everything a user sees of an SFT run of two epochs: weights, metrics, samples, or the error message."""
    rows = [{**row, "other": row["prompt"]} for row in HARNESS_STAGES["sft"].records]
    files = {"train": rows, "val": rows[:4], "other": rows[::-1][:5], "broken": [*rows, {"prompt": "May"}]}
    named = {key: tiny_run.write(key, records) for key, records in files.items()}
    keys = {"train": "train", "val": "val", "batch_size": 2, **data}
    keys.update({key: named[keys[key]] for key in ("train", "val") if keys[key] is not None})
    tiny_run.tokenizer.chat_template = TEMPLATE
    small = {"samples": 1, "max_new_tokens": 4, "learning_rate": 1e-4}  # so low that responses do not end at once
    run = tiny_run.build("sft", data=keys, trainer={"max_epochs": 2, **trainer}, **{**small, **stage})
    samples: list[Any] = []
    run.module.log_samples = lambda header, rows: samples.append(rows)
    lightning.seed_everything(7, verbose=False)
    try:
        run.trainer.fit(run.module, run.datamodule)
    except UserError as error:
        return str(error)
    weights = {name: weight.tolist() for name, weight in run.weights.items()}
    return weights, logged_metrics(run), samples, run.recorder.validation_sizes


TEMPLATE = chat_template("{prompt}\nSummary:")


def test_18_every_key_is_tried(repo: Path) -> None:
    """The test below changes every key of SFT, of its data and of the optimizer that all stages share."""
    sft = OmegaConf.load(repo / "conf" / "stage" / "sft.yaml")
    data = {*OmegaConf.load(repo / "conf" / "data" / "demo.yaml").data, *sft.data}
    of_faults = {"on_nonfinite", "max_nonfinite_steps", "on_out_of_memory"}  # They matter only if a step fails.
    without_effect = {"_target_", "sampler", "gradient_checkpointing", *of_faults}
    assert set(sft.stage) - without_effect == STAGE.keys()
    assert data - {"_target_", "test"} - ONLY_HUB - WITHOUT_EFFECT == DATA.keys()
    for stage in STAGES:
        assert OPTIMIZER.keys() <= set(compose_config(f"stage={stage}").stage)


@pytest.mark.slow
@one_architecture
def test_18_every_key_changes_the_outcome(tiny_run: TinyRun) -> None:
    """Changing one key changes the run. Repeating a run does not."""
    torch.manual_seed(9)
    tiny_run.lm, another = (type(tiny_run.lm)(tiny_run.lm.config) for _ in range(2))
    plain = outcome(tiny_run, stage={}, data={}, trainer={})
    assert outcome(tiny_run, stage={}, data={}, trainer={}) == plain
    idle = []
    for node, changes in {"stage": {**STAGE, "policy": FakeSource(another)}, "data": DATA, "trainer": TRAINER}.items():
        for key, value in changes.items():
            given = {"stage": {}, "trainer": {}, "data": GIVEN.get(key, {})}
            before = outcome(tiny_run, **given) if key in GIVEN else plain
            if outcome(tiny_run, **{**given, node: {**given[node], key: value}}) == before:
                idle.append(f"{node}.{key}")
    assert idle == []


@one_architecture
def test_19_the_reference_model_of_validation_is_the_untrained_model(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Validation rewards after training are beta x (log pi - log pi_ref), where pi_ref is the initial model.

    The same holds after loading a checkpoint, where reference log-probs were never precomputed.
    """
    data = {"val": tiny_run.write("val", PAIRS)}
    run = tiny_run.train("dpo", data=data, beta=0.1, learning_rate=1e-2, trainer={"max_epochs": 2})
    expected = []
    for pair in PAIRS:
        opening, text = f"<bos>{pair['prompt']}\nSummary:", f"<bos>{pair['prompt']}\nSummary: {pair['chosen']}<eos>"
        start, ids = (tiny_run.tokenizer(string, add_special_tokens=False)["input_ids"] for string in (opening, text))
        tokens = torch.tensor(ids)
        now, first = (
            isolated_logprobs(lm, tokens).gather(1, tokens[1:, None])[len(start) - 1 :].sum()
            for lm in (run.module.policy.lm, tiny_run.lm)
        )
        expected.append(0.1 * float(now - first))
    mean = sum(expected) / len(expected)
    assert abs(mean) > 0.1
    assert float(run.trainer.callback_metrics["val/rewards/chosen"]) == pytest.approx(mean, rel=1e-4)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    opened = tiny_run.build("dpo", data=data, beta=0.1)
    opened.trainer.validate(
        opened.module, opened.datamodule, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert float(opened.trainer.callback_metrics["val/rewards/chosen"]) == pytest.approx(mean, rel=1e-4)


@one_architecture
def test_20_ipo_sums_or_averages_log_probs_as_configured(tiny_run: TinyRun) -> None:
    """The first loss is (1 / (2 beta))^2 in both forms. After one step the losses differ.

    IPO as published compares sums of log-probs; with ``length_normalized`` it compares means over tokens. Both are
    recomputed here from the log-probs of whole responses.
    """
    curves = {}
    for switch in (False, True):
        run = tiny_run.train(
            "dpo", loss=ipo_loss, beta=0.5, length_normalized=switch, learning_rate=1e-2, trainer={"max_epochs": 2}
        )
        first, second = run.curve("train/loss")
        assert first == pytest.approx(1.0)  # (0 - 1 / (2 x 0.5))^2
        batch = sequences(run.batches[-1])
        with torch.no_grad():
            now, before = (
                Policy(lm)(batch.input_ids, batch.attention_mask, batch.response_mask).logprobs.sum(dim=1)
                for lm in (policy_after_one_step(tiny_run, switch), tiny_run.lm.eval())
            )
        log_ratios = (now - before) / (batch.response_mask.sum(dim=1) if switch else 1)
        chosen, rejected = log_ratios.chunk(2)
        assert second == pytest.approx(float((chosen - rejected - 1.0).square().mean()), rel=1e-4)
        curves[switch] = second
    assert curves[False] != pytest.approx(curves[True], rel=1e-3)


def policy_after_one_step(tiny_run: TinyRun, length_normalized: bool) -> Any:
    """Return the policy after the first of the two epochs."""
    run = tiny_run.train("dpo", loss=ipo_loss, beta=0.5, length_normalized=length_normalized, learning_rate=1e-2)
    return run.module.policy.lm.eval()


@one_architecture
def test_21_the_kl_target_is_per_sequence_and_named_accordingly(tiny_run: TinyRun) -> None:
    """With responses of about 5 tokens, the adaptive coefficient follows the KL summed over a response.

    If the target is the logged KL, the error is 0 and the coefficient stays. If the target were compared with the mean
    KL per token, which is several times smaller, the coefficient would change.
    """

    def coefficient_and_kl(target: float) -> tuple[float, float]:
        kl = KLController(target_per_sequence=target, horizon=8)
        keys = {"kl": kl, "kl_coef": 0.1, "learning_rate": 1e-2, "trainer": {"max_epochs": 2}}
        run = tiny_run.train("ppo", **keys)
        return run.curve("kl_coef")[1], run.curve("objective/kl")[1]

    # The first rollout has a KL of 0. Its error is clipped at -0.2, so the coefficient becomes 0.1 x 0.8.
    coefficient, kl = coefficient_and_kl(1e-3)
    assert coefficient == pytest.approx(0.08)
    assert kl > 1e-3

    control = KLController(target_per_sequence=kl, horizon=8)
    control.initialize(0.08)
    control.update(torch.tensor(kl), 8)
    assert float(control.coef) == pytest.approx(0.08)
    with pytest.raises(TypeError, match="target_per_token"):
        KLController(target_per_token=kl)  # type: ignore[call-arg]
