"""Preference pairs from sampled responses, in Lightning's test loop."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from harness import FakeSource, MetricsLogger, quick_trainer
from rlhf.collect import CollectDataModule, CollectModule, PageLabels
from rlhf.data import Preference
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader
from rlhf.errors import ConfigError, DataError
from rlhf.reward_functions import ExactMatchReward, ModelReward, PythonReward, RewardFunction, ScoringBatch
from rlhf.sampling import Rollout, SamplingParams
from rlhf.web.server import bind

WORDS = ["May", "Monday", "Dunmore and Dalton"]
ROWS = [{"prompt": "the bridge"}, {"prompt": "the fair"}]


class Scripted:
    """Gives the responses of a list in turn, each followed by EOS unless it ends with dots."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        eos = self.tokenizer.eos_token_id
        texts = [self.texts.pop(0) for _ in prompts]
        ids = [self.tokenizer(" " + text, add_special_tokens=False)["input_ids"] for text in texts]
        ends = [[] if text.endswith("...") else [eos] for text in texts]
        return Rollout.from_responses(prompts, [[*row, *end] for row, end in zip(ids, ends, strict=True)], [eos])


class Collection:
    """Collects pairs for a few prompts with a sampler that follows a script."""

    def __init__(self, folder: Path, policy: FakeSource, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.policy, self.tokenizer = folder, policy, tokenizer
        self.output = folder / "preferences.jsonl"
        (folder / "length.py").write_text("def score(prompts, responses): return [len(text) for text in responses]")

    def run(self, texts: Sequence[str], rows: list[dict[str, Any]] = ROWS, **keys: Any) -> CollectModule:
        path = self.folder / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"reward": PythonReward(path=f"{self.folder / 'length.py'}:score"), **keys}
        params = SamplingParams(max_new_tokens=24, temperature=1.0)
        module = CollectModule(
            policy=self.policy,  # type: ignore[arg-type]
            sampling=params,
            sampler=Scripted(texts),
            output=str(self.output),
            tokenizer=self.tokenizer,
            **keys,
        )
        data = CollectDataModule(
            train=str(path), max_length=96, eval_batch_size=2, val_fraction=0.0, tokenizer=self.tokenizer
        )
        quick_trainer(default_root_dir=self.folder, logger=MetricsLogger()).test(module, data, verbose=False)
        return module

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.open(newline="\n")]


@pytest.fixture
def collection(tmp_path: Path, policy: FakeSource, tokenizer: PreTrainedTokenizerFast) -> Collection:
    return Collection(tmp_path, policy, tokenizer)


def test_the_best_and_the_worst_of_three_responses_form_a_pair(collection: Collection) -> None:
    """The score is the length of the text: 3, 6 and 18 characters."""
    module = collection.run([*WORDS, *reversed(WORDS)], num_generations=3)
    found = {row["prompt"]: row for row in collection.rows}
    assert found.keys() == {"the bridge", "the fair"}
    for row in found.values():
        assert (row["chosen"], row["rejected"]) == ("Dunmore and Dalton", "May")
        assert (row["chosen_score"], row["rejected_score"]) == (18, 3)
    assert module.metrics == {"pairs": 2, "prompts": 2, "score_difference": 15}


def test_the_file_is_a_preference_file(collection: Collection) -> None:
    """The scores are no fields of a record, so they do not disturb."""
    collection.run([WORDS[0], WORDS[1], WORDS[2], WORDS[0]])
    pairs = RecordReader(RecordParser()).read(str(collection.output), "train", (Preference,))
    assert sorted((pair.chosen, pair.rejected, pair.margin) for pair in pairs) == [
        ("Dunmore and Dalton", "May", 0.0),
        ("Monday", "May", 0.0),
    ]


def test_responses_that_were_cut_off_are_counted(collection: Collection, caplog: pytest.LogCaptureFixture) -> None:
    collection.run([WORDS[0], WORDS[1] + "...", WORDS[2], WORDS[0]])
    assert "1 of 4 responses were cut off at 24 tokens" in caplog.text
    caplog.clear()
    collection.run([WORDS[0], WORDS[1], WORDS[2], WORDS[0]])
    assert "cut off" not in caplog.text


def test_identical_responses_and_equal_scores_give_no_pair(collection: Collection) -> None:
    """'May' and 'Mai' have the same length. The second prompt has a pair."""
    module = collection.run(["May", "Mai", "May", "Monday"])
    assert len(collection.rows) == module.metrics["pairs"] == 1


def test_a_collection_without_pairs_is_an_error(collection: Collection) -> None:
    with pytest.raises(ConfigError, match=r"found no pair: the responses to each of the 2 prompts.*\n.*temperature=1"):
        collection.run(["May"] * 4)
    assert not collection.output.exists()


def test_a_port_in_use_is_reported_before_sampling(collection: Collection) -> None:
    """The sampler has no responses: it would fail."""
    with bind("127.0.0.1", 0) as used:
        port = used.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"labels\.port={port} is in use .*\n  Set labels\.port=0 for"):
            collection.run([], labels=PageLabels(port=port))


def test_a_conversation_stays_a_conversation(collection: Collection) -> None:
    messages = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    collection.run(["May", "Monday"], rows=[{"prompt": messages}])
    assert collection.rows[0]["prompt"] == messages


def test_rows_of_earlier_rounds_come_first(collection: Collection, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.jsonl"
    earlier.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    collection.run([*WORDS[:2], *WORDS[:2]], include=[str(earlier)])
    assert collection.rows[0]["prompt"] == "p"
    assert len(collection.rows) == 3


def test_the_reward_model_scores_whole_sequences(
    collection: Collection, reward_model: FakeSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The difference of the scores equals that of the model's own scores of prompt, response and EOS."""
    texts = [WORDS[0], WORDS[2]]
    collection.run(texts, rows=ROWS[:1], reward=ModelReward(), reward_model=reward_model)
    (row,) = collection.rows
    data = CollectDataModule(train=str(collection.folder / "prompts.jsonl"), max_length=96, tokenizer=tokenizer)
    encoder = data.encoder()
    scores = {}
    for text in texts:
        encoded = encoder.encode_response([{"role": "user", "content": "the bridge"}], text)
        ids = torch.tensor([encoded.input_ids])
        scores[text] = float(reward_model.model.eval().scores(ids, ids >= 0))
    assert row["chosen"] == max(scores, key=lambda text: scores[text])
    assert row["chosen_score"] == pytest.approx(max(scores.values()), abs=1e-4)
    assert row["rejected_score"] == pytest.approx(min(scores.values()), abs=1e-4)


def test_greedy_responses_are_refused(policy: FakeSource, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"stage\.sampling\.temperature must be above 0 in stage=collect"):
        CollectModule(
            policy=policy,  # type: ignore[arg-type]
            reward=ModelReward(),
            sampling=SamplingParams(temperature=0.0),
            output="x.jsonl",
            tokenizer=tokenizer,
        )


def test_a_scoring_function_receives_the_targets(collection: Collection, tmp_path: Path) -> None:
    """The score is 1 for the reference response of the data."""
    function = tmp_path / "exact.py"
    function.write_text("def score(prompts, responses, targets): return [a == b for a, b in zip(responses, targets)]")
    rows = [{"prompt": "the bridge", "completion": "May"}]
    collection.run(["Monday", "May"], rows=rows, reward=PythonReward(path=f"{function}:score"))
    assert [(row["chosen"], row["rejected"]) for row in collection.rows] == [("May", "Monday")]


def test_rewards_of_another_shape_are_refused(collection: Collection) -> None:
    """Two responses have two rewards."""

    class Misshapen(RewardFunction):
        def forward(self, batch: ScoringBatch) -> torch.Tensor:
            return torch.ones(len(batch.responses), 1)

    with pytest.raises(ConfigError, match=r"Misshapen must return a tensor of shape \[2\], got one of shape \[2, 1\]"):
        collection.run(["May", "Monday"], rows=[{"prompt": "the bridge"}], reward=Misshapen())


@pytest.mark.parametrize("score", ["nan", "inf", "-inf"])
def test_a_score_that_is_not_finite_stops_the_collection(collection: Collection, tmp_path: Path, score: str) -> None:
    """The second response to the second prompt has it; the prompts are those of rows 1 and 2."""
    function = tmp_path / "broken.py"
    function.write_text(
        f"def score(prompts, responses): return [float('{score}' if r == 'Mai' else 1) for r in responses]"
    )
    message = (
        rf"^The score of response 2 to the prompt in row 2 of data\.train is {score}, but .*\n  .* of reward\.path"
    )
    with pytest.raises(DataError, match=message):
        collection.run(["May", "Monday", "Tue", "Mai"], reward=PythonReward(path=f"{function}:score"))
    assert not collection.output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"stage\.include=\[{path}\]: there is no such file\.\n  Name a file .*stage\.include=\[\]"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r"}\n{"prompt"\n', r"{path}:2: the line is not JSON"),
        ('{"prompt": "p", "chosen": "c"}\n', r"{path}:1: the preference record has no field 'rejected'"),
    ],
    ids=["no file", "not JSON", "not a pair"],
)
def test_included_files_are_checked_before_anything_is_sampled(
    collection: Collection, tmp_path: Path, content: str | None, message: str
) -> None:
    """There is no response to sample, so that sampling would fail."""
    path = tmp_path / "earlier.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message.format(path=re.escape(str(path)))) as error:
        collection.run([], include=[str(path)])
    assert "stage.include" in str(error.value)


def test_rows_of_an_included_csv_file_come_first(collection: Collection, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.csv"
    earlier.write_text("prompt,chosen,rejected\np,c,r\n")
    collection.run([*WORDS[:2], *WORDS[:2]], include=[str(earlier)])
    assert collection.rows[0] == {"prompt": "p", "chosen": "c", "rejected": "r"}


def test_further_columns_of_an_included_file_become_text(collection: Collection, tmp_path: Path) -> None:
    """JSON has no times, and UTF-8 no half of a surrogate pair. Fields of a pair have neither."""
    time = datetime(2026, 1, 2, 3, 4, 5)
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    Dataset.from_list([{**pair, "time": time}]).to_parquet(tmp_path / "earlier.parquet")
    (tmp_path / "earlier.jsonl").write_text(json.dumps({**pair, "note": "\ud800"}))
    include = [str(tmp_path / "earlier.parquet"), str(tmp_path / "earlier.jsonl")]
    collection.run([*WORDS[:2], *WORDS[:2]], include=include)
    assert collection.rows[:2] == [{**pair, "time": "2026-01-02 03:04:05"}, {**pair, "note": "?"}]


def test_references_are_checked_before_anything_is_sampled(collection: Collection) -> None:
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: reward=exact_match requires a reference response"):
        collection.run([], reward=ExactMatchReward())
