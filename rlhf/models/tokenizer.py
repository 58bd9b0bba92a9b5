"""Tokenizers for models with random weights, and chat templates for tokenizers without one."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import ConfigError, DataError

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
MIN_VOCAB_SIZE = 256 + 3  # all bytes and the special tokens
# How the chat templates that are made from a plain template begin.
PLAIN_TEMPLATE = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
)


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


def check_embedding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, origin: str) -> None:
    """Raise a ``DataError`` if the tokenizer has ids that the model has no embedding for.

    Args:
        tokenizer: The tokenizer of the policy.
        model: A model that reads its token ids.
        origin: The path of the model, for the message.
    """
    embeddings: Any = model.get_input_embeddings()
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings.num_embeddings:
        raise DataError(
            f"{origin}: the tokenizer has token ids up to {largest}, but the model has {embeddings.num_embeddings} "
            "token embeddings.",
            f"Call model.resize_token_embeddings({largest + 1}), and save the model again.",
        )


def check_vocabulary(own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Raise a ``DataError`` if a reward model has another vocabulary than the policy.

    Args:
        own: The tokenizer of the reward model.
        tokenizer: The tokenizer of the policy.
        origin: The path of the reward model, for the message.
    """
    if (vocabulary := own.get_vocab()) != tokenizer.get_vocab():
        raise DataError(
            f"{origin}: the tokenizer of the reward model ({len(vocabulary)} tokens) differs from that of the policy "
            f"({len(tokenizer)} tokens), so token ids would be misinterpreted.",
            "Train the reward model from the same base model: stage.reward_model=<path>",
        )


def chat_template(template: str) -> str:
    """Convert a plain prompt template to a Jinja chat template, as tokenizers have it.

    Args:
        template: Text around a prompt, with ``{prompt}`` in it, such as ``"{prompt}\\nSummary:"``. The response follows
            after one space. Earlier responses of a conversation end with a blank line.

    Returns:
        Jinja source for ``tokenizer.chat_template``. It starts with BOS if the tokenizer has one, and ends a response
        with EOS.
    """
    if "{prompt}" not in template:
        raise ConfigError(
            f"template must contain {{prompt}}, got {template!r}.", 'For example: data.template="{prompt}\\nSummary:"'
        )
    before, after = (_jinja_string(text) for text in template.split("{prompt}", 1))
    return (
        f"{PLAIN_TEMPLATE}"
        f"{{%- elif message['role'] == 'user' -%}}{{{{- {before} + message['content'] + {after} -}}}}"
        "{%- else -%}{{- ' ' + message['content'] + (eos_token if loop.last else '\\n\\n') -}}{%- endif -%}"
        "{%- endfor -%}"
    )


def is_plain_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template of a tokenizer was made by ``chat_template`` from a text around a prompt."""
    template = tokenizer.chat_template
    return isinstance(template, str) and template.startswith(PLAIN_TEMPLATE)


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
