"""Responses of a chat: the same as those of sampling and evaluation, for one model and for several."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat.conftest import CONVERSATIONS, OpenChat
from transformers import PreTrainedTokenizerFast

from harness import quick_trainer
from rlhf.chat.session import Chat, Turn
from rlhf.data import PromptDataModule
from rlhf.errors import ConfigError, DataError
from rlhf.evaluate import EvaluateModule
from rlhf.export import Export
from rlhf.sampling import LocalSampler, Rollout, SamplingParams

PROMPT = "The mayor of Dunmore opened the new bridge."


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def finish(chat: Chat, prompt: str = PROMPT) -> Turn:
    """Sample the responses to a prompt until they are complete."""
    turn = chat.ask(prompt)
    while chat.step():
        pass
    return turn


def texts(turn: Turn) -> list[str]:
    return [response.text for response in turn.responses]


def test_responses_equal_those_of_sample_under_the_same_seed(chat: Chat, run_root: Path) -> None:
    """For each model and two prompts; the second prompt has the next seed."""
    turns = [finish(chat), finish(chat, "It costs 90 euros.")]
    assert [turn.seed for turn in turns] == [1, 2]
    for name in ("sft", "ppo"):
        source = Export(str(run_root / "rlhf" / name / f"{name}_final.pt"))
        tokenizer = source.tokenizer()
        sampler = LocalSampler()
        sampler.sync(source.language_model(tokenizer), tokenizer)
        for turn in turns:
            text = f"<bos>{turn.prompt}\nSummary:"
            torch.manual_seed(turn.seed)
            rollout = sampler.sample([tokenizer(text, add_special_tokens=False)["input_ids"]], chat.sampling)
            response = next(response for response in turn.responses if response.model == name)
            assert response.response_ids == rollout.response_ids()[0]
            assert [response.text] == rollout.decode(tokenizer)
            assert response.state == ("finished" if rollout.finished[0] else "truncated")


def test_responses_end_at_the_eos_tokens_of_each_model(chat: Chat) -> None:
    """All tokens end a response of ``ppo``, and it is complete. Those of ``sft`` stay as they are."""
    lengths = [len(response.response_ids) for response in finish(chat).responses]
    chat.seed = 1
    model = chat.models["ppo"]
    model.lm.generation_config.eos_token_id = list(model.tokenizer.get_vocab().values())
    chat.reset()
    sft, ppo = (next(one for one in finish(chat).responses if one.model == name) for name in ("sft", "ppo"))
    assert len(sft.response_ids) == lengths[list(chat.models).index("sft")] > 1
    assert len(ppo.response_ids) == 1
    assert ppo.state == "finished"
    assert ppo.reward is not None


class Repeat:
    """A sampler that gives each model the responses that it gave in a chat."""

    def __init__(self, turn: Turn, order: Sequence[str], eos: int) -> None:
        of_models = {response.model: response.response_ids for response in turn.responses}
        self.responses, self.eos = [of_models[name] for name in order], eos

    def sync(self, policy: Any, tokenizer: Any) -> None: ...

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        return Rollout.from_responses(prompts, [self.responses.pop(0)], [self.eos])


@pytest.mark.parametrize(("max_new_tokens", "temperature", "state"), [(40, 0.7, "finished"), (2, 2.0, "truncated")])
def test_scores_equal_those_of_evaluation(
    opened: OpenChat, run_root: Path, tmp_path: Path, max_new_tokens: int, temperature: float, state: str
) -> None:
    """Evaluation of the same responses, with EOS and truncated, writes the same text, length and score."""
    chat = opened(sampling=SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature))
    turn = finish(chat)
    assert state in [response.state for response in turn.responses]
    finals = {name: str(run_root / "rlhf" / name / f"{name}_final.pt") for name in ("sft", "ppo")}
    module = EvaluateModule(
        models={name: Export(path) for name, path in finals.items()},
        reward_model=Export(str(run_root / "rlhf" / "reward" / "reward_model_final.pt")),
        sampling=chat.sampling,
        sampler=Repeat(turn, ["ppo", "sft"], chat.models["sft"].tokenizer.eos_token_id),  # The baseline comes last.
        output=str(tmp_path / "out"),
        bootstrap=20,
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    data = PromptDataModule(test=str(tmp_path / "prompts.jsonl"), max_length=96)
    quick_trainer(default_root_dir=tmp_path).test(module, data, verbose=False)
    evaluated = json.loads((tmp_path / "out" / "samples.jsonl").read_text())["responses"]
    for name, response in turn.describe()["responses"].items():
        assert response.pop("state") in ("finished", "truncated")
        expected = {key: evaluated[name][key] for key in ("text", "reward", "length", "truncated")}
        assert response.pop("text") == expected.pop("text")
        assert response == pytest.approx(expected, abs=2e-4)


def test_responses_do_not_depend_on_the_other_models(opened: OpenChat) -> None:
    keys = {"sampling": SamplingParams(max_new_tokens=30, temperature=5.0)}
    both = finish(opened(**keys))
    alone = [finish(opened(models=[name], **keys)) for name in ("sft", "ppo")]
    assert texts(both) == [texts(turn)[0] for turn in alone]
    assert texts(both)[0] != texts(both)[1], "the models differ"


def test_stopped_responses_keep_their_text_and_have_no_score(opened: OpenChat) -> None:
    chat = opened(sampling=SamplingParams(max_new_tokens=30, temperature=5.0))
    turn = chat.ask(PROMPT)
    chat.step()
    chat.step()
    assert turn.is_running
    chat.stop()
    assert not turn.is_running
    assert not chat.step()
    running = [response for response in turn.responses if response.state == "stopped"]
    assert running
    assert all(len(response.response_ids) == 2 and response.reward is None for response in running)


def test_a_failed_model_does_not_stop_the_others(opened: OpenChat) -> None:
    """The logits of one of two models become NaN."""
    chat = opened()
    chat.models["sft"].sampler.policy.get_output_embeddings().weight.data.fill_(float("nan"))
    failed, other = finish(chat).responses
    assert (failed.state, failed.reward) == ("failed", None)
    assert "NaN or infinite at token 1" in failed.error
    assert other.state in ("finished", "truncated")
    assert other.reward is not None
    assert chat.models["sft"].multi_turn is False


def test_a_score_that_is_not_finite_is_left_out(
    opened: OpenChat, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = opened()
    assert chat.scores is not None
    monkeypatch.setattr(chat.scores, "score", lambda *_: math.nan)
    assert [response.reward for response in finish(chat).responses] == [None, None]
    assert "the response of sft the score nan, which is left out." in caplog.text


def test_halves_of_characters_are_replaced(chat: Chat) -> None:
    """A terminal passes bytes that are not UTF-8 on as lone surrogates, which no tokenizer encodes."""
    assert finish(chat, "a\udce9b \ud83d").prompt == "a?b ?"


def test_models_with_a_plain_template_get_single_prompts(chat: Chat) -> None:
    finish(chat)
    turn = finish(chat, "It rains.")
    tokenizer = chat.models["sft"].tokenizer
    assert [tokenizer.decode(response.prompt_ids) for response in turn.responses] == ["<bos>It rains.\nSummary:"] * 2


@pytest.fixture
def conversation(run_root: Path, opened: OpenChat, tokenizer: PreTrainedTokenizerFast) -> Chat:
    """A chat with models whose chat template is one for conversations."""
    for name in ("sft", "ppo"):
        path = run_root / "rlhf" / name / f"{name}_final.pt"
        content = torch.load(path, weights_only=True)
        tokenizer.chat_template = CONVERSATIONS
        from rlhf.tokenizer.files import pack_tokenizer

        torch.save({**content, "tokenizer": pack_tokenizer(tokenizer)}, path)
    return opened(system="Be brief.", max_length=120)


def rendered(turn: Turn, chat: Chat) -> list[str]:
    return [chat.models[response.model].tokenizer.decode(response.prompt_ids) for response in turn.responses]


def test_each_model_continues_its_own_conversation(conversation: Chat) -> None:
    """The system message, the earlier prompt and the own response come first; after a reset only the former."""
    opening = "<bos>system: Be brief.\n<bos>user: "
    first = finish(conversation, "Hi.")
    assert rendered(first, conversation) == [f"{opening}Hi.\n<bos>assistant:"] * 2
    assert texts(first)[0] != texts(first)[1]
    second = finish(conversation, "Why?")
    assert rendered(second, conversation) == [
        f"{opening}Hi.\n<bos>assistant: {text}<eos>\n<bos>user: Why?\n<bos>assistant:" for text in texts(first)
    ]
    conversation.reset()
    third = finish(conversation, "Why?")
    assert rendered(third, conversation) == [f"{opening}Why?\n<bos>assistant:"] * 2
    assert [turn.conversation for turn in conversation.turns] == [1, 1, 2]


def test_turns_can_be_left_out_of_a_conversation(conversation: Chat) -> None:
    first = finish(conversation, "Hi.")
    conversation.leave_out(first)
    assert rendered(finish(conversation, "Hi."), conversation) == rendered(first, conversation)


def test_long_prompts_lose_their_beginning_as_in_training(opened: OpenChat) -> None:
    """``data.max_length`` of the training is 96 and 12 tokens are reserved, so 84 remain; the BOS is kept."""
    turn = finish(opened(), PROMPT * 10)
    tokens = opened().models["sft"].tokenizer(f"{PROMPT * 10}\nSummary:", add_special_tokens=False)["input_ids"]
    for response in turn.responses:
        assert response.prompt_cut
        assert response.prompt_ids[1:] == tokens[-83:]
    assert not finish(opened()).responses[0].prompt_cut


def test_settings_are_checked_against_every_model(chat: Chat) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens must be less than 96, .* that sft supports, got 96"):
        chat.sampling = replace(chat.sampling, max_new_tokens=96)
    with pytest.raises(ConfigError, match="stop_tokens contains '<x>'"):
        chat.sampling = replace(chat.sampling, stop_tokens=["<x>"])
    assert chat.sampling.max_new_tokens == 12, "an invalid setting changes nothing"


def test_a_template_can_be_given(opened: OpenChat) -> None:
    turn = finish(opened(template="Q: {prompt}\nA:"), "Hi.")
    assert rendered(turn, opened()) == ["<bos>Q: Hi.\nA:"] * 2


def test_models_are_names_paths_and_folders(
    opened: OpenChat, run_root: Path, tmp_path: Path, source: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A Hugging Face folder without a chat template gets the default one of training."""
    tokenizer.chat_template = None
    folder = tmp_path / "hf"
    source.language_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = str(run_root / "rlhf" / "ppo" / "ppo_final.pt")
    chat = opened(models={"mine": path, "base": str(folder), "sft": "sft"})
    assert list(chat.models) == ["mine", "base", "sft"]
    assert chat.models["mine"].path == path
    prompts = rendered(finish(chat, "Hi."), chat)
    assert prompts == ["<bos>Hi.\nSummary:", "<bos>Hi.\n\nAnswer:", "<bos>Hi.\nSummary:"]


def test_user_errors_name_the_key(opened: OpenChat) -> None:
    with pytest.raises(ConfigError, match=r"^command\.models contains dpo, but run=rlhf has no dpo model"):
        opened(models=["dpo"])
    with pytest.raises(ConfigError, match=r"^stage=chat found no model in .*none"):
        opened("run=none")
    with pytest.raises(DataError):
        opened(reward_model=opened().models["sft"].path)


def scored(turn: Turn) -> Sequence[bool]:
    return [response.reward is not None for response in turn.responses]


def test_models_of_another_vocabulary_get_no_score(
    opened: OpenChat, source: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The token ids of the one would mean other text to the reward model."""
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    source.language_model(other).save_pretrained(tmp_path / "hf")
    other.save_pretrained(tmp_path / "hf")
    assert scored(finish(opened(models={"base": str(tmp_path / "hf"), "sft": "sft"}))) == [False, True]
    assert opened(models={"base": str(tmp_path / "hf")}).scores is None
