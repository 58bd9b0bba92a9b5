"""Settings of response sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ConfigError
from rlhf.models import as_sequence
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
        stop_tokens: Tokens that end a response, such as ``["<|im_end|>"]``. null: the EOS token of the tokenizer
            and all EOS tokens of the model's ``generation_config``, as in ``generate`` of transformers.
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
                "Set it to a list such as [<token>], or to null for the EOS tokens of the model.",
            )

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel) -> list[int]:
        """Return the ids of the tokens that end a response.

        Args:
            tokenizer: Tokenizer of the policy.
            policy: The language model that samples, with its ``generation_config``.

        Raises:
            ConfigError: A stop token is not in the vocabulary of the tokenizer.
        """
        if self.stop_tokens is None:
            return _eos_ids(tokenizer, policy)
        vocabulary = tokenizer.get_vocab()
        for token in self.stop_tokens:
            if token not in vocabulary:
                raise ConfigError(
                    f"stop_tokens contains {token!r}, which is not a single token of the tokenizer.",
                    "Use tokens exactly as they are spelled in the vocabulary of the tokenizer.",
                )
        return [vocabulary[token] for token in self.stop_tokens]


def _eos_ids(tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel) -> list[int]:
    """Return the id of the tokenizer's EOS token, and those of the model that are in the tokenizer's vocabulary."""
    eos = int(tokenizer.eos_token_id)
    generation_config: Any = policy.generation_config
    further = [token for token in as_sequence(generation_config.eos_token_id) if token != eos]
    known = tokenizer.get_vocab().values() if further else ()
    return [eos, *dict.fromkeys(int(token) for token in further if token in known)]
