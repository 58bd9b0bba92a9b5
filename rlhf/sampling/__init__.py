"""Sampling: prompts in, answers out. Works without a trainer; used by PPO and by evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.tensors import pad_right


@dataclass(frozen=True)
class SamplingParams:
    """How answers are drawn.

    Args:
        max_new_tokens: longest answer, tokens; one that has not ended by then is cut and counts as truncated.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from the k most likely tokens; 0 for all.
        top_p: draw from the fewest tokens that hold this share of the probability.
        stop_tokens: texts of the tokens that end an answer, such as ``["<|im_end|>"]``; null: the tokenizer's EOS.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: an answer has at least one token")
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} is below 0", "0 takes the most likely token, 1 samples")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is below 0", "0 draws from all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is no share of the probability, above 0 and up to 1")
        if self.stop_tokens is not None and (isinstance(self.stop_tokens, str) or not self.stop_tokens):
            raise UserError(f"stop_tokens={self.stop_tokens!r} is no list of tokens", "stop_tokens=[<token>], or null")

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids of the tokens that end an answer."""
        if self.stop_tokens is None:
            return [tokenizer.eos_token_id]
        vocabulary = tokenizer.get_vocab()
        for text in self.stop_tokens:
            if text not in vocabulary:
                raise UserError(
                    f"stop_tokens: {text!r} is no single token of this tokenizer",
                    "stop_tokens=[<a token of its vocabulary, as it stands there>]",
                )
        return [vocabulary[text] for text in self.stop_tokens]

    def choose(self, logits: Tensor) -> Tensor:
        """Draw one token a row: [batch, vocabulary] logits to [batch] token ids, by inverting the distribution."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = self.keep_likely(logits.float() / self.temperature)
        rising = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        # the draw lies below the total, so rounding can never choose a token past the last one
        draw = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device) * rising[:, -1:]
        return torch.searchsorted(rising, draw, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    def keep_likely(self, logits: Tensor) -> Tensor:
        """Logits with those outside top-k and top-p set to minus infinity: [batch, vocabulary] to the same."""
        if 0 < self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p < 1:
            ordered, place = logits.sort(dim=-1, descending=True)
            share = ordered.softmax(dim=-1)
            drop = share.cumsum(dim=-1) - share >= self.top_p  # the first token always stays
            logits = logits.masked_fill(drop.scatter(-1, place, drop), -torch.inf)
        return logits


@dataclass
class Rollout:
    """Answers to a batch of prompts, ready to be scored.

    tokens: [batch, time] prompt and answer, padded on the right.
    mask: [batch, time] bool, True on real tokens.
    answer: [batch, time] bool, True from the first token of the answer to its EOS.
    finished: [batch] bool, True where the answer ended with a stop token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    finished: Tensor

    @property
    def lengths(self) -> Tensor:
        """[batch] tokens of each answer, EOS included."""
        return self.response_mask.sum(dim=1)

    def response_ids(self) -> list[list[int]]:
        """Token ids of each answer."""
        return [row[chosen].tolist() for row, chosen in zip(self.input_ids, self.response_mask, strict=True)]

    def decode(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each answer as text, without special tokens and without the space the template puts before it."""
        return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in self.response_ids()]


def repeated_ngram_fraction(answers: Sequence[Sequence[int]], size: int = 4) -> float:
    """How much of the answers has been said before in the same answer.

        1 - distinct runs of ``size`` tokens / runs of ``size`` tokens,    both summed over the answers

    Args:
        answers: token ids of each.
        size: tokens in a run.

    Returns:
        A share, 0 to 1; 0 where no answer is so long.

    Source: Welleck et al. 2019, section 6, seq-rep-n (arXiv:1908.04319).
    """
    runs = [list(zip(*(response_mask[i:] for i in range(size)), strict=False)) for response_mask in answers]
    return 1 - sum(len(set(own)) for own in runs) / max(sum(map(len, runs)), 1) if any(runs) else 0.0


@torch.no_grad()
def generate(
    lm: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: SamplingParams, eos: int | Sequence[int]
) -> Rollout:
    """Answer prompts token by token, with the model's own cache of keys and values or of states.

    Prompts are padded on the left for this, with a mask and positions that count from the first real token; a row
    leaves the cache as soon as its answer has ended.

    Args:
        lm: causal language model; sampled in eval mode.
        prompts: token ids of each prompt, at least one each.
        sampling: how tokens are drawn; the global random state of torch is used.
        eos: the token that ends an answer, or several.
    """
    training = lm.training
    lm.eval()
    try:
        responses = _decode(lm, [list(prompt) for prompt in prompts], sampling, eos)
    finally:
        lm.train(training)
    stops = {eos} if isinstance(eos, int) else set(eos)
    input_ids, attention_mask = pad_right(
        [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    )
    starts = torch.tensor([len(prompt) for prompt in prompts])
    response_mask = attention_mask & (torch.arange(input_ids.shape[1]) >= starts[:, None])
    finished = torch.tensor([response[-1] in stops for response in responses])
    return Rollout(*(tensor.to(lm.device) for tensor in (input_ids, attention_mask, response_mask, finished)))


def _decode(
    lm: PreTrainedModel, prompts: list[list[int]], sampling: SamplingParams, eos: int | Sequence[int]
) -> list[list[int]]:
    _check_room(lm, max(map(len, prompts)) + sampling.max_new_tokens)
    device = lm.device
    stops = torch.tensor([eos] if isinstance(eos, int) else list(eos), device=device)
    flipped, attention_mask = pad_right([prompt[::-1] for prompt in prompts])
    input_ids, attention_mask = flipped.flip(1).to(device), attention_mask.flip(1).to(device)  # padding stands left
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    padded = not bool(attention_mask.all())
    accepted = signature(lm.forward).parameters
    # Models without attention take their recurrent state as `cache_params`. Padding is already kept out of that state
    # when a step reads one token, and Mamba-1 and Falcon-Mamba would broadcast the longer mask against that token.
    # Models with attention, hybrid ones included, take `past_key_values` and need the mask of all the cached tokens.
    recurrent = "cache_params" in accepted
    cache_name = "cache_params" if recurrent else "past_key_values"

    alive = torch.arange(len(prompts), device=device)  # rows of the batch that still go on
    written = torch.zeros(len(prompts), sampling.max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    cache = None
    for step in range(sampling.max_new_tokens):
        inputs = {"input_ids": input_ids, "use_cache": True, cache_name: cache}
        if padded and not (recurrent and step > 0):
            inputs["attention_mask"] = attention_mask.long()
        if "position_ids" in accepted:
            inputs["position_ids"] = positions
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        output = lm(**inputs)
        cache = getattr(output, cache_name)
        chosen = sampling.choose(output.logits[:, -1])
        written[alive, step] = chosen
        lengths[alive] += 1

        going = ~torch.isin(chosen, stops)
        if not bool(going.any()):
            break
        if not bool(going.all()):
            rows = going.nonzero()[:, 0]
            cache.reorder_cache(rows)
            alive, chosen, attention_mask, positions = alive[rows], chosen[rows], attention_mask[rows], positions[rows]
        input_ids = chosen[:, None]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [row[:length].tolist() for row, length in zip(written, lengths, strict=True)]


def _check_room(lm: PreTrainedModel, needed: int) -> None:
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and needed > longest:
        raise UserError(
            f"a prompt with its answer may take {needed} tokens, and the model reads {longest}",
            f"data.max_length={longest}, or a smaller stage.max_new_tokens",
        )
