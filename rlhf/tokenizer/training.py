"""Tokenizers for models with random weights."""

from collections.abc import Iterable
from itertools import chain

from transformers import PreTrainedTokenizerFast

from rlhf.errors import ConfigError

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
MIN_VOCAB_SIZE = 256 + 3  # all bytes and the special tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. It can encode any text without an unknown token.

    Args:
        texts: Texts to train on; at least one.
        vocab_size: Maximum number of tokens, including 256 bytes and 3 special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and 3 special tokens), got {vocab_size}.",
            f"Set model.vocab_size={MIN_VOCAB_SIZE}.",
        )
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise ConfigError(
            "A model with random weights has no tokenizer until one has been trained, and no texts were given.",
            "Train one with train_tokenizer, and pass it to the module of the stage.",
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(chain([first], texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD)
