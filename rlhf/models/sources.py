"""Model sources: random weights, a Hugging Face directory or a Hub ID. ``conf/model/`` configures these classes."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.errors import ConfigError, DataError, listed
from rlhf.models.kernels import without_kernels
from rlhf.models.opening import (
    MODEL_FOLDER,
    Attention,
    check_config,
    check_finite,
    check_folder,
    count_weights,
    language_model_class,
    opening,
)
from rlhf.models.scalar import ScalarHead, ScalarModel
from rlhf.schema import NonNegativeFloat, PositiveFloat, PositiveInt
from rlhf.tokenizer.probe import check_tokenizer
from rlhf.tokenizer.training import train_tokenizer
from rlhf.tokenizer.vocabulary import check_embedding, compare_tokenizers

T = TypeVar("T")
_REWARD_MODEL = "Use a sequence classification model with one label, or a reward_model_final.pt."


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


def as_sequence(given: T | Sequence[T] | None) -> Sequence[T]:
    """Return one item or several as a sequence; empty for None."""
    if given is None:
        return ()
    return given if isinstance(given, Sequence) else (given,)


class _RandomWeights:
    """Base class of the sources with random weights."""

    vocab_size: int

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        return train_tokenizer(texts, self.vocab_size)

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
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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
        with without_kernels():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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
        path: Directory written by ``save_pretrained``, or a Hub ID such as ``Qwen/Qwen2.5-0.5B``.
        revision: Branch, tag or commit on the Hub; null for the default branch.
        attention: ``attn_implementation`` of transformers. ``sdpa`` is PyTorch's attention, which on GPUs contains
            FlashAttention. null: the default of the architecture.
    """

    path: str
    revision: str | None = None
    attention: Attention | None = None

    def tokenizer(self, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        tokenizer = self._tokenizer()
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{self.path}: the tokenizer has no EOS token, so responses could not end.",
                "Define eos_token in tokenizer_config.json.",
            )
        return tokenizer

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return self._open_model("language model", language_model_class, tokenizer)

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        """Open a sequence classification model with one label as a reward model.

        Raises:
            DataError: Its vocabulary differs from that of ``tokenizer``, or it is not such a model.
        """
        compare_tokenizers(self._tokenizer(), tokenizer, self.path)
        model = self._open_model("reward model", lambda config: AutoModelForSequenceClassification, tokenizer)
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise DataError(
                f"{self.path}: a reward model must have one linear layer 'score' with one label.", _REWARD_MODEL
            )
        head = ScalarHead(score.in_features)
        bias = torch.zeros(1) if score.bias is None else score.bias
        head.load_state_dict({"layers.0.weight": score.weight, "layers.0.bias": bias})
        return ScalarModel(model.base_model, head)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        check_folder(self.path, "tokenizer")
        with opening(self.path, "tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=False
            )
        check_tokenizer(tokenizer, self.path)
        return tokenizer

    def _open_model(
        self, kind: str, auto_class: Callable[[PreTrainedConfig], Any], tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Open a model in float32. Missing weights are an error; transformers would initialize them at random."""
        check_folder(self.path, kind)
        origin: dict[str, Any] = {"revision": self.revision, "trust_remote_code": False}
        with opening(self.path, kind):
            config = AutoConfig.from_pretrained(self.path, **origin)
            check_config(config, self.path, count_weights(self.path))
            if self.attention is not None:
                origin["attn_implementation"] = self.attention
            model, info = auto_class(config).from_pretrained(
                self.path,
                config=config,
                dtype=torch.float32,
                weights_only=True,
                output_loading_info=True,
                **origin,
            )
        self._check_weights(kind, model, info)
        check_embedding(tokenizer, model, self.path)
        return remember_config(model)

    def _check_weights(self, kind: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
        if missing := sorted(info["missing_keys"]):
            fix = _REWARD_MODEL if kind == "reward model" else MODEL_FOLDER
            raise DataError(f"{self.path}: weights of the {kind} are missing: {listed(missing, 3)}.", fix)
        known = {_without_layer(name) for name in model.state_dict()}
        further = sorted(name for name in info["unexpected_keys"] if _without_layer(name) in known)
        if further:
            raise DataError(
                f"{self.path}: the weights have more layers than config.json says, such as {further[0]}.",
                "Restore the config.json that belongs to the weights.",
            )
        check_finite(model.state_dict(), self.path)


def _without_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def remember_config(model: PreTrainedModel) -> PreTrainedModel:
    """Store the configuration of a newly opened model on its trunk, for exports: training sets dropout to 0 in it."""
    trunk: Any = model.base_model
    trunk.original_config = model.config.to_json_string(use_diff=False)
    return model


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _next_multiple(number: int, factor: int) -> int:
    return -(-number // factor) * factor
