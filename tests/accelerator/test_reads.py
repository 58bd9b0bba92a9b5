"""Upper bounds on how often the host waits for the device."""

from typing import Any

import lightning
import pytest
import torch
from models.pairs import LLAMA, model, pair_batch

from accelerator.device import DEVICE
from accelerator.reads import Read, recorded_reads, summarize
from accelerator.runs import PAIRINGS, DeviceRuns
from harness import PROMPTS
from rlhf.models import Policy, allows_shared_prompts, disable_dropout
from rlhf.sampling import LocalSampler, SamplingParams


class StepReads(lightning.Callback):
    """Records the reads of each training step, without those of logging."""

    def __init__(self) -> None:
        self.steps: list[list[Read]] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.recording = recorded_reads()
        self.steps.append(self.recording.__enter__())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.recording.__exit__(None, None, None)
        self.steps[-1] = [read for read in self.steps[-1] if not read.is_logging]


@pytest.mark.parametrize(("runs", "kind"), PAIRINGS, indirect=["runs"])
def test_a_training_step_hardly_reads(runs: DeviceRuns, kind: str) -> None:
    """Forward and backward pass, clipping, the optimizer's step and what Lightning does around them.

    In transformers, each forward pass of a model with attention reads once to find packed sequences. PPO has two
    forward passes, of policy and critic. DPO has one of the policy and, in the first epoch, one of the reference model;
    KTO has two of each.
    """
    step_reads = StepReads()
    run = runs.run(kind, callbacks=[step_reads], trainer={"gradient_clip_val": 1.0})
    run.trainer.callbacks.remove(run.recorder)  # It reads the metrics of every step.
    run.fit()
    assert len(step_reads.steps) >= 2
    for reads in step_reads.steps:
        assert len(reads) <= (5 if kind == "kto" else 3), summarize(reads)


@pytest.mark.parametrize("runs", ["transformer", "mamba", "pretrained"], indirect=True)
def test_decoding_reads_at_most_once_in_five_steps(runs: DeviceRuns) -> None:
    """64 prompts of different lengths, whose responses end at different steps."""
    lm = disable_dropout(runs.policy.language_model(runs.tokenizer)).to(DEVICE)
    prompts = [runs.tokenizer(prompt).input_ids for prompt in PROMPTS] * 8
    torch.manual_seed(7)
    sampler = LocalSampler()
    sampler.sync(lm, runs.tokenizer)
    with recorded_reads() as reads:
        rollout = sampler.sample(prompts, SamplingParams(max_new_tokens=64, temperature=1.2))
        rollout.decode(runs.tokenizer)
    lengths = rollout.lengths
    assert int(lengths.max()) >= 56
    assert len(lengths.unique()) > 8
    assert len(reads) <= 0.2 * int(lengths.max()), summarize(reads)


def test_packed_rows_of_pairs_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 24, 10 and 13 tokens, whose log-probs are those of the CPU to rounding."""
    monkeypatch.setattr("rlhf.models.trunk.MASKED_TOKENS", 23)
    policy = Policy(model(LLAMA))
    allows_shared_prompts(policy.lm.base_model)
    *tensors, lengths, shared = pair_batch()
    response_tokens = int(tensors[2].sum())
    expected = policy(*tensors, lengths=lengths, shared_tokens=shared).logprobs.detach()
    policy.to(DEVICE)
    tensors = [tensor.to(DEVICE) for tensor in tensors]
    shapes: list[torch.Size] = []
    policy.lm.base_model.register_forward_pre_hook(
        lambda trunk, args, keys: shapes.append(keys["input_ids"].shape), with_kwargs=True
    )
    with recorded_reads() as reads:
        found = policy(*tensors, lengths=lengths, shared_tokens=shared, response_tokens=response_tokens).logprobs
    assert not reads, summarize(reads)
    assert shapes == [(1, 47)]
    torch.testing.assert_close(found.detach().cpu(), expected)
