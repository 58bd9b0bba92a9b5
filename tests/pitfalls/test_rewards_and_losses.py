"""Pitfalls 13 to 21 of the table in README.md beside this file: rewards, advantages and losses."""

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

from helpers import Fixed
from pitfalls.runs import ONE_STEP, PAIRS, PLAIN_SCORES, STAGES, Run, Runs, logprobs_alone, score_alone, texts
from rlhf.dpo.objective import ipo_loss
from rlhf.errors import UserError
from rlhf.models import Policy, Pretrained, chat_template
from rlhf.rl import KLController, ScoreShaping
from test_configs import composed

NAN = float("nan")


class Spoil(lightning.Callback):
    """Makes the padding of every rollout and of every training batch worse.

    Args:
        columns: of padding, put to the right of what there is.
        garbage: random tokens on all padding, NaN on every number beside the answers, and NaN as hidden state of every
            padded token while a batch is learned.
    """

    def __init__(self, columns: int, *, garbage: bool) -> None:
        self.columns, self.garbage = columns, garbage
        self.draw = torch.Generator().manual_seed(0)
        self.attention_mask: Tensor | None = None
        self.poisoned = 0

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if hasattr(module, "answer"):  # the stages that sample
            answer = module.response_mask
            module.response_mask = lambda prompts: self.spoil(answer(prompts))

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        for part in module.modules() if self.garbage else ():
            if isinstance(part, PreTrainedModel) and part.base_model is part:
                part.register_forward_hook(self.poison)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.attention_mask = self.spoil(texts(batch)).attention_mask

    def on_train_batch_end(self, *_: Any) -> None:
        self.attention_mask = None

    def spoil(self, text: Any) -> Any:
        """Spoil tokens, masks and numbers, [batch, time] each, in place."""
        shape = text.attention_mask.shape
        for part in fields(text):
            value = getattr(text, part.name)
            if isinstance(value, Tensor) and value.shape == shape:
                setattr(text, part.name, F.pad(value, (0, self.columns)))
        if self.garbage:
            noise = torch.randint(3, 300, text.input_ids.shape, generator=self.draw)
            text.input_ids = torch.where(text.attention_mask, text.input_ids, noise)
            for part in fields(text):
                value = getattr(text, part.name)
                if isinstance(value, Tensor) and value.shape == text.attention_mask.shape and value.is_floating_point():
                    setattr(text, part.name, torch.where(text.response_mask, value, NAN))
        return text

    def poison(self, trunk: Any, inputs: Any, output: Any) -> Any:
        states = output.last_hidden_state
        if self.attention_mask is not None and states.shape[:2] == self.attention_mask.shape:
            output.last_hidden_state = torch.where(self.attention_mask[..., None], states, NAN)
            self.poisoned += 1
        return output


def numbers(run: Run) -> list[dict[str, float]]:
    """All that was logged but how fast it went."""
    return [{name: value for name, value in call.items() if "throughput" not in name} for call in run.logged.calls]


def check_outcome(runs: Runs, stage: str, spoil: Spoil) -> None:
    """A run of 4 steps ends with the same weights and the same logged numbers, whatever stands on padding."""
    keys: dict[str, Any] = {"minibatch_size": 4, "ppo_epochs": 2} if stage == "ppo" else {}
    batches = {"batch_size": 8 if stage == "ppo" else 2}
    keys.update(eps=1.0, learning_rate=0.03)  # steps that do not magnify rounding
    clean = runs.fit(stage, data=batches, **keys)
    corrupt_padding = runs.fit(stage, data=batches, callbacks=[spoil], **keys)
    assert clean.trainer.global_step == corrupt_padding.trainer.global_step == 4
    assert (
        texts(corrupt_padding.batches[0]).attention_mask.shape[1]
        == texts(clean.batches[0]).attention_mask.shape[1] + spoil.columns
    )
    assert len(numbers(clean)) == len(numbers(corrupt_padding)) > 0
    for one, other in zip(numbers(clean), numbers(corrupt_padding), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)  # float32 sums of other shapes
    torch.testing.assert_close(corrupt_padding.weights(), clean.weights())


@pytest.mark.parametrize("stage", STAGES)
def test_13_averages_do_not_count_padding(runs: Runs, stage: str) -> None:
    """Five more columns of padding move no loss, no metric, no moment of the advantages and no weight."""
    check_outcome(runs, stage, Spoil(5, garbage=False))


@pytest.mark.parametrize("stage", STAGES)
def test_14_garbage_in_padding_changes_nothing(runs: Runs, stage: str) -> None:
    """Nor do random tokens, NaN numbers and NaN states there."""
    spoil = Spoil(3, garbage=True)
    check_outcome(runs, stage, spoil)
    assert spoil.poisoned == (8 if stage == "ppo" else 4)  # PPO has two bodies: policy and critic


def test_15_score_lands_on_the_last_answer_token(runs: Runs) -> None:
    """Without a price for the KL and with lambda 1 the return of a token is the score, discounted by 1/2 for every
    token that follows it: the last one has all of it. With the score one slot later it would have half.
    """
    run = runs.fit("ppo", gamma=0.5, gae_lambda=1.0, kl_coef=0.0, scores=ScoreShaping(**PLAIN_SCORES))
    (part,) = run.batches
    assert len(set(part.response_mask.sum(dim=1).tolist())) > 1, "answers of one length end in the same column"
    for row, mask, answer, returns in zip(
        part.input_ids, part.attention_mask, part.response_mask, part.returns, strict=True
    ):
        score, count = score_alone(runs.judge, row[mask]), int(answer.sum())
        expected = [score * 0.5 ** (count - 1 - place) for place in range(count)]
        assert returns[answer].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)  # A + V in float32


def test_16_whitening_is_masked_and_removes_the_mean(runs: Runs) -> None:
    """Over the answer tokens of a rollout: advantages of mean 0 and deviation 1, from returns as they were."""
    run = runs.fit("ppo", minibatch_size=4)
    assert len(run.batches) == 2
    advantages, returns, values = (
        torch.cat([getattr(part, name)[part.response_mask] for part in run.batches])
        for name in ("advantages", "returns", "old_values")
    )
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    raw = returns - values
    assert float(raw.mean().abs()) > 1e-3
    torch.testing.assert_close(advantages, (raw - raw.mean()) / raw.std(correction=0))


@pytest.mark.slow
def test_17_two_ranks_are_one_big_batch(two_ranks: Path, architecture: str, tmp_path: Path) -> None:
    """SFT on 2 ranks x 4 texts ends with the weights of 1 x 8, to rounding; the ranks have answers of other lengths."""
    (one, terms), (other, other_terms) = (torch.load(two_ranks / architecture / rank / "sft.pt") for rank in "01")
    assert (len(terms), len(other_terms)) == (1, 1)
    assert terms != other_terms
    source = Pretrained(str(two_ranks / architecture))
    runs = Runs(tmp_path, source.tokenizer(), source.language_model(source.tokenizer()))
    big = runs.fit("sft", trainer={"max_steps": 1}, **ONE_STEP)
    assert big.batches[0].loss_terms == sum(terms) + sum(other_terms)
    learned = big.module.policy.lm.state_dict()
    assert max(float((learned[name] - old).abs().max()) for name, old in runs.lm.state_dict().items()) > 1e-3
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
    torch.testing.assert_close(one, dict(learned))


# key: a value other than that of `outcome`
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
    "loss_on": "text",
}
ONLY_HUB = {"splits", "subset"}  # parts of a hub data set; a local file has none
TRAINER = {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}
# what else has to be so for a key to matter: val_fraction is of a run without a file for validation
GIVEN = {"val_fraction": {"val": None}, "on_error": {"train": "broken"}}


def outcome(runs: Runs, *, stage: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> Any:
    """All that a user sees of an SFT run of two epochs: weights, numbers, samples, or the message that ends it."""
    rows = [{**row, "other": row["prompt"]} for row in STAGES["sft"][2]]
    files = {"train": rows, "val": rows[:4], "other": rows[::-1][:5], "broken": [*rows, {"prompt": "May"}]}
    named = {key: runs.write(key, records) for key, records in files.items()}
    keys = {"train": "train", "val": "val", "batch_size": 2, **data}
    keys.update({key: named[keys[key]] for key in ("train", "val") if keys[key] is not None})
    runs.tokenizer.chat_template = TEMPLATE
    small = {"samples": 1, "max_new_tokens": 4, "learning_rate": 1e-4}  # so little that answers do not end at once
    run = runs.build("sft", data=keys, trainer={"max_epochs": 2, **trainer}, **{**small, **stage})
    samples: list[Any] = []
    run.module.log_samples = samples.append
    lightning.seed_everything(7, verbose=False)
    try:
        run.trainer.fit(run.module, run.data)
    except UserError as error:
        return str(error)
    weights = {name: weight.tolist() for name, weight in run.weights().items()}
    return weights, numbers(run), samples, run.kept.validated


TEMPLATE = chat_template("{prompt}\nSummary:")


def test_18_the_list_of_keys_is_whole(repo: Path) -> None:
    """What conf/ shows of SFT, of its data and of the optimizer that all stages have is tried below."""
    sft = OmegaConf.load(repo / "conf" / "stage" / "sft.yaml")
    data = {*OmegaConf.load(repo / "conf" / "data" / "demo.yaml").data, *sft.data}
    assert set(sft.stage) - {"_target_"} == STAGE.keys()
    assert data - {"_target_", "test"} - ONLY_HUB == DATA.keys()
    for stage in STAGES:
        assert OPTIMIZER.keys() <= set(composed(f"stage={stage}").stage)


@pytest.mark.slow
def test_18_every_key_changes_the_outcome(runs: Runs) -> None:
    """A run with one key changed is not the run without; the same run again is."""
    torch.manual_seed(9)
    runs.lm, another = (type(runs.lm)(runs.lm.config) for _ in range(2))
    plain = outcome(runs, stage={}, data={}, trainer={})
    assert outcome(runs, stage={}, data={}, trainer={}) == plain
    idle = []
    for part, changes in {"stage": {**STAGE, "policy": Fixed(another)}, "data": DATA, "trainer": TRAINER}.items():
        for key, value in changes.items():
            given = {"stage": {}, "trainer": {}, "data": GIVEN.get(key, {})}
            before = outcome(runs, **given) if key in GIVEN else plain
            if outcome(runs, **{**given, part: {**given[part], key: value}}) == before:
                idle.append(f"{part}.{key}")
    assert idle == []


def test_19_the_reference_of_evaluation_is_the_untrained_model(runs: Runs, tmp_path: Path) -> None:
    """Rewards of validation after training are beta x (log pi - log pi of the first model), each text alone; the same
    from a checkpoint, where the reference was never precomputed.
    """
    data = {"val": runs.write("val", PAIRS)}
    run = runs.fit("dpo", data=data, beta=0.1, learning_rate=1e-2, trainer={"max_epochs": 2})
    expected = []
    for pair in PAIRS:
        opening, text = f"<bos>{pair['prompt']}\nSummary:", f"<bos>{pair['prompt']}\nSummary: {pair['chosen']}<eos>"
        start, ids = (runs.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (opening, text))
        tokens = torch.tensor(ids)
        now, first = (
            logprobs_alone(lm, tokens).gather(1, tokens[1:, None])[len(start) - 1 :].sum()
            for lm in (run.module.policy.lm, runs.lm)
        )
        expected.append(0.1 * float(now - first))
    mean = sum(expected) / len(expected)
    assert abs(mean) > 0.1
    assert float(run.trainer.callback_metrics["val/rewards/chosen"]) == pytest.approx(mean, rel=1e-4)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    opened = runs.build("dpo", data=data, beta=0.1)
    opened.trainer.validate(
        opened.module, opened.data, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert float(opened.trainer.callback_metrics["val/rewards/chosen"]) == pytest.approx(mean, rel=1e-4)


def test_20_ipo_says_whether_it_sums_or_averages(runs: Runs) -> None:
    """The first loss is (1 / (2 beta))^2 in both forms. After a step IPO of the paper has seen sums of log-probs; with
    ``length_normalized`` means a token: the losses part, by arithmetic on the log-probs of whole answers.
    """
    curves = {}
    for switch in (False, True):
        run = runs.fit(
            "dpo", loss=ipo_loss, beta=0.5, length_normalized=switch, learning_rate=1e-2, trainer={"max_epochs": 2}
        )
        first, second = run.curve("train/loss")
        assert first == pytest.approx(1.0)  # (0 - 1 / (2 x 0.5))^2
        texts = run.batches[-1].texts
        with torch.no_grad():
            now, before = (
                Policy(lm)(texts.input_ids, texts.attention_mask, texts.response_mask).logprobs.sum(dim=1)
                for lm in (runs_after_one_step(runs, switch), runs.lm.eval())
            )
        said = (now - before) / (texts.response_mask.sum(dim=1) if switch else 1)
        chosen, rejected = said.chunk(2)
        assert second == pytest.approx(float((chosen - rejected - 1.0).square().mean()), rel=1e-4)
        curves[switch] = second
    assert curves[False] != pytest.approx(curves[True], rel=1e-3)


def runs_after_one_step(runs: Runs, length_normalized: bool) -> Any:
    """The policy of the first of the two epochs."""
    run = runs.fit("dpo", loss=ipo_loss, beta=0.5, length_normalized=length_normalized, learning_rate=1e-2)
    return run.module.policy.lm.eval()


def test_21_the_target_of_the_price_is_per_sequence_and_says_so(runs: Runs) -> None:
    """A policy off its reference, answers of about 5 tokens: the price follows the KL of whole answers.

    Its target is the KL that was logged, summed over tokens, so that the error is 0 and the price stays; a target in
    nats a token would be several times smaller, and the price would rise.
    """

    def price(target: float) -> tuple[float, float]:
        kl = KLController(target_per_sequence=target, horizon=8)
        keys = {"kl": kl, "kl_coef": 0.1, "learning_rate": 1e-2, "trainer": {"max_epochs": 2}}
        run = runs.fit("ppo", **keys)
        return run.curve("kl_coef")[1], run.curve("objective/kl")[1]

    # the first rollout has a KL of 0, whose error is clipped at -0.2: 0.1 x 0.8; the second one decides what follows
    charged, kl = price(1e-3)
    assert charged == pytest.approx(0.08)
    assert kl > 1e-3

    control = KLController(target_per_sequence=kl, horizon=8)
    control.start(0.08)
    control.steer(torch.tensor(kl), 8)
    assert float(control.coef) == pytest.approx(0.08)
    with pytest.raises(TypeError, match="target_per_token"):
        KLController(target_per_token=kl)  # type: ignore[call-arg]
