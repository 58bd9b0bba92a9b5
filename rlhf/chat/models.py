"""The models of a chat: opened, frozen and in the precision of the Trainer."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import Encoder, Message
from rlhf.data.datamodule import DEFAULT_TEMPLATE
from rlhf.export import Export
from rlhf.models import Frozen, ModelSource, Policy, chat_template
from rlhf.reward_functions import end_as_in_training, load_reward_models
from rlhf.sampling import LocalSampler, Rollout, SamplingParams
from rlhf.stage.precision import prepare_frozen
from rlhf.tokenizer.probe import check_template
from rlhf.tokenizer.templates import is_plain_template


@dataclass(frozen=True)
class Runtime:
    """Device and precision of all models of a chat.

    Args:
        device: The device.
        plugin: The precision plugin of the Trainer.
    """

    device: torch.device
    plugin: Any

    @classmethod
    def of_trainer(cls, cfg: DictConfig) -> "Runtime":
        """Return device and precision of a Trainer configuration. A chat uses one device."""
        devices = cfg.trainer.devices
        one = list(devices) if OmegaConf.is_list(devices) and len(devices) == 1 else 1
        flags: dict[str, Any] = {"strategy": "auto", "devices": one, "num_nodes": 1, "fast_dev_run": False}
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = instantiate(cfg.trainer, **flags, **off, callbacks=[])
        torch.backends.cuda.enable_cudnn_sdp(cfg.speed.cudnn_attention)
        return cls(trainer.strategy.root_device, trainer.precision_plugin)

    def prepare(self, model: Frozen) -> Frozen:
        """Move a model to the device, in the precision of the Trainer."""
        prepared: Frozen = prepare_frozen(model, self.plugin, self.device)
        return prepared

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes."""
        context: AbstractContextManager[Any] = self.plugin.forward_context()
        return context


class ChatModel:
    """A policy with its tokenizer and its template.

    Args:
        name: Name of the model.
        source: Where the model is from.
        runtime: Device and precision.
        template: Text around a prompt, with ``{prompt}`` in it. None: the chat template that the model carries.
        max_length: Maximum length of prompt and response, in tokens. None: that of the training, if the file contains
            it. The number of positions of the model is a further limit.
        multi_turn: Whether earlier messages are part of the prompt. None: if the model has a chat template for
            conversations, and not only a text around a prompt.
    """

    def __init__(
        self,
        name: str,
        source: ModelSource,
        runtime: Runtime,
        *,
        template: str | None = None,
        max_length: int | None = None,
        multi_turn: bool | None = None,
    ) -> None:
        self.name, self.source, self.runtime = name, source, runtime
        self.tokenizer: PreTrainedTokenizerBase = source.tokenizer(())
        if template is not None or not self.tokenizer.chat_template:
            self.tokenizer.chat_template = chat_template(template or DEFAULT_TEMPLATE)
        check_template(self.tokenizer)
        self.multi_turn = not is_plain_template(self.tokenizer) if multi_turn is None else multi_turn
        self.lm = lm = source.language_model(self.tokenizer)
        self.parameters = sum(parameter.numel() for parameter in lm.parameters())
        positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        limits = (max_length or trained_length(source), positions)
        self.max_length = min((limit for limit in limits if limit is not None), default=sys.maxsize)
        self.policy = runtime.prepare(Frozen(Policy(lm)))
        self.sampler = LocalSampler()
        self.sampler.sync(lm, self.tokenizer)

    @property
    def path(self) -> str:
        """Path or Hub ID of the source."""
        return str(getattr(self.source, "path", ""))

    def stop_ids(self, params: SamplingParams) -> list[int]:
        """Return the ids of the tokens that end a response of the model."""
        return params.stop_ids(self.tokenizer, self.lm)

    def encode(self, messages: Sequence[Message], *, reserve: int) -> tuple[list[int], bool]:
        """Encode a prompt as in training.

        Args:
            messages: The conversation. The last message is not by the assistant.
            reserve: Number of tokens to keep free for the response.

        Returns:
            The token ids, and whether the beginning of the prompt was removed because it was too long.
        """
        encoder = Encoder(self.tokenizer, self.max_length)
        input_ids = encoder.encode_prompt(messages, reserve=reserve)
        return input_ids, bool(encoder.counts["truncated_prompts"])


class RewardScores:
    """Scores of the reward model, as ``stage=evaluate`` computes them.

    Args:
        sources: The reward model, or the members of an ensemble.
        tokenizer: A tokenizer with the vocabulary of the reward model.
        runtime: Device and precision.

    Raises:
        DataError: The reward model has another vocabulary, or a file is not a reward model.
    """

    def __init__(self, sources: Sequence[ModelSource], tokenizer: PreTrainedTokenizerBase, runtime: Runtime) -> None:
        self.path = ", ".join(str(getattr(source, "path", "")) for source in sources)
        self.runtime = runtime
        self.vocabulary = tokenizer.get_vocab()
        self.model = runtime.prepare(load_reward_models(sources, tokenizer))

    def can_score(self, model: ChatModel) -> bool:
        """Return whether a model has the vocabulary of the reward model."""
        return model.tokenizer.get_vocab() == self.vocabulary

    @torch.inference_mode()
    def score(self, prompt: list[int], response: list[int], model: ChatModel, stop_ids: Sequence[int]) -> float:
        """Return the score of a response, in reward units.

        Args:
            prompt: Token ids of the prompt.
            response: Token ids of the response, with its stop token if it has one.
            model: The model that sampled the response.
            stop_ids: Ids of the tokens that end a response.
        """
        rollout = Rollout.from_responses([prompt], [response], stop_ids, self.runtime.device)
        tokens = end_as_in_training(rollout, model.tokenizer)
        with self.runtime.forward_context():
            scores: Tensor = self.model(*tokens)
        return float(scores[0])


def trained_length(source: ModelSource) -> int | None:
    """Return ``data.max_length`` of the training that made an exported model; None if it is not known."""
    if not isinstance(source, Export):
        return None
    content: Any = source.provenance
    for key in ("config", "data", "max_length"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, int) and not isinstance(content, bool) and content >= 2 else None
