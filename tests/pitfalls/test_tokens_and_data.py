"""Pitfalls 1 to 7 of the table in README.md: tokens and data."""

import logging
import math
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from harness import (
    DEMONSTRATIONS,
    NO_UPDATE,
    PAIRS,
    TinyRun,
    isolated_logprobs,
    isolated_score,
    one_architecture,
    sequences,
)
from harness import STAGES as HARNESS_STAGES
from pitfalls.settings import STAGES
from rlhf.errors import UserError
from rlhf.models import train_tokenizer

BOS, EOS = 1, 2
TEXT_STAGES = ("sft", "reward", "dpo")  # stages that learn from the responses in the data


def copy_tokenizer(tokenizer: PreTrainedTokenizerFast, **special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the same vocabulary and template, and other special tokens."""
    core = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **special}
    copy = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    copy.chat_template = tokenizer.chat_template
    return copy


def rows(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Return the prompt tokens and the response tokens of each row of a batch."""
    batch = sequences(batch)
    rows = zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True)
    return [(ids[real & ~response].tolist(), ids[response].tolist()) for ids, real, response in rows]


@one_architecture
def test_01_eos_carries_loss(tiny_run: TinyRun, tokenizer: PreTrainedTokenizerFast) -> None:
    """The pad token is EOS. After 20 steps EOS is more likely after a demonstration, by more than a nat on average.

    Without loss on EOS it would have become less likely: every step lowers the probability of all other tokens.
    """
    tiny_run.tokenizer = copy_tokenizer(tokenizer, pad_token="<eos>")
    run = tiny_run.train("sft", trainer={"max_epochs": 20}, learning_rate=1e-2)
    assert not run.batches[0].attention_mask.all(), "without padding, this test shows nothing"
    gains = []
    for prompt, response in rows(run.batches[0]):
        assert response[-1] == EOS
        ids = run.batches[0].input_ids.new_tensor([*prompt, *response])
        before, after = (isolated_logprobs(lm, ids)[-1, EOS] for lm in (tiny_run.lm, run.module.policy.lm))
        gains.append(float(after - before))
    assert sum(gains) / len(gains) > 1.0


@one_architecture
@pytest.mark.parametrize("stage", STAGES)
def test_02_one_bos_if_both_template_and_tokenizer_add_one(
    tiny_run: TinyRun, tokenizer: PreTrainedTokenizerFast, stage: str
) -> None:
    """Every prompt begins with one BOS and contains no other."""
    adds_bos = copy_tokenizer(tokenizer)
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    assert adds_bos("x")["input_ids"][0] == BOS
    assert "bos_token" in adds_bos.chat_template
    tiny_run.tokenizer = adds_bos
    run = tiny_run.train(stage, trainer={"max_steps": 1})
    prompts = [prompt for prompt, _ in rows(run.batches[0])]
    assert len(prompts) >= 8
    assert all(prompt[0] == BOS and prompt.count(BOS) == 1 for prompt in prompts)


@one_architecture
@pytest.mark.parametrize("stage", TEXT_STAGES)
def test_03_prompt_and_response_are_tokenized_together(tiny_run: TinyRun, stage: str) -> None:
    """The prompt ends in 'a', the response is 'b', and 'ab' is one token: that token belongs to the response."""
    tiny_run.tokenizer = train_tokenizer(["ababab"], 260)
    tiny_run.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    record = {"prompt": "xa", "completion": "b"} if stage == "sft" else {"prompt": "xa", "chosen": "b", "rejected": "c"}
    run = tiny_run.train(stage, data={"train": tiny_run.write("joint", [record])}, trainer={"max_steps": 1})
    first, *others = [tuple(map(tiny_run.tokenizer.convert_ids_to_tokens, row)) for row in rows(run.batches[0])]
    assert first == (["x"], ["ab", "<eos>"])
    assert others == ([] if stage == "sft" else [(["x", "a"], ["c", "<eos>"])])


@one_architecture
@pytest.mark.parametrize("stage", TEXT_STAGES)
def test_04_truncation_keeps_the_response_and_is_counted(
    tiny_run: TinyRun, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With 16 tokens a long prompt loses its start and a long response its end; no response is empty, no loss NaN."""
    one, other = ("May", "y" * 40) if stage == "sft" else ("May", "A")
    records = [{"prompt": "x" * 50, "completion": one}, {"prompt": "When?", "completion": other}]
    if stage != "sft":
        records = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "y" * 40} for row in records]
    with caplog.at_level(logging.INFO, logger="rlhf"):
        run = tiny_run.train(stage, data={"train": tiny_run.write("long", records), "max_length": 16})
    batch = run.batches[0]
    assert sequences(batch).attention_mask.sum(dim=1).max() == 16
    assert all(response for _, response in rows(batch))
    ended = [response[-1] == EOS for _, response in rows(batch)]
    assert ended.count(True) == len(ended) / 2
    assert all(map(math.isfinite, run.curve("train/loss")))
    assert f"2 prompts and {1 if stage == 'sft' else 2} responses truncated to fit 16 tokens" in caplog.text


def test_05_last_token_with_pad_equal_eos(tiny_run: TinyRun, tokenizer: PreTrainedTokenizerFast) -> None:
    """Every prompt contains an EOS, and EOS is the pad token: scores are still read at the last token of a sequence.

    The learning rate is 0. The mean score of the 8 chosen responses equals the mean over isolated sequences, in one
    batch of 8 and in 8 batches of 1.
    """
    tiny_run.tokenizer = copy_tokenizer(tokenizer, pad_token="<eos>")
    pairs = [{**pair, "prompt": f"{pair['prompt']}<eos> And?"} for pair in PAIRS]
    isolated = []
    for pair in pairs:
        text = f"<bos>{pair['prompt']}\nSummary: {pair['chosen']}<eos>"
        ids = tiny_run.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        assert ids.tolist().count(EOS) == 2
        isolated.append(isolated_score(tiny_run.reward_model, ids))
    for size in (8, 1):
        data = {"train": tiny_run.write("inside", pairs), "batch_size": size}
        run = tiny_run.build("reward", data=data, learning_rate=NO_UPDATE)
        run.module.configure_model()
        run.module.model.load_state_dict(tiny_run.reward_model.state_dict())
        run.fit()
        scores = run.curve("train/chosen_reward")
        assert len(scores) == 8 / size
        assert sum(scores) / len(scores) == pytest.approx(sum(isolated) / 8, rel=1e-5)  # float32


@pytest.mark.parametrize("stage", TEXT_STAGES)
def test_06_padding_and_other_rows_do_not_affect_a_sequence(tiny_run: TinyRun, stage: str) -> None:
    """Validation in batches of 1, 3 and 8 gives the same metrics, for attention and for a recurrent state.

    The rewards of DPO are left out: before training they are rounding noise around 0.
    """
    metrics = []
    for size in (1, 3, 8):
        val = {"val": tiny_run.write("val", HARNESS_STAGES[stage].records), "eval_batch_size": size}
        run = tiny_run.train(stage, data=val, learning_rate=NO_UPDATE)
        found = run.trainer.callback_metrics
        metrics.append({k: float(v) for k, v in found.items() if k.startswith("val/") and "rewards/" not in k})
    assert "val/loss" in metrics[0]
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-4, abs=1e-6)  # float32 sums in another order


@one_architecture
@pytest.mark.parametrize("stage", STAGES)
def test_07_an_invalid_record_is_reported_with_file_and_line(tiny_run: TinyRun, stage: str) -> None:
    """The error names the file, the line, the fields and an override. It is not a KeyError during training."""
    records = [DEMONSTRATIONS[0] if stage in ("sft", "ppo") else PAIRS[0], {"text": "It rains."}]
    with pytest.raises(UserError, match=r"broken\.jsonl:2: .*\(fields: text\)(.|\n)*data\.on_error=skip"):
        tiny_run.train(stage, data={"train": tiny_run.write("broken", records)})
