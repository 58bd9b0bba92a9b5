"""Responses that ended with a stop token other than EOS are scored as the texts of the training data."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from harness import TinyRun
from rlhf.data import Encoder
from rlhf.models import train_tokenizer
from rlhf.reward_functions import RewardFunction, ScoringBatch, end_as_in_training
from rlhf.sampling import Rollout, SamplingParams

QUESTION = [{"role": "user", "content": "Who won?"}]
CHATML = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{END}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


@pytest.fixture(params=["{{ '\n' }}", ""], ids=["line feed after the stop token", "nothing after it"])
def chatml(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A tokenizer whose EOS is not the token that ends a turn of its chat template."""
    tokenizer = train_tokenizer(["Who won? May did.", "user assistant"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML.replace("{END}", request.param)
    return tokenizer


def stopped(tokenizer: PreTrainedTokenizerFast, responses: list[str], stop_ids: list[int]) -> Rollout:
    """Return a rollout whose responses end at the first stop token, as sampled ones do."""
    encoder = Encoder(tokenizer, 128)
    prompt = encoder.encode_prompt(QUESTION)
    rows = [encoder.encode_response(QUESTION, response) for response in responses]
    ids = [row.input_ids[row.start :] for row in rows]
    cut = [tokens[: next(i for i, token in enumerate(tokens) if token in stop_ids) + 1] for tokens in ids]
    return Rollout.from_responses([prompt] * len(cut), cut, stop_ids)


def test_responses_are_scored_as_the_texts_of_the_training_data(chatml: PreTrainedTokenizerFast) -> None:
    """With ``<|im_end|>`` as the stop token, the last token is EOS, where the reward model was trained to give a score.

    The rollout itself, which the policy is trained on, stays as it is.
    """
    stop = chatml.convert_tokens_to_ids("<|im_end|>")
    responses = ["May", "It was Nadia Falk, who sells a camera."]
    rollout = stopped(chatml, responses, [stop])
    assert [ids[-1] for ids in rollout.response_ids()] == [stop, stop]
    width = rollout.input_ids.shape[1]
    input_ids, attention_mask = end_as_in_training(rollout, chatml)
    encoder = Encoder(chatml, 128)
    expected = [encoder.encode_response(QUESTION, response).input_ids for response in responses]
    assert [row[mask].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)] == expected
    assert all(ids[-1] == chatml.eos_token_id for ids in expected)
    assert rollout.input_ids.shape[1] == width


def test_truncated_responses_stay_as_they_are(chatml: PreTrainedTokenizerFast) -> None:
    """A response of one token that is cut by ``max_new_tokens`` does not get an EOS."""
    stop = chatml.convert_tokens_to_ids("<|im_end|>")
    rollout = Rollout.from_responses([[5, 6], [5]], [[7], [stop]], [stop])
    input_ids, attention_mask = end_as_in_training(rollout, chatml)
    rows = [row[mask].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    assert rows[0] == [5, 6, 7]
    assert rows[1][:2] == [5, stop]
    assert rows[1][-1] == chatml.eos_token_id


def test_a_stop_token_that_the_template_does_not_write_is_followed_by_eos(chatml: PreTrainedTokenizerFast) -> None:
    stop = chatml.get_vocab()["d"]
    rollout = Rollout.from_responses([[5, 6]], [[7, stop]], [stop])
    input_ids, attention_mask = end_as_in_training(rollout, chatml)
    assert input_ids.tolist() == [[5, 6, 7, stop, chatml.eos_token_id]]
    assert attention_mask.all()


def test_eos_as_the_only_stop_token_changes_nothing(chatml: PreTrainedTokenizerFast) -> None:
    eos = chatml.eos_token_id
    rollout = Rollout.from_responses([[5, 6], [5]], [[7, eos], [eos]], [eos])
    input_ids, attention_mask = end_as_in_training(rollout, chatml)
    assert input_ids is rollout.input_ids
    assert attention_mask is rollout.attention_mask


def test_no_value_is_read_on_the_host(chatml: PreTrainedTokenizerFast) -> None:
    """Tensors without data are completed as well."""
    stop = chatml.convert_tokens_to_ids("<|im_end|>")
    rollout = Rollout.from_responses([[5, 6]], [[7, stop]], [stop], device="meta")
    input_ids, attention_mask = end_as_in_training(rollout, chatml)
    assert input_ids.device == attention_mask.device == torch.device("meta")


class RecordingReward(RewardFunction):
    """Gives every response the same reward, and records what is to be scored."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[ScoringBatch] = []

    def forward(self, batch: ScoringBatch) -> Tensor:
        self.batches.append(batch)
        return torch.zeros(len(batch.input_ids))


@pytest.mark.parametrize("explicit", [True, False], ids=["stop_tokens", "generation_config"])
def test_ppo_completes_responses_for_scoring_only(tiny_run: TinyRun, explicit: bool) -> None:
    """Almost every token is a stop token. The scored sequences end with EOS, the trained ones with the stop token.

    Stop tokens are those of the sampling settings or those of the model.
    """
    eos = tiny_run.tokenizer.eos_token_id
    vocabulary = {text: token for text, token in tiny_run.tokenizer.get_vocab().items() if token != eos}
    if not explicit:
        tiny_run.lm.generation_config.eos_token_id = list(vocabulary.values())
        with torch.no_grad():
            tiny_run.lm.get_output_embeddings().weight[eos] = 0  # EOS remains a stop token, but is unlikely.
    reward = RecordingReward()
    sampling = SamplingParams(max_new_tokens=8, temperature=0.7, stop_tokens=list(vocabulary) if explicit else None)
    run = tiny_run.train("ppo", reward=reward, sampling=sampling, trainer={"max_steps": 1})
    (scored,) = reward.batches
    last = [row[mask].tolist()[-1] for row, mask in zip(scored.input_ids, scored.attention_mask, strict=True)]
    assert last == [eos] * 8
    minibatch = run.batches[0]
    trained = [row[mask].tolist()[-1] for row, mask in zip(minibatch.input_ids, minibatch.attention_mask, strict=True)]
    assert eos not in trained
