"""Model sources: random weights, a Hugging Face directory or a model ID. ``conf/model/`` configures these classes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

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
)

from rlhf.errors import ConfigError, DataError
from rlhf.models.scalar import ScalarHead, ScalarModel
from rlhf.models.tokenizer import check_embedding, check_vocabulary, train_tokenizer
from rlhf.schema import NonNegativeFloat, PositiveFloat, PositiveInt

T = TypeVar("T")


class ModelSource(Protocol):
    """Where a stage gets its models from. ``rlhf.export.Export``, the result of an earlier stage, is one as well."""

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """Return the tokenizer; ``texts`` are only read by sources that train one."""

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Return a new copy of the causal language model, in float32 on the CPU."""

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        """Return a new copy of the reward model, in float32 on the CPU.

        Raises:
            UserError: The source does not contain a reward model.
        """


@dataclass(frozen=True)
class _RandomWeights:
    """Base class of the sources with random weights."""

    def _vocab_size(self) -> int:
        raise NotImplementedError

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        return train_tokenizer(texts, self._vocab_size())

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        raise ConfigError(
            f"{type(self).__name__} has random weights and cannot be used as a reward model.",
            "Set stage.reward_model=<path>",
        )


@dataclass(frozen=True)
class Transformer(_RandomWeights):
    """A Llama-type decoder with random weights.

    Args:
        hidden_size: Width of the hidden states.
        num_layers: Number of decoder blocks.
        num_heads: Number of attention heads; must divide ``hidden_size``.
        intermediate_size: Width of the feed-forward layers.
        max_length: Maximum sequence length, in tokens.
        vocab_size: Maximum vocabulary size of the tokenizer that is trained on the SFT data.
        initializer_range: Standard deviation of the initial weights.
        rope_theta: Base of the rotary position embedding (Su et al. 2021, arXiv:2104.09864). With a small base, the
            model learns faster to copy within short sequences.
    """

    hidden_size: PositiveInt = 256
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    intermediate_size: PositiveInt = 256
    max_length: Annotated[int, ">= 2"] = 1024
    vocab_size: PositiveInt = 2048
    initializer_range: NonNegativeFloat = 0.04
    rope_theta: PositiveFloat = 300.0

    def _vocab_size(self) -> int:
        return self.vocab_size

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads ({self.num_heads}), got {self.hidden_size}.",
                f"Set model.hidden_size={_next_multiple(self.hidden_size, self.num_heads)}.",
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
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model


@dataclass(frozen=True)
class Mamba(_RandomWeights):
    """A Mamba-2 state-space model with random weights (Dao and Gu 2024, arXiv:2405.21060).

    The usual initialization is meant for long sequences. This one has larger step sizes and slower decay: a token is
    written to the state strongly and kept for the length of a short sequence, so that copying is learned in fewer
    steps.

    Args:
        hidden_size: Width of the hidden states. The inner width is twice as large.
        num_layers: Number of Mamba blocks.
        head_dim: Width of a head; must divide ``2 * hidden_size``.
        state_size: State size per channel.
        chunk_size: Number of tokens that the scan processes at once. It affects speed only; 32 is fastest on a CPU for
            sequences of 80 tokens.
        vocab_size: Maximum vocabulary size of the tokenizer that is trained on the SFT data.
        initializer_range: Standard deviation of the initial weights.
    """

    hidden_size: PositiveInt = 192
    num_layers: PositiveInt = 2
    head_dim: PositiveInt = 64
    state_size: PositiveInt = 128
    chunk_size: PositiveInt = 32
    vocab_size: PositiveInt = 2048
    initializer_range: NonNegativeFloat = 0.05

    def _vocab_size(self) -> int:
        return self.vocab_size

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if 2 * self.hidden_size % self.head_dim:
            raise ConfigError(
                f"2 * hidden_size must be a multiple of head_dim ({self.head_dim}), got 2 * {self.hidden_size}.",
                f"Set model.hidden_size={_next_multiple(self.hidden_size, self.head_dim)}.",
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
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        # Decay rates per step of 0.01 to 0.2: with step size 1, the heads remember 100 to 5 tokens.
        rates = torch.logspace(-2, -0.7, config.num_heads)
        backbone: Any = model.backbone
        for block in backbone.layers:
            block.mixer.A_log.data.copy_(rates.log())
        return model


@dataclass(frozen=True)
class Pretrained:
    """A causal language model or reward model in a Hugging Face directory or on the Hub. Code from the Hub never runs.

    Args:
        path: Directory written by ``save_pretrained``, or a model ID such as ``Qwen/Qwen2.5-0.5B``.
        revision: Branch, tag or commit on the Hub; null for the default branch.
        attention: Attention implementation, see ``attn_implementation`` of transformers; null for its default.
    """

    path: str
    revision: str | None = None
    attention: str | None = None

    def tokenizer(self, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = self._open("tokenizer", AutoTokenizer.from_pretrained)
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{self.path}: the tokenizer has no EOS token, so responses could not end.",
                "Define eos_token in tokenizer_config.json.",
            )
        return tokenizer

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return self._open_model("language model", AutoModelForCausalLM, tokenizer)

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        """Open a sequence classification model with one label as a reward model.

        Raises:
            DataError: It has another vocabulary than ``tokenizer``, or it is not such a model.
        """
        own: PreTrainedTokenizerBase = self._open("tokenizer", AutoTokenizer.from_pretrained)
        check_vocabulary(own, tokenizer, self.path)
        model = self._open_model("reward model", AutoModelForSequenceClassification, tokenizer)
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise DataError(
                f"{self.path}: a reward model must have one linear layer 'score' with one label.", _REWARD_MODEL
            )
        head = ScalarHead(score.in_features)
        bias = torch.zeros(1) if score.bias is None else score.bias
        head.load_state_dict({"layers.0.weight": score.weight, "layers.0.bias": bias})
        return ScalarModel(model.base_model, head)

    def _open_model(self, kind: str, auto_class: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Open a model in float32. Missing weights are an error; transformers would initialize them at random."""
        keywords = {"dtype": torch.float32, "attn_implementation": self.attention, "output_loading_info": True}
        model, info = self._open(kind, auto_class.from_pretrained, **keywords)
        if missing := sorted(info["missing_keys"]):
            names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
            fix = _REWARD_MODEL if kind == "reward model" else _LANGUAGE_MODEL
            raise DataError(f"{self.path}: weights of the {kind} are missing: {names}.", fix)
        check_embedding(tokenizer, model, self.path)
        return remember_config(model)

    def _open(self, kind: str, from_pretrained: Callable[..., T], **keywords: Any) -> T:
        try:
            return from_pretrained(self.path, revision=self.revision, trust_remote_code=False, **keywords)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"{self.path}: could not load a {kind} from this path ({reason})."
            raise DataError(message, _LANGUAGE_MODEL) from error


def remember_config(model: PreTrainedModel) -> PreTrainedModel:
    """Store the configuration of a newly opened model on its trunk, for exports: training sets dropout to 0 in it."""
    trunk: Any = model.base_model
    trunk.original_config = model.config.to_json_string(use_diff=False)
    return model


_LANGUAGE_MODEL = "Use a directory with model and tokenizer, written by save_pretrained, or a model ID on the Hub."
_REWARD_MODEL = "Use a sequence classification model with one label, or a reward_model_final.pt."


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _next_multiple(number: int, factor: int) -> int:
    return -(-number // factor) * factor
