"""Endings of responses as reward models have seen them in training."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import Encoder
from rlhf.sampling import Rollout
from rlhf.tensors import last_true


def end_as_in_training(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Complete the responses that ended with a stop token other than EOS.

    A reward model reads its score at the last token, and the texts that it was trained on end with the tokens that the
    chat template writes after a response, and with EOS. Sampling stops before these. Truncated responses stay as they
    are, because the training data has no EOS after them either.

    Args:
        rollout: Prompts with sampled responses.
        tokenizer: The tokenizer, with its chat template.

    Returns:
        [batch, time] token ids and [batch, time] bool, True on real tokens. Time is longer than in the rollout only if
        there is a stop token other than EOS.
    """
    input_ids, attention_mask = rollout.input_ids, rollout.attention_mask
    endings = {stop: tokens for stop in rollout.stop_ids if (tokens := tokens_after(stop, tokenizer))}
    if not endings:
        return input_ids, attention_mask
    last = last_true(attention_mask)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    final = input_ids[rows, last]
    width = max(map(len, endings.values()))
    input_ids, attention_mask = F.pad(input_ids, (0, width)), F.pad(attention_mask, (0, width))
    for stop, tokens in endings.items():
        is_ended = rollout.finished & (final == stop)
        for column, token in enumerate(tokens, start=1):
            input_ids[rows, last + column] = torch.where(is_ended, token, input_ids[rows, last + column])
            attention_mask[rows, last + column] |= is_ended
    return input_ids, attention_mask


def tokens_after(stop: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that follow a stop token at the end of a training text; EOS if the template has no such token.

    Args:
        stop: Id of the stop token.
        tokenizer: The tokenizer, with its chat template.
    """
    if stop == tokenizer.eos_token_id:
        return []
    if tokenizer.chat_template:
        encoder = Encoder(tokenizer, max_length=sys.maxsize)
        example = encoder.encode_response([{"role": "user", "content": "x"}], "x")
        response = example.input_ids[example.start :]
        if stop in response:
            return response[len(response) - response[::-1].index(stop) :]
    return [int(tokenizer.eos_token_id)]
