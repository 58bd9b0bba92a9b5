"""Pitfalls 1 to 7 of the table in README.md beside this file: tokens and data."""

import logging
import math
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pitfalls.runs import DEMONSTRATIONS, PAIRS, STAGES, Runs, logprobs_alone, score_alone, texts
from rlhf.errors import UserError
from rlhf.models import train_tokenizer

BOS, EOS = 1, 2
TEXT_STAGES = ("sft", "reward", "dpo")  # those that learn from given answers


def same_words(tokenizer: PreTrainedTokenizerFast, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the same tokens and template, and other special tokens."""
    core = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **special}
    theirs = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    theirs.chat_template = tokenizer.chat_template
    return theirs


def rows(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer tokens of each row of a batch."""
    text = texts(batch)
    parts = zip(text.input_ids, text.attention_mask, text.response_mask, strict=True)
    return [(row[real & ~answer].tolist(), row[answer].tolist()) for row, real, answer in parts]


def test_01_eos_carries_loss(runs: Runs, tokenizer: PreTrainedTokenizerFast) -> None:
    """The pad token is EOS. After 20 steps EOS is more likely after each demonstration, by more than a nat on average.

    Without loss on it, it would have become less likely: every step pushes all that is no target down.
    """
    runs.tokenizer = same_words(tokenizer, pad_token="<eos>")
    run = runs.fit("sft", trainer={"max_epochs": 20}, learning_rate=1e-2)
    assert not run.batches[0].attention_mask.all(), "without padding this would show nothing"
    gains = []
    for prompt, answer in rows(run.batches[0]):
        assert answer[-1] == EOS
        ids = run.batches[0].input_ids.new_tensor([*prompt, *answer])
        before, after = (logprobs_alone(lm, ids)[-1, EOS] for lm in (runs.lm, run.module.policy.lm))
        gains.append(float(after - before))
    assert sum(gains) / len(gains) > 1.0


@pytest.mark.parametrize("stage", STAGES)
def test_02_one_bos_where_template_and_tokenizer_both_write_one(
    runs: Runs, tokenizer: PreTrainedTokenizerFast, stage: str
) -> None:
    """Every prompt that is trained on or answered begins with one BOS, and holds no other."""
    theirs = same_words(tokenizer)
    theirs.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    assert theirs("x")["input_ids"][0] == BOS
    assert "bos_token" in theirs.chat_template
    runs.tokenizer = theirs
    run = runs.fit(stage, trainer={"max_steps": 1})
    prompts = [prompt for prompt, _ in rows(run.batches[0])]
    assert len(prompts) >= 8
    assert all(prompt[0] == BOS and prompt.count(BOS) == 1 for prompt in prompts)


@pytest.mark.parametrize("stage", TEXT_STAGES)
def test_03_prompt_and_answer_are_encoded_as_one_text(runs: Runs, stage: str) -> None:
    """The prompt ends in 'a', the answer is 'b', and 'ab' is one token: it is learned as one, with the answer."""
    runs.tokenizer = train_tokenizer(["ababab"], 260)
    runs.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    record = {"prompt": "xa", "completion": "b"} if stage == "sft" else {"prompt": "xa", "chosen": "b", "rejected": "c"}
    run = runs.fit(stage, data={"train": runs.write("joint", [record])}, trainer={"max_steps": 1})
    first, *others = [
        tuple(map(runs.tokenizer.convert_ids_to_tokens, (prompt, answer))) for prompt, answer in rows(run.batches[0])
    ]
    assert first == (["x"], ["ab", "<eos>"])
    assert others == ([] if stage == "sft" else [(["x", "a"], ["c", "<eos>"])])


@pytest.mark.parametrize("stage", TEXT_STAGES)
def test_04_truncation_keeps_the_answer_and_is_counted(
    runs: Runs, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """16 tokens: a long prompt loses its beginning, a long answer its end; no answer is empty, no loss undefined."""
    one, other = ("May", "y" * 40) if stage == "sft" else ("May", "A")
    records = [{"prompt": "x" * 50, "completion": one}, {"prompt": "When?", "completion": other}]
    if stage != "sft":
        records = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "y" * 40} for row in records]
    with caplog.at_level(logging.INFO, logger="rlhf"):
        run = runs.fit(stage, data={"train": runs.write("long", records), "max_length": 16})
    batch = run.batches[0]
    assert texts(batch).attention_mask.sum(dim=1).max() == 16
    assert all(answer for _, answer in rows(batch))
    ended = [answer[-1] == EOS for _, answer in rows(batch)]
    assert ended.count(True) == len(ended) / 2
    assert all(map(math.isfinite, run.curve("train/loss")))
    assert f"2 prompts and {1 if stage == 'sft' else 2} answers cut to 16 tokens" in caplog.text


def test_05_last_token_with_pad_equal_eos(runs: Runs, tokenizer: PreTrainedTokenizerFast) -> None:
    """An EOS inside every prompt, and EOS as pad token: scores are still read at the last token of each text.

    Nothing is trained (learning rate 0). The mean of the 8 chosen answers is that of each text alone, in a batch of 8
    and in 8 batches of 1.
    """
    runs.tokenizer = same_words(tokenizer, pad_token="<eos>")
    pairs = [{**pair, "prompt": f"{pair['prompt']}<eos> And?"} for pair in PAIRS]
    alone = []
    for pair in pairs:
        text = f"<bos>{pair['prompt']}\nSummary: {pair['chosen']}<eos>"
        ids = runs.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        assert ids.tolist().count(EOS) == 2
        alone.append(score_alone(runs.judge, ids))
    for size in (8, 1):
        data = {"train": runs.write("inside", pairs), "batch_size": size}
        run = runs.build("reward", data=data, learning_rate=0.0)
        run.module.configure_model()
        run.module.model.load_state_dict(runs.judge.state_dict())
        run.trainer.fit(run.module, run.data)
        seen = run.curve("train/chosen_reward")
        assert len(seen) == 8 / size
        assert sum(seen) / len(seen) == pytest.approx(sum(alone) / 8, rel=1e-5)  # float32


@pytest.mark.parametrize("stage", TEXT_STAGES)
def test_06_a_text_does_not_feel_its_padding_or_its_neighbours(runs: Runs, stage: str) -> None:
    """Validation in batches of 1, 3 and 8: the same numbers, from attention and from a state.

    The rewards of DPO are left out: before training they are 0 but for rounding.
    """
    numbers = []
    for size in (1, 3, 8):
        val = {"val": runs.write("val", STAGES[stage][2]), "eval_batch_size": size}
        run = runs.fit(stage, data=val, learning_rate=0.0)
        found = run.trainer.callback_metrics
        numbers.append({k: float(v) for k, v in found.items() if k.startswith("val/") and "rewards/" not in k})
    assert "val/loss" in numbers[0]
    for other in numbers[1:]:
        assert other == pytest.approx(numbers[0], rel=1e-4, abs=1e-6)  # float32 sums of other shapes


@pytest.mark.parametrize("stage", STAGES)
def test_07_a_record_that_cannot_be_used_is_named_by_file_and_line(runs: Runs, stage: str) -> None:
    """Not a KeyError from the depth of training: where it stands, and what to type."""
    records = [DEMONSTRATIONS[0] if stage in ("sft", "ppo") else PAIRS[0], {"text": "It rains."}]
    with pytest.raises(UserError, match=r"broken\.jsonl:2: .*its fields are 'text'(.|\n)*data\.on_error=skip"):
        runs.fit(stage, data={"train": runs.write("broken", records)})
