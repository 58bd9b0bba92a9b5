"""Pitfalls 8 to 12 of the table in README.md beside this file: sampling and log-probs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from omegaconf import OmegaConf
from torch import nn

from pitfalls.runs import PLAIN_SCORES, Runs, logprobs_alone
from rlhf.errors import UserError
from rlhf.models import Frozen
from rlhf.rl import ScoreShaping
from rlhf.run import _trainer
from rlhf.sampling import SamplingParams


def test_08_logprobs_are_of_the_whole_distribution_at_the_temperature_of_sampling(runs: Runs) -> None:
    """Drawn from the 5 most likely tokens, judged by all: log softmax of the plain model's logits over 0.7.

    The policy is still the reference, and the KL between the two is 0 to the last bit.
    """
    sampling = SamplingParams(max_new_tokens=8, temperature=0.7, top_k=5, top_p=0.9)
    run = runs.fit("ppo", sampling=sampling, trainer={"max_steps": 1})
    (part,) = run.batches
    for row, answer, old in zip(part.input_ids, part.response_mask, part.old_logprobs, strict=True):
        ids = row[: int(answer.nonzero()[-1]) + 1]
        everything = logprobs_alone(runs.lm, ids, temperature=0.7)
        chosen = everything.gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(old[answer], chosen[answer[1 : len(ids)]])
        better = (everything > chosen[:, None]).sum(dim=1)[answer[1 : len(ids)]]
        assert better.max() < 5
        assert everything.exp().sum(dim=1).tolist() == pytest.approx([1.0] * (len(ids) - 1))
    assert run.curve("objective/kl") == [0.0]


def check_first_ratio(runs: Runs) -> None:
    """Two minibatches before the first update, in the parts they are learned in: every ratio is 1, bit for bit."""
    run = runs.fit("ppo", minibatch_size=4, trainer={"accumulate_grad_batches": 2})
    assert len(run.batches) == 2
    lengths = run.batches[0].response_mask.sum(dim=1)
    assert lengths.min() < lengths.max(), "answers of one length would not show what padding does"
    assert run.curve("policy/ratio") == [1.0]
    assert run.curve("policy/approxkl_avg") == [0.0]
    assert run.curve("objective/kl") == [0.0]


def test_09_first_ratio_is_exactly_one(runs: Runs) -> None:
    check_first_ratio(runs)


def test_09_first_ratio_is_exactly_one_with_dropout(dropout_runs: Runs) -> None:
    """The Trainer puts the policy in train mode between sampling and learning, and its config asks for dropout."""
    check_first_ratio(dropout_runs)


class Modes(lightning.Callback):
    """Notes what the frozen parts are like while the Trainer trains, after it has validated."""

    def __init__(self) -> None:
        self.trained: list[bool] = []
        self.frozen: list[bool] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        parts = check_frozen_models(module)
        self.trained.append(module.policy.lm.training)
        self.frozen.append(any(part.training or wants_gradient(part) for whole in parts for part in whole.modules()))


def check_frozen_models(module: Any) -> list[nn.Module]:
    return [part.model for part in module.modules() if isinstance(part, Frozen)]


def wants_gradient(part: nn.Module) -> bool:
    return any(weight.requires_grad or weight.grad is not None for weight in part.parameters())


@pytest.mark.parametrize(("stage", "count"), [("dpo", 1), ("ppo", 2)])
def test_10_frozen_parts_stay_in_eval_without_gradient(runs: Runs, stage: str, count: int) -> None:
    """Reference and reward model through three epochs of train() and eval() by the Trainer, and train() by hand."""
    modes = Modes()
    val = {"val": str(runs.folder / f"{stage}.jsonl")}
    run = runs.fit(stage, data=val, callbacks=[modes], trainer={"max_epochs": 3})
    run.module.train()
    assert len(check_frozen_models(run.module)) == count
    assert modes.trained == [True] * 3
    assert modes.frozen == [False] * 3
    assert not any(part.training for whole in check_frozen_models(run.module) for part in whole.modules())
    reference = run.module.reference.model
    torch.testing.assert_close(reference.lm.state_dict(), runs.lm.state_dict(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo"])
def test_10_dropout_is_off_in_every_part(dropout_runs: Runs, stage: str) -> None:
    """Nothing is learned (learning rate 0): two epochs over the same 8 rows in train mode give the same loss.

    With dropout at 0.1 they would not: SFT, which keeps it, is the counter-example.
    """

    def losses(name: str) -> list[float]:
        run = dropout_runs.fit(name, learning_rate=0.0, trainer={"max_epochs": 2}, **same_answers(name))
        assert run.module.training
        return run.curve("train/loss")

    one, two = losses(stage)
    assert two == pytest.approx(one, rel=1e-5)  # the rows come in another order
    one, two = losses("sft")
    assert two != pytest.approx(one, rel=1e-5)


def same_answers(stage: str) -> dict[str, Any]:
    """PPO draws one answer for good: the most likely one."""
    sampling = SamplingParams(max_new_tokens=8, temperature=0.7, top_k=1)
    return {"sampling": sampling, "scores": ScoreShaping(**PLAIN_SCORES)} if stage == "ppo" else {}


def test_11_the_missing_eos_penalty_looks_at_the_configured_stop_token(runs: Runs) -> None:
    """Every token but EOS may end an answer, and does at once: nothing is truncated, and no shaped score is charged.

    With EOS as the one stop token answers of one token are cut, and each loses the penalty of 7.
    """
    vocabulary = runs.tokenizer.get_vocab()
    others = [text for text, token in vocabulary.items() if token != runs.tokenizer.eos_token_id]
    scores = {**PLAIN_SCORES, "missing_eos_penalty": 7.0}
    rewards = {}
    for name, stops in {"configured": others, "eos": None}.items():
        sampling = SamplingParams(max_new_tokens=1, temperature=0.7, stop_tokens=stops)
        run = runs.fit("ppo", sampling=sampling, scores=ScoreShaping(**scores), kl_coef=0.0, trainer={"max_steps": 1})
        (truncated,), (shaped,) = run.curve("response/truncated"), run.curve("objective/rlhf_reward")
        rewards[name] = shaped - run.curve("objective/scores")[0]
        ended = [
            int(row[answer][-1]) == runs.tokenizer.eos_token_id
            for row, answer in zip(run.batches[0].input_ids, run.batches[0].response_mask, strict=True)
        ]
        assert truncated == pytest.approx(sum(ended) / 8 if stops else 1 - sum(ended) / 8)
        assert rewards[name] == pytest.approx(-7.0 * truncated, abs=1e-5)
    assert rewards["configured"] != rewards["eos"]


@pytest.mark.slow
def test_12_ranks_whose_answers_end_at_different_steps_wait_for_each_other(two_ranks: Path, architecture: str) -> None:
    """Answers of at most 2 tokens on one rank and of up to 16 on the other: both arrive, with the same weights."""
    (one, short), (other, long) = (torch.load(two_ranks / architecture / rank / "ppo.pt") for rank in "01")
    assert len(short) == len(long) == 2
    assert max(short) <= 2 < min(long)
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_12_sharded_models_are_refused(strategy: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under them every token of every rank is a meeting of all. Lightning itself refuses them on a CPU, so the
    Trainer is a stand-in here.
    """
    monkeypatch.setattr("rlhf.run.instantiate", lambda *_, **__: SimpleNamespace(strategy=strategy()))
    trainer = {"strategy": "fsdp", "enable_progress_bar": None, "enable_checkpointing": None}
    with pytest.raises(UserError, match=r"trainer\.strategy=fsdp.*\n.*trainer=ddp"):
        _trainer(OmegaConf.create({"callbacks": {}, "logger": {}, "trainer": trainer}), [])
