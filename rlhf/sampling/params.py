"""Settings of response sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError
from rlhf.schema import NonNegativeInt, PositiveInt, check_arguments


@dataclass(frozen=True)
class SamplingParams:
    """Settings of response sampling.

    Args:
        max_new_tokens: Maximum response length, in tokens, including the stop token. A response without a stop token is
            cut at this length and counts as truncated.
        temperature: Divisor of the logits. 0 selects the most likely token (greedy decoding).
        top_k: Sample from the k most likely tokens only. 0 disables the filter.
        top_p: Sample from the smallest set of most likely tokens whose total probability reaches ``top_p``. 1 disables
            the filter. (Holtzman et al. 2020, arXiv:1904.09751)
        stop_tokens: Tokens that end a response, such as ``["<|im_end|>"]``. null: the EOS token of the tokenizer.
    """

    max_new_tokens: PositiveInt = 64
    temperature: Literal[0] | Annotated[float, ">= 1e-06"] = 0.7
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0
    stop_tokens: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_arguments(type(self), "", vars(self))  # A chat has these settings as well.
        if self.stop_tokens is not None and not self.stop_tokens:
            raise ConfigError(
                f"stop_tokens must be a non-empty list of tokens or null, got {self.stop_tokens!r}.",
                "Set it to a list such as [<token>], or to null for the EOS token of the tokenizer.",
            )

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids of the tokens that end a response."""
        if self.stop_tokens is None:
            return [int(tokenizer.eos_token_id)]
        vocabulary = tokenizer.get_vocab()
        for token in self.stop_tokens:
            if token not in vocabulary:
                raise ConfigError(
                    f"stop_tokens contains {token!r}, which is not a single token of the tokenizer.",
                    "Use tokens exactly as they are spelled in the vocabulary of the tokenizer.",
                )
        return [vocabulary[token] for token in self.stop_tokens]
