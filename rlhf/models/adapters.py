"""Low-rank adapters (LoRA) on a frozen base model, through peft."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import ConfigError, DataError, first_line
from rlhf.models.scalar import ScalarModel
from rlhf.models.trunk import encoders
from rlhf.schema import FractionBelowOne, PositiveInt, check_arguments

ALL_LINEAR = "all-linear"
# The kernels of these architectures read the weight of out_proj directly, so peft refuses to adapt it.
OUT_PROJ_REFUSED = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_MARK = "rlhf_adapter"  # attribute of an adapted language model and of its trunk


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: an adapted layer computes W x + (alpha / r) B A x, where W is frozen and A and B are trained.

    B starts at 0, so a new adapter does not change the model.

    Args:
        r: Rank of the update: A has r rows, and B has r columns.
        alpha: Scale of the update, dimensionless. Its factor is alpha / r.
        dropout: Probability with which inputs of A are dropped. Only SFT trains with dropout.
        target_modules: Names of the adapted modules, such as ``[q_proj, v_proj]``, as in peft. ``all-linear``: every
            linear layer except the output embedding, and the fused experts of the architectures that peft supports.

    Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685).
    """

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: FractionBelowOne = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR

    def __post_init__(self) -> None:
        names = self.target_modules if isinstance(self.target_modules, str) else sorted(map(str, self.target_modules))
        if not names:
            raise ConfigError("adapter.target_modules names no module.", f"Set adapter.target_modules={ALL_LINEAR}.")
        object.__setattr__(self, "target_modules", names if isinstance(names, str) else tuple(names))
        check_arguments(type(self), "adapter", vars(self))

    def overrides(self) -> str:
        """Return the settings as overrides of a command."""
        values = {**asdict(self), "target_modules": _as_override(self.target_modules)}
        return " ".join(f"adapter.{name}={value}" for name, value in values.items())

    def peft_config(self, model: nn.Module) -> Any:
        """Return the ``peft.LoraConfig`` for a model."""
        from peft import LoraConfig

        targets = self.target_modules
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            exclude_modules=self._excluded(model) or None,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )

    def _excluded(self, model: nn.Module) -> list[str]:
        """Return the names, or ends of names, of modules that stay as they are."""
        config: Any = model.config
        if self.target_modules == ALL_LINEAR and config.model_type in OUT_PROJ_REFUSED:
            return ["out_proj"]
        frozen = {id(module) for encoder in encoders(trunk_of(model)) for module in encoder.modules()}
        return [name for name, module in model.named_modules() if id(module) in frozen]


@dataclass(frozen=True)
class BaseModel:
    """What identifies the model that an adapter belongs to.

    Args:
        path: Absolute path of a folder or of a ``*_final.pt``, or a Hub ID.
        revision: Commit on the Hub; None for a local path.
        digest: Digest of the weights, see ``weights_digest``.
    """

    path: str
    revision: str | None
    digest: str

    @classmethod
    def identify(cls, source: object, model: nn.Module) -> "BaseModel":
        """Identify a model that has just been opened from a source."""
        path = cls.require_path(source)
        config: Any = model.config
        local = Path(path).exists()
        revision = None if local else getattr(source, "revision", None) or getattr(config, "_commit_hash", None)
        return cls(str(Path(path).resolve()) if local else path, revision, weights_digest(model))

    @staticmethod
    def require_path(source: object) -> str:
        """Return the path of a source.

        Raises:
            ConfigError: The source gives random weights, which are stored nowhere.
        """
        if path := str(getattr(source, "path", "")):
            return path
        raise ConfigError(
            f"adapter=lora requires a trained base model, but {type(source).__name__} has random weights.",
            "Set model=pretrained model.path=<path> or adapter=none.",
        )

    def check(self, model: nn.Module, origin: str) -> None:
        """Raise a ``DataError`` if a model that has just been opened is not this one."""
        if weights_digest(model) != self.digest:
            raise DataError(
                f"{origin}: the adapter was trained on the base model {self.path}, whose weights have changed since.",
                f"Restore the original model at {self.path}, or train the adapter again.",
            )


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model.

    Args:
        lora: Its settings.
        base: The model that it belongs to.
    """

    lora: LoRA
    base: BaseModel

    def to_dict(self) -> dict[str, Any]:
        """Return text, numbers and lists only, as files contain them."""
        content = asdict(self)
        targets = self.lora.target_modules
        content["lora"]["target_modules"] = targets if isinstance(targets, str) else list(targets)
        return content

    @classmethod
    def from_dict(cls, content: Any) -> "Adapter":
        """Return the adapter that ``to_dict`` describes."""
        return cls(LoRA(**content["lora"]), BaseModel(**content["base"]))


def weights_digest(model: nn.Module) -> str:
    """Return a digest of all parameters that takes about as long as reading them from memory.

    It does not depend on names, which differ between versions of transformers. It recognizes changed weights; it is not
    a protection against weights that someone has constructed to have the same digest.
    """
    hashes = sorted(
        (tuple(p.shape), torch.hash_tensor(p.detach()).view(torch.int64).item()) for p in model.parameters()
    )
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def add_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Freeze a model and add a new, trainable adapter to it.

    Raises:
        ConfigError: The model has no such target modules, or one of them is the input embedding or shares its weight.
    """
    from peft import inject_adapter_in_model

    try:
        # PreTrainedModel.add_adapter does the same, but refuses versions of peft that it works with.
        inject_adapter_in_model(adapter.lora.peft_config(model), model)
    except ValueError as error:
        raise ConfigError(
            f"adapter.target_modules={_as_override(adapter.lora.target_modules)} does not fit the model: "
            f"{first_line(error)}",
            "Set adapter.dropout=0." if "lora_dropout" in str(error) else f"Set adapter.target_modules={ALL_LINEAR}.",
        ) from error
    _check_embeddings(model, adapter.lora)
    for part in (model, model.base_model):
        setattr(part, _MARK, adapter)


def _check_embeddings(model: PreTrainedModel, lora: LoRA) -> None:
    """Reject an adapter of the input embedding, and one of a tied output embedding: merging it would change both."""
    from peft.tuners.lora import LoraLayer

    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()
    if isinstance(inputs, LoraLayer):
        problem = "the input embedding, which cannot be adapted"
    elif isinstance(outputs, LoraLayer) and outputs.weight is inputs.weight:
        problem = "the output embedding, which shares its weight with the input embedding in this model"
    else:
        return
    raise ConfigError(
        f"adapter.target_modules={_as_override(lora.target_modules)} includes {problem}.",
        f"Set adapter.target_modules={ALL_LINEAR}.",
    )


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return the adapter of a language model or ``ScalarModel``; None if it has none."""
    return getattr(trunk_of(model), _MARK, None)


def base_weights(module: nn.Module) -> set[str]:
    """Return the names, as in ``state_dict``, of all frozen parameters of models with adapters inside a module."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        if hasattr(part, _MARK)
        for name, parameter in part.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Add the update of every adapted layer to its weight, W + (alpha / r) B A, and remove the adapter."""
    from peft.tuners.lora import LoraLayer

    # Inner layers first: fused experts have one layer for each of their parameters, nested in one another.
    for name, layer in reversed(list(model.named_modules())):
        if isinstance(layer, LoraLayer):
            merged: Any = layer
            merged.merge()
            model.set_submodule(name, merged.base_layer)
    for part in model.modules():
        for attribute in (_MARK, "peft_config"):
            vars(part).pop(attribute, None)
    model.requires_grad_(True)


def save_adapter(model: PreTrainedModel, adapter: Adapter, directory: Path) -> None:
    """Write the adapter of a model as a folder that ``peft.PeftModel.from_pretrained`` opens."""
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = adapter.base.path, adapter.base.revision
    config.save_pretrained(directory)
    in_full = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in config.modules_to_save or ()}
    # Without this argument, peft looks for the configuration of the base model in a file that it cannot read.
    weights = {**get_peft_model_state_dict(model, save_embedding_layers=False), **in_full}
    save_file(
        {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def set_classifier_adapter(classifier: PreTrainedModel) -> None:
    """Describe the adapted layers of a sequence classifier, whose layer ``score`` is trained in full, for peft."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    adapter = adapter_of(classifier)
    assert adapter is not None
    config = adapter.lora.peft_config(classifier)
    config.task_type, config.modules_to_save, config.exclude_modules = "SEQ_CLS", ["score"], None
    config.target_modules, config.target_parameters = set(), set()
    for name, layer in classifier.named_modules():
        if isinstance(layer, ParamWrapper):  # of experts, where peft may choose another rank
            parameter = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            config.target_parameters.add(parameter)
            config.rank_pattern[parameter] = layer.r["default"]
            config.alpha_pattern[parameter] = layer.lora_alpha["default"]
        elif isinstance(layer, LoraLayer):
            config.target_modules.add(name)
    classifier.peft_config = {"default": config}


def trunk_of(model: nn.Module) -> nn.Module:
    """Return the trunk of a language model or ``ScalarModel``."""
    return model.trunk if isinstance(model, ScalarModel) else getattr(model, "base_model", model)


def _as_override(targets: str | Sequence[str]) -> str:
    return targets if isinstance(targets, str) else f"[{','.join(targets)}]"
