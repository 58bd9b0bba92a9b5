"""The DPO stage in Lightning's own loop, for both architectures."""

import json
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers import PROMPTS, Fixed
from rlhf.dpo import DPODataModule, DPOModule
from rlhf.errors import UserError

ANSWERS = [
    "May", "Nadia Falk, camera, Dunmore, May, 90 euros.", "In short, it rains.", "90 euros", "A",
    "The mayor opened it.", "B b", "Monday", "children, weather",
]  # fmt: skip


class Record(lightning.Callback):
    """Keeps the logged numbers of every batch, and whether the data knew the reference's log-probs."""

    def __init__(self) -> None:
        self.numbers: list[dict[str, float]] = []
        self.precomputed: list[bool] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.numbers.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.precomputed.append(batch.reference is not None)

    def curve(self, name: str) -> list[float]:
        return [numbers[name] for numbers in self.numbers]


class Setting:
    """Builds and trains a tiny DPO run of 8 pairs; every call starts from the same model and seed."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> None:
        self.tokenizer, self.lm, self.pairs = tokenizer, lm, folder / "pairs.jsonl"
        rows = [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for prompt, chosen, rejected in zip(PROMPTS, ANSWERS, ANSWERS[1:], strict=False)
        ]
        self.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(
        self, *, batch_size: int = 2, trainer: dict[str, Any] | None = None, **keys: Any
    ) -> tuple[DPOModule, Record]:
        module, record = (
            DPOModule(policy=Fixed(self.lm), **{"learning_rate": 1e-3, "schedule": "constant", **keys}),
            Record(),
        )
        data = DPODataModule(
            train=str(self.pairs), val_fraction=0, max_length=96, batch_size=batch_size, eval_batch_size=3
        )
        module.tokenizer = data.tokenizer = self.tokenizer
        lightning.seed_everything(7, verbose=False)
        lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, callbacks=[record],
            **{"max_epochs": 1, **(trainer or {})},
        ).fit(module, data)  # fmt: skip
        return module, record


@pytest.fixture
def setting(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: PreTrainedModel) -> Setting:
    return Setting(tmp_path, tokenizer, lm)


@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "at each step"])
def test_first_loss_is_ln_2(setting: Setting, precompute: bool) -> None:
    """The policy is the reference until the first step: every margin is 0, and -ln sigmoid(0) = ln 2."""
    _, record = setting.train(precompute_reference=precompute)
    assert record.curve("train/loss")[0] == pytest.approx(math.log(2))
    assert record.curve("train/loss")[1] != pytest.approx(math.log(2))
    assert record.precomputed == [precompute] * 4


def test_precomputing_the_reference_changes_no_number(setting: Setting) -> None:
    """The same losses, rewards and final weights: the reference is the untrained policy either way.

    The reference is scored in batches of 3 pairs, the policy in batches of 2. Sums of log-probs near -100 nats are then
    rounded at 1e-5, which the tolerances of the curves allow; weights after 8 steps of AdamW, whose steps divide by the
    gradient's size, at 1e-3 of the learning rate a step.
    """
    before, one = setting.train(precompute_reference=True, trainer={"max_epochs": 2})
    during, other = setting.train(precompute_reference=False, trainer={"max_epochs": 2})
    for name in ("train/loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert len(set(one.curve(name))) > 1
        assert one.curve(name) == pytest.approx(other.curve(name), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(before.policy.state_dict(), during.policy.state_dict(), rtol=1e-4, atol=8e-6)


def test_only_the_policy_learns(setting: Setting) -> None:
    """The reference keeps every bit and stays out of checkpoints, and training prefers the chosen answers."""
    module, record = setting.train(batch_size=8, learning_rate=3e-3, trainer={"max_epochs": 10})
    torch.testing.assert_close(module.reference.model.lm.state_dict(), setting.lm.state_dict(), rtol=0.0, atol=0.0)
    assert not any(part.training for part in module.reference.model.modules())
    assert all(name.startswith("policy.") for name in module.state_dict())
    assert record.curve("train/loss")[-1] < 0.9 * math.log(2)


def test_accumulation_is_the_bigger_batch(setting: Setting) -> None:
    """4 batches of 2 pairs make the step that 1 of 8 makes.

    AdamW's eps is 1: the first step is then close to lr x gradient, where the usual eps would turn the rounding noise
    of tiny gradients into whole steps. Tolerances are the defaults.
    """
    keys = {"eps": 1.0, "learning_rate": 1.0, "trainer": {"max_steps": 1}}
    big, _ = setting.train(batch_size=8, **keys)
    small, record = setting.train(batch_size=2, **{**keys, "trainer": {"max_steps": 1, "accumulate_grad_batches": 4}})
    assert len(record.numbers) == 4
    pairs = zip(big.policy.parameters(), setting.lm.parameters(), strict=True)
    assert max(float((new - old).abs().max()) for new, old in pairs) > 1e-3
    torch.testing.assert_close(small.policy.state_dict(), big.policy.state_dict())


def test_beta_scales_the_rewards(setting: Setting) -> None:
    """After the same first step, the second batch's rewards are beta x the same log-ratio.

    AdamW's first step has the sign of the gradient, and beta only scales the gradient: beta 0.2 and 0.1 move alike up
    to eps, and rewards double.
    """
    _, one = setting.train(beta=0.1, eps=1e-20, trainer={"max_steps": 2})
    _, two = setting.train(beta=0.2, eps=1e-20, trainer={"max_steps": 2})
    assert two.curve("rewards/chosen")[1] == pytest.approx(2 * one.curve("rewards/chosen")[1], rel=1e-2)
    with pytest.raises(UserError, match=r"stage\.beta=0"):
        setting.train(beta=0.0)
