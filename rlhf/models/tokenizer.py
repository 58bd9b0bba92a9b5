"""Tokenizers for models that start from nothing, and prompt templates for tokenizers that have none."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from rlhf.errors import UserError

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the given texts; no text is unknown to it.

    Args:
        texts: what the model will read and write.
        vocab_size: most tokens it may have, the three special ones and the 256 bytes included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 259
    if vocab_size < smallest:
        raise UserError(
            f"model.vocab_size={vocab_size} is too small for 256 bytes and 3 special tokens",
            f"model.vocab_size={smallest} or more",
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
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def chat_template(template: str) -> str:
    """A plain prompt template as the Jinja chat template that tokenizers carry.

    Args:
        template: text around a prompt, with ``{prompt}`` in it, such as ``"{prompt}\\nSummary:"``. The answer follows
            after one space; earlier answers of a conversation end in a blank line.

    Returns:
        Jinja source for ``tokenizer.chat_template``; it opens with BOS if the tokenizer has one, and closes an answer
        with EOS.
    """
    if "{prompt}" not in template:
        raise UserError(f"data.template={template!r} has no place for the prompt", "write {prompt} where it goes")
    before, after = (_jinja_string(part) for part in template.split("{prompt}", 1))
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
