"""Where a model comes from: a fresh transformer or Mamba, a folder or a hub id. ``conf/model/`` names these classes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    Mamba2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf.errors import UserError
from rlhf.models.scalar import ScalarHead, ScalarModel
from rlhf.models.tokenizer import train_tokenizer


class ModelSource(Protocol):
    """What a stage starts from. ``rlhf.export.Export``, an earlier stage's result, is one too."""

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ``texts`` are only read by a model that starts from nothing."""

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """A new copy of the causal language model, float32, on the CPU."""


@dataclass(frozen=True)
class Transformer:
    """A Llama-type decoder with random weights.

    Args:
        hidden_size: width of the hidden state.
        num_layers: decoder blocks.
        num_heads: attention heads; divides hidden_size.
        intermediate_size: width of the feed-forward layer.
        max_length: longest text it can read, tokens.
        vocab_size: most tokens of the tokenizer that is trained on the SFT data.
        initializer_range: standard deviation of the random weights.
        rope_theta: base of the rotary positions (Su et al. 2021, arXiv:2104.09864); a small one learns
            to copy within short texts faster.
    """

    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 256
    max_length: int = 1024
    vocab_size: int = 2048
    initializer_range: float = 0.04
    rope_theta: float = 300.0

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        return train_tokenizer(texts, self.vocab_size)

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} is not a multiple of model.num_heads={self.num_heads}"
            )
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=self.max_length,
            initializer_range=self.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            **_special_tokens(tokenizer),
        )
        return AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True)
class Mamba:
    """A Mamba-2 state-space model with random weights (Dao and Gu 2024, arXiv:2405.21060).

    The scan starts with larger steps and slower decay than the usual ones, which are meant for long texts: what a token
    says is written strongly and kept for the length of a short text, so that copying is learned in fewer steps.

    Args:
        hidden_size: width of the hidden state; the inner width is twice that.
        num_layers: Mamba blocks.
        head_dim: width of a head; divides 2 x hidden_size.
        state_size: numbers of state a channel: what it can remember.
        chunk_size: tokens the scan handles at once; 32 is fastest for texts of 80 tokens on a CPU. Results do not
            depend on it.
        vocab_size: most tokens of the tokenizer that is trained on the SFT data.
        initializer_range: standard deviation of the random weights.
    """

    hidden_size: int = 192
    num_layers: int = 2
    head_dim: int = 64
    state_size: int = 128
    chunk_size: int = 32
    vocab_size: int = 2048
    initializer_range: float = 0.05

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        return train_tokenizer(texts, self.vocab_size)

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if 2 * self.hidden_size % self.head_dim:
            raise UserError(
                f"2 x model.hidden_size={self.hidden_size} is not a multiple of model.head_dim={self.head_dim}"
            )
        config = Mamba2Config(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_heads=2 * self.hidden_size // self.head_dim,
            head_dim=self.head_dim,
            state_size=self.state_size,
            chunk_size=self.chunk_size,
            n_groups=1,
            initializer_range=self.initializer_range,
            tie_word_embeddings=True,
            time_step_min=0.3,
            time_step_max=1.0,
            **_special_tokens(tokenizer),
        )
        model = AutoModelForCausalLM.from_config(config)
        rates = torch.logspace(-2, -0.7, config.num_heads)  # decay a step: memories of 100 to 5 tokens at step size 1
        for block in model.backbone.layers:
            block.mixer.A_log.data.copy_(rates.log())
        return model


@dataclass(frozen=True)
class Pretrained:
    """Any causal language model of a Hugging Face folder or hub id; code from the hub is never run.

    Args:
        path: folder that ``save_pretrained`` wrote, or a hub id such as ``Qwen/Qwen2.5-0.5B``.
        revision: branch, tag or commit on the hub.
        attention: attention kernel, as ``attn_implementation`` of transformers; null leaves the choice to it.
    """

    path: str
    revision: str | None = None
    attention: str | None = None

    def tokenizer(self, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, revision=self.revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise self._cannot_open("tokenizer", error) from error
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.path}: its tokenizer has no EOS token, so no answer could ever end",
                "set eos_token in the folder's tokenizer_config.json",
            )
        return tokenizer

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.path,
                revision=self.revision,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation=self.attention,
            )
        except (OSError, ValueError, KeyError) as error:
            raise self._cannot_open("model", error) from error

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        """A sequence classifier with one label, as a reward model."""
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.path,
                revision=self.revision,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise self._cannot_open("reward model", error) from error
        if missing := sorted(found["missing_keys"]):
            part = "the score head is" if missing[0].startswith("score") else "these weights are"
            raise UserError(
                f"{self.path} holds no reward model: {part} not in the folder: {', '.join(missing[:5])}",
                "stage.reward_model=<a sequence classifier with one label, or a run's reward_model_final.pt>",
            )
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise UserError(f"{self.path}: a reward model has one linear 'score' for one label")
        ours = ScalarHead(head.in_features)
        ours.load_state_dict(
            {"layers.0.weight": head.weight, "layers.0.bias": torch.zeros(1) if head.bias is None else head.bias}
        )
        return ScalarModel(model.base_model, ours)

    def _cannot_open(self, what: str, error: Exception) -> UserError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return UserError(
            f"model.path={self.path}: no {what} could be opened there ({reason})",
            "model.path=<folder that save_pretrained wrote, with model and tokenizer, or a hub id>",
        )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
