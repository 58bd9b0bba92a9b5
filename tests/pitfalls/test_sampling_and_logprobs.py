"""Pitfalls 8 to 12 of the table in README.md: sampling and log-probs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from omegaconf import OmegaConf
from torch import nn

from harness import EXACT, NO_UPDATE, TinyRun, isolated_logprobs, one_architecture
from pitfalls.settings import PLAIN_SCORES
from rlhf.errors import UserError
from rlhf.models import Frozen
from rlhf.rl import ScoreShaping
from rlhf.run import build_trainer
from rlhf.sampling import SamplingParams


def test_08_logprobs_are_those_of_the_full_distribution_at_the_sampling_temperature(tiny_run: TinyRun) -> None:
    """Tokens are sampled from the 5 most likely ones; their log-probs are log softmax over all logits divided by 0.7.

    The policy still equals the reference model, so the KL between them is exactly 0.
    """
    sampling = SamplingParams(max_new_tokens=8, temperature=0.7, top_k=5, top_p=0.9)
    run = tiny_run.train("ppo", sampling=sampling, trainer={"max_steps": 1})
    (part,) = run.batches
    for row, response, old in zip(part.input_ids, part.response_mask, part.old_logprobs, strict=True):
        ids = row[: int(response.nonzero()[-1]) + 1]
        full = isolated_logprobs(tiny_run.lm, ids, temperature=0.7)
        chosen = full.gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(old[response], chosen[response[1 : len(ids)]])
        better = (full > chosen[:, None]).sum(dim=1)[response[1 : len(ids)]]
        assert better.max() < 5
        assert full.exp().sum(dim=1).tolist() == pytest.approx([1.0] * (len(ids) - 1))
    assert run.curve("objective/kl") == [0.0]


def check_first_ratio(tiny_run: TinyRun) -> None:
    """In both minibatches before the first update every ratio is exactly 1."""
    run = tiny_run.train("ppo", minibatch_size=4, trainer={"accumulate_grad_batches": 2})
    assert len(run.batches) == 2
    lengths = run.batches[0].response_mask.sum(dim=1)
    assert lengths.min() < lengths.max(), "without padding, this test shows nothing"
    assert run.curve("policy/ratio") == [1.0]
    assert run.curve("policy/approxkl_avg") == [0.0]
    assert run.curve("objective/kl") == [0.0]


def test_09_first_ratio_is_exactly_one(tiny_run: TinyRun) -> None:
    check_first_ratio(tiny_run)


def test_09_first_ratio_is_exactly_one_with_dropout(dropout_run: TinyRun) -> None:
    """The Trainer puts the policy in train mode between sampling and training, and the model's config has dropout."""
    check_first_ratio(dropout_run)


class ModeRecorder(lightning.Callback):
    """Records at every training batch whether the policy is in train mode and whether a frozen module could change."""

    def __init__(self) -> None:
        self.policy_training: list[bool] = []
        self.frozen_changeable: list[bool] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        models = frozen_models(module)
        self.policy_training.append(module.policy.lm.training)
        self.frozen_changeable.append(
            any(part.training or has_gradient(part) for model in models for part in model.modules())
        )


def frozen_models(module: Any) -> list[nn.Module]:
    return [part.model for part in module.modules() if isinstance(part, Frozen)]


def has_gradient(part: nn.Module) -> bool:
    return any(weight.requires_grad or weight.grad is not None for weight in part.parameters())


@pytest.mark.parametrize(("stage", "count"), [("dpo", 1), ("ppo", 2)])
def test_10_frozen_models_stay_in_eval_mode_without_gradients(tiny_run: TinyRun, stage: str, count: int) -> None:
    """The Trainer switches between train() and eval() for three epochs, and the test calls train() itself."""
    modes = ModeRecorder()
    val = {"val": str(tiny_run.folder / f"{stage}.jsonl")}
    keys = {"precompute_ref_logprobs": False} if stage == "dpo" else {}  # DPO would free its reference model.
    run = tiny_run.train(stage, data=val, callbacks=[modes], trainer={"max_epochs": 3}, **keys)
    run.module.train()
    assert len(frozen_models(run.module)) == count
    assert modes.policy_training == [True] * 3
    assert modes.frozen_changeable == [False] * 3
    assert not any(part.training for model in frozen_models(run.module) for part in model.modules())
    reference = run.module.reference.model
    torch.testing.assert_close(reference.lm.state_dict(), tiny_run.lm.state_dict(), **EXACT)


@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo"])
def test_10_dropout_is_off_in_every_model(dropout_run: TinyRun, stage: str) -> None:
    """With learning rate 0, two epochs over the same 8 rows in train mode give the same loss.

    With dropout 0.1 they would not: SFT, which keeps dropout, is the counterexample.
    """

    def losses(name: str) -> list[float]:
        run = dropout_run.train(name, learning_rate=NO_UPDATE, trainer={"max_epochs": 2}, **greedy_sampling(name))
        assert run.module.training
        return run.curve("train/loss")

    one, two = losses(stage)
    assert two == pytest.approx(one, rel=1e-5)  # The rows are in another order.
    one, two = losses("sft")
    assert two != pytest.approx(one, rel=1e-5)


def greedy_sampling(stage: str) -> dict[str, Any]:
    """Let PPO sample the most likely response, which is the same in both epochs."""
    sampling = SamplingParams(max_new_tokens=8, temperature=0.7, top_k=1)
    return {"sampling": sampling, "scores": ScoreShaping(**PLAIN_SCORES)} if stage == "ppo" else {}


@one_architecture
def test_11_the_missing_eos_penalty_uses_the_configured_stop_tokens(tiny_run: TinyRun) -> None:
    """If every token except EOS is a stop token, every response ends at its first token and no score is penalized.

    If EOS is the only stop token, responses of one token are truncated, and each score is lowered by the penalty of 7.
    """
    vocabulary = tiny_run.tokenizer.get_vocab()
    others = [text for text, token in vocabulary.items() if token != tiny_run.tokenizer.eos_token_id]
    scores = {**PLAIN_SCORES, "missing_eos_penalty": 7.0}
    rewards = {}
    for name, stops in {"configured": others, "eos": None}.items():
        sampling = SamplingParams(max_new_tokens=1, temperature=0.7, stop_tokens=stops)
        run = tiny_run.train(
            "ppo", sampling=sampling, scores=ScoreShaping(**scores), kl_coef=0.0, trainer={"max_steps": 1}
        )
        (truncated,), (shaped,) = run.curve("response/truncated"), run.curve("objective/rlhf_reward")
        rewards[name] = shaped - run.curve("objective/scores")[0]
        ended = [
            int(row[response][-1]) == tiny_run.tokenizer.eos_token_id
            for row, response in zip(run.batches[0].input_ids, run.batches[0].response_mask, strict=True)
        ]
        assert truncated == pytest.approx(sum(ended) / 8 if stops else 1 - sum(ended) / 8)
        assert rewards[name] == pytest.approx(-7.0 * truncated, abs=1e-5)
    assert rewards["configured"] != rewards["eos"]


@pytest.mark.slow
def test_12_ranks_whose_responses_end_at_different_steps_stay_in_step(two_ranks: Path, architecture: str) -> None:
    """One rank samples at most 2 tokens, the other up to 16: both finish, with the same weights."""
    (one, short), (other, long) = (torch.load(two_ranks / architecture / rank / "ppo.pt") for rank in "01")
    assert len(short) == len(long) == 2
    assert max(short) <= 2 < min(long)
    torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_12_strategies_that_do_not_gather_models_for_sampling_are_rejected(
    strategy: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sharded models every forward pass is a collective operation, except where sampling gathers the model first:
    trainer=fsdp. Lightning rejects these strategies on a CPU, so the Trainer is a fake.
    """
    monkeypatch.setattr("rlhf.run.instantiate", lambda *_, **__: SimpleNamespace(strategy=strategy.__new__(strategy)))
    trainer = {"strategy": "fsdp", "enable_progress_bar": None, "enable_checkpointing": None}
    with pytest.raises(UserError, match=r"trainer\.strategy=fsdp.*\n.*trainer=fsdp"):
        build_trainer(OmegaConf.create({"callbacks": {}, "logger": {}, "trainer": trainer}), [])
