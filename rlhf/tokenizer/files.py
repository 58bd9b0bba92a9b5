"""Tokenizers as the named files that exports and checkpoints contain."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.errors import DataError, first_line
from rlhf.tokenizer.probe import check_tokenizer

# The files that tokenizers of transformers write: the common ones first, then the vocabularies of single models.
TOKENIZER_FILES = frozenset(
    """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    vocab.json vocab.txt merges.txt tekken.json
    bpe.codes byte_maps.json dict.txt emoji.json entity_vocab.json normalizer.json prophetnet.tokenizer
    target_vocab.json vocab-src.json vocab-tgt.json word_pronunciation.json word_shape.json
    """.split()
)
# SentencePiece and tiktoken models: tokenizer.model, spiece.model, sentencepiece.bpe.model, source.spm.
_TOKENIZER_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(model|spm)")
_REPLACE = "Use a file that a stage of this project wrote, or run the stage again: python train.py stage=<stage>"


def pack_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the files that ``save_pretrained`` writes, by name: text as a string, other bytes as a uint8 tensor.

    Of several chat templates, only the default one is packed, which is the one that is used. ``save_pretrained`` writes
    the others to a directory.
    """
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files: dict[str, Any] = {}
        for path in sorted(path for path in Path(directory).iterdir() if path.is_file()):
            data = path.read_bytes()
            try:
                files[path.name] = data.decode()
            except UnicodeDecodeError:
                files[path.name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return files


def unpack_tokenizer(files: Mapping[Any, Any], origin: str) -> PreTrainedTokenizerBase:
    """Open a tokenizer from its packed files.

    The files may come from anyone. They are only written, to a temporary directory, if each of them has the plain name
    of a file that tokenizers of ``transformers`` write. Code that they refer to is never run.

    Args:
        files: The result of ``pack_tokenizer``.
        origin: The file that contains them, for messages.

    Raises:
        DataError: A file has any other name, or is neither text nor bytes. Nothing is written in this case. Or the
            files are no tokenizer that can be used.
    """
    if not isinstance(files, Mapping):
        raise DataError(f"{origin}: tokenizer must be files by name, got {type(files).__name__}.", _REPLACE)
    data = {_checked_name(name, origin): _bytes(name, content, origin) for name, content in files.items()}
    with tempfile.TemporaryDirectory() as directory:
        for name, content in data.items():
            Path(directory, name).write_bytes(content)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # The Rust code of tokenizers raises PanicException, which is not an Exception.
            raise DataError(f"{origin}: its tokenizer cannot be opened ({first_line(error)}).", _REPLACE) from error
    check_tokenizer(tokenizer, origin)
    return tokenizer


def is_tokenizer_file(name: str) -> bool:
    """Return whether tokenizers of ``transformers`` write files of this name."""
    return name in TOKENIZER_FILES or _TOKENIZER_MODEL.fullmatch(name) is not None


def _checked_name(name: object, origin: str) -> str:
    if isinstance(name, str) and is_tokenizer_file(name):
        return name
    raise DataError(
        f"{origin}: the tokenizer contains a file named {name!r}. Only plain names of tokenizer files are allowed, "
        "such as 'tokenizer.json' or 'tokenizer.model', without a directory part. Nothing was written.",
        _REPLACE,
    )


def _bytes(name: object, content: object, origin: str) -> bytes:
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, torch.Tensor) and content.dtype is torch.uint8 and content.device.type == "cpu":
        return content.contiguous().numpy().tobytes()
    raise DataError(f"{origin}: the tokenizer file {name!r} must be text or bytes. Nothing was written.", _REPLACE)
