"""Tokenizers for models with random weights, and chat templates for tokenizers without one."""

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
        "{{- bos_token or '' -}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
        f"{{%- elif message['role'] == 'user' -%}}{{{{- {before} + message['content'] + {after} -}}}}"
        "{%- else -%}{{- ' ' + message['content'] + (eos_token if loop.last else '\\n\\n') -}}{%- endif -%}"
        "{%- endfor -%}"
    )


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
