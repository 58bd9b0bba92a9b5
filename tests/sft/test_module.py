"""Supervised fine-tuning in Lightning's own loop, for both architectures."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness import NO_UPDATE, PROMPTS, RESPONSES, TinyRun
from rlhf.errors import ConfigError
from rlhf.sampling import Rollout, SamplingParams
from rlhf.sft import SFTDataModule, SFTModule

PAIRS = list(zip(PROMPTS, RESPONSES, strict=False))


def token_losses(tiny_run: TinyRun, prompt: str, response: str) -> tuple[list[float], int]:
    """Negative log-likelihood of each token but the first under the initial model, and the index of the response."""
    opening, text = f"<bos>{prompt}\nSummary:", f"<bos>{prompt}\nSummary: {response}<eos>"
    ids = tiny_run.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = len(tiny_run.tokenizer(opening, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = tiny_run.lm(ids).logits[0, :-1]
    return F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist(), start - 1


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_first_loss_is_the_mean_over_the_tokens_to_learn(tiny_run: TinyRun, loss_on: str) -> None:
    """Expected: one sequence at a time through the bare model; responses with EOS, or everything after BOS."""
    expected: list[float] = []
    for prompt, response in PAIRS:
        losses, start = token_losses(tiny_run, prompt, response)
        expected += losses[start:] if loss_on == "response" else losses
    run = tiny_run.train("sft", data={"loss_on": loss_on})
    assert run.curve("train/loss")[0] == pytest.approx(sum(expected) / len(expected), rel=1e-5)  # float32
    assert run.batches[0].loss_terms == len(expected)


def test_unknown_loss_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.loss_on must be response, assistant, or all, got 'prompt'"):
        SFTDataModule(loss_on="prompt")


def test_loss_covers_eos_and_excludes_padding(tiny_run: TinyRun) -> None:
    """EOS is the last token to learn in each row, and occurs once. No padding token is learned."""
    batch = tiny_run.train("sft").batches[0]
    assert not (batch.response_mask & ~batch.attention_mask).any()
    assert not batch.attention_mask.all(), "the batch must contain padding"
    learned = [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.response_mask, strict=True)]
    eos = tiny_run.tokenizer.eos_token_id
    assert all(row[-1] == eos and row.count(eos) == 1 for row in learned)


def test_gradient_accumulation_equals_the_larger_batch(tiny_run: TinyRun) -> None:
    """4 batches of 2 sequences give the same step as one of 8 (transformers#35203: a mean of means differs).

    With an AdamW epsilon of 1, the first step is close to learning rate x gradient. The usual epsilon would turn
    rounding errors of tiny gradients into full steps. Tolerances are the defaults.
    """
    keys = {"eps": 1.0, "learning_rate": 1.0}
    large = tiny_run.train("sft", trainer={"max_steps": 1}, **keys)
    small = tiny_run.train(
        "sft", data={"batch_size": 2}, trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **keys
    )
    assert len({batch.loss_terms for batch in small.batches}) > 1, "batches must differ in their number of tokens"
    updates = zip(large.module.policy.lm.parameters(), tiny_run.lm.parameters(), strict=True)
    assert max(float((new - old).detach().abs().max()) for new, old in updates) > 1e-3
    torch.testing.assert_close(small.module.policy.state_dict(), large.module.policy.state_dict())


def test_validation_loss_is_the_mean_over_the_tokens_of_all_batches(tiny_run: TinyRun) -> None:
    """Batches of 3, 3 and 2 sequences are weighted by their tokens. The learning rate is 0."""
    expected: list[float] = []
    for prompt, response in PAIRS:
        losses, start = token_losses(tiny_run, prompt, response)
        expected += losses[start:]
    rows = [{"prompt": prompt, "completion": response} for prompt, response in PAIRS]
    run = tiny_run.train(
        "sft", data={"val": tiny_run.write("val", rows), "eval_batch_size": 3}, learning_rate=NO_UPDATE
    )
    assert run.curve("val/loss")[-1] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


class FakeSampler:
    """Responds with the first two tokens of the prompt, and records its calls."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.calls.append((policy, tokenizer))

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        self.calls.append(params)
        return Rollout.from_responses(prompts, [prompt[1:3] for prompt in prompts], stop_ids=[])


def test_samples_come_from_the_configured_sampler(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the epoch, the sampler is synchronized with the trained policy and asked for greedy responses."""
    sampler, tables = FakeSampler(), []
    monkeypatch.setattr(SFTModule, "log_samples", lambda self, header, rows: tables.append((header, rows)))
    rows = tiny_run.write("val", [{"prompt": prompt, "completion": "x"} for prompt in PROMPTS])
    run = tiny_run.train("sft", data={"val": rows}, sampler=sampler, samples=2, max_new_tokens=5)
    assert sampler.calls == [
        (run.module.policy.lm, tiny_run.tokenizer),
        SamplingParams(max_new_tokens=5, temperature=0.0),
    ]
    responses = [tiny_run.tokenizer.decode(ids[1:3]).strip() for ids, _ in run.datamodule.sample_prompts(2)]
    assert tables == [(("prompt", "response"), list(zip(PROMPTS[:2], responses, strict=True)))]


@pytest.mark.slow
def test_training_learns_the_demonstrations(tiny_run: TinyRun) -> None:
    """60 steps on 8 sequences: the loss falls from about ln 300 = 5.7 to below 1."""
    run = tiny_run.train("sft", trainer={"max_epochs": 60}, learning_rate=1e-2)
    assert run.curve("train/loss")[-1] < 1.0
    assert run.curve("train/token_accuracy")[-1] > 0.8
    assert run.module.result().model is run.module.policy.lm
