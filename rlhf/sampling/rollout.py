"""Prompts with sampled responses."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.tensors import pad_right, upload


@dataclass
class Rollout:
    """Prompts with sampled responses, ready to be scored.

    Args:
        input_ids: [batch, time] prompt and response, padded on the right.
        attention_mask: [batch, time] bool, True on real tokens.
        response_mask: [batch, time] bool, True from the first token of the response up to and including its stop token.
        finished: [batch] bool, True where the response ends with a stop token.
        stop_ids: Ids of the tokens that end a response.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    finished: Tensor
    stop_ids: Sequence[int] = ()
    _response_ids: list[list[int]] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def from_responses(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        stop_ids: Collection[int],
        device: torch.device | str = "cpu",
    ) -> "Rollout":
        """Assemble a rollout from token ids.

        Args:
            prompts: Token ids of each prompt.
            responses: Token ids of each response, at least one per response.
            stop_ids: Ids of the tokens that end a response.
            device: Device of the result.
        """
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        input_ids, attention_mask = pad_right(rows)
        starts = torch.tensor([len(prompt) for prompt in prompts])
        response_mask = attention_mask & (torch.arange(input_ids.shape[1]) >= starts[:, None])
        finished = torch.tensor([response[-1] in stop_ids for response in responses])
        rollout = cls(
            upload(input_ids, device),
            upload(attention_mask, device),
            upload(response_mask, device),
            upload(finished, device),
            tuple(stop_ids),
        )
        rollout._response_ids = [list(response) for response in responses]
        return rollout

    def to(self, device: torch.device | str) -> "Rollout":
        """Return a copy of the rollout on a device."""
        copy = Rollout(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.response_mask.to(device),
            self.finished.to(device),
            self.stop_ids,
        )
        copy._response_ids = self._response_ids
        return copy

    @property
    def lengths(self) -> Tensor:
        """[batch] number of tokens of each response, including EOS."""
        return self.response_mask.sum(dim=1)

    def response_ids(self) -> list[list[int]]:
        """Return the token ids of each response. They are read from the device at most once."""
        if self._response_ids is None:
            rows = torch.where(self.response_mask, self.input_ids, -1).tolist()
            self._response_ids = [[token for token in row if token >= 0] for row in rows]
        return self._response_ids

    def decode(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return each response as text, without special tokens and without leading or trailing whitespace."""
        return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in self.response_ids()]
