"""Sources of models with adapters. The models of a stage that have the same base share its weights."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable
from weakref import ReferenceType, ref

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ConfigError
from rlhf.models.adapters import Adapter, BaseModel, LoRA, adapter_of, add_adapter, trunk_of
from rlhf.models.scalar import ScalarModel
from rlhf.models.sources import ModelSource


def share_frozen_weights(model: nn.Module, other: nn.Module) -> None:
    """Let a model use the parameters of another one wherever both are frozen and bit-for-bit equal.

    The models may be of different kinds: a language model, and a ``ScalarModel`` with or without an adapter.
    """
    known = {name: parameter for name, _, _, parameter in _frozen_parameters(other)}
    for name, module, attribute, parameter in _frozen_parameters(model):
        shared = known.get(name)
        if shared is None or shared is parameter:
            continue
        if (shared.device, shared.dtype) == (parameter.device, parameter.dtype) and torch.equal(shared, parameter):
            module._parameters[attribute] = shared


def _frozen_parameters(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """Return name, module, attribute and value of each frozen parameter; the names do not depend on adapter or head."""
    prefixes = ("trunk.", f"{getattr(trunk_of(model), 'base_model_prefix', '')}.")
    found = []
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                name = re.sub(r"(\.base_layer)+\.", ".", f"{path}.{attribute}")
                for prefix in prefixes:
                    name = name.removeprefix(prefix)
                found.append((name, module, attribute, parameter))
    return found


@runtime_checkable
class AdapterSource(Protocol):
    """A model source that may hold an adapter, which it merges into the base model unless it is asked not to."""

    @property
    def adapter(self) -> Adapter | None:
        """The adapter; None for a complete model."""

    def language_model(self, tokenizer: PreTrainedTokenizerBase, *, merge: bool = True) -> PreTrainedModel:
        """Return the language model, with its adapter merged or as separate layers."""

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase, *, merge: bool = True) -> ScalarModel:
        """Return the reward model, with its adapter merged or as separate layers."""


@dataclass
class SharedBase:
    """The open models of a stage. Their equal frozen weights are stored once."""

    models: list[ReferenceType[nn.Module]] = field(default_factory=list)

    def add(self, model: nn.Module) -> None:
        """Share the frozen weights of a model with those of the models that are open."""
        for other in [alive for reference in self.models if (alive := reference()) is not None]:
            share_frozen_weights(model, other)
        self.models.append(ref(model))


@dataclass(frozen=True)
class WithAdapter:
    """A source of models with a frozen base and a trainable adapter.

    A model without an adapter gets a new one. The adapter of a stage's output is trained further.

    Args:
        source: Where the models come from.
        lora: Settings of the adapter.
        shared: The open models of the stage, which share the base.
        trainable: Whether the models are trained. Otherwise they are frozen and get no new adapter.
    """

    source: ModelSource
    lora: LoRA
    shared: SharedBase = field(default_factory=SharedBase, repr=False, compare=False)
    trainable: bool = True

    @property
    def path(self) -> str:
        """The path of the source; empty for random weights."""
        return str(getattr(self.source, "path", ""))

    def tokenizer(self, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        return self.source.tokenizer(texts)

    def language_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if isinstance(self.source, AdapterSource):
            model = self.source.language_model(tokenizer, merge=False)
        else:
            model = self.source.language_model(tokenizer)
        self._prepare(model, model)
        return model

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        if isinstance(self.source, AdapterSource):
            model = self.source.scalar_model(tokenizer, merge=False)
        else:
            model = self.source.scalar_model(tokenizer)
        trunk: Any = model.trunk
        self._prepare(model, trunk)
        return model

    def _prepare(self, model: nn.Module, adapted: PreTrainedModel) -> None:
        """Add or check the adapter, freeze the base, and share it."""
        own = adapter_of(model)
        if not self.trainable:
            model.requires_grad_(False)
        elif own is None:
            add_adapter(adapted, Adapter(self.lora, BaseModel.identify(self.source, adapted)))
        elif own.lora != self.lora:
            raise ConfigError(
                f"{self.path} contains an adapter with {own.lora.overrides()}, which is trained further, but the "
                f"configuration has {self.lora.overrides()}.",
                f"Set {own.lora.overrides()}",
            )
        self.shared.add(model)


def starting_point(source: ModelSource) -> ModelSource:
    """Return the source of the frozen model that training starts from: without the new adapter of ``WithAdapter``."""
    return replace(source, trainable=False) if isinstance(source, WithAdapter) else source
