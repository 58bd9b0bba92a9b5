"""Check that the models of a stage have a position for every token."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from rlhf.data import RecordDataModule
from rlhf.errors import ConfigError
from rlhf.models import ModelSource, all_named_modules, trunk_without_weights
from rlhf.models.probes import rope_parameters
from rlhf.sampling import LocalSampler, Sampler, position_limit

# Names of layers that add an embedding of each position.
_LEARNED = {"wpe", "embed_positions", "position_embedding", "position_embeddings"}
_NAMES = {"reference": "reference model", "reward": "reward model"}  # of models, by the attributes of stages
# Architectures that compute the positions once, as a table, with the setting that is its length.
_TABLES = {"codegen": "n_positions", "ctrl": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}


class Limit(NamedTuple):
    """A limit on the length of sequences.

    Attributes:
        positions: Largest number of tokens.
        model: The model that has this limit, for messages.
    """

    positions: int
    model: str


def check_positions(module: Any, datamodule: Any) -> None:
    """Reject data with longer sequences than a model of a training stage has positions for.

    Learned position embeddings have such a limit, and so do rotary embeddings of the type ``dynamic``: above it,
    transformers chooses their frequencies by the longest sequence of this batch and of earlier ones. Some architectures
    store positions as a table. Other models have no limit in training. ``LocalSampler`` has one for every model with
    ``max_position_embeddings``, which applies to the stages that train on their own samples.

    Args:
        module: The stage, with its models.
        datamodule: Its data.

    Raises:
        ConfigError: A sequence is too long.
    """
    if not isinstance(datamodule, RecordDataModule):
        return
    limits = [
        Limit(positions, _NAMES.get(name, name))
        for name, child in module.named_children()
        for _, part in all_named_modules(child)
        if (positions := _positions(part)) is not None
    ]
    budget = getattr(module, "response_budget", 0)
    if budget:
        limits += _sampling_limits(module.sampler, module.policy.lm.config, "policy")
    splits = ("train", "val") if datamodule.paths["train"] else ("val",)
    _check(limits, datamodule, splits, budget)


def check_source_positions(
    policies: Mapping[str, ModelSource],
    reward_models: Iterable[ModelSource],
    *,
    sampler: Sampler,
    budget: int,
    datamodule: Any,
    split: str,
) -> None:
    """Reject prompts that are too long for a model that is opened later, before any model is opened.

    Models of sources that cannot describe them are not checked.

    Args:
        policies: The models that respond, by the names to use in messages.
        reward_models: The models that score the responses.
        sampler: Sampler of the responses.
        budget: Maximum response length, in tokens.
        datamodule: The prompts.
        split: Their split.

    Raises:
        ConfigError: A prompt is too long.
    """
    if not isinstance(datamodule, RecordDataModule):
        return
    limits: list[Limit] = []
    for name, source in (*policies.items(), *(("reward model", source) for source in reward_models)):
        trunk = trunk_without_weights(source)
        if trunk is None:
            continue
        limits += [Limit(found, name) for part in trunk.modules() if (found := _positions(part)) is not None]
        if name in policies:
            limits += _sampling_limits(sampler, trunk.config, name)
    _check(limits, datamodule, (split,), budget)


def _check(limits: Sequence[Limit], datamodule: RecordDataModule, splits: Sequence[str], budget: int) -> None:
    """Raise an error if a sequence of the data, followed by a response of ``budget`` tokens, is above a limit."""
    longest = max(int(datamodule.encoded(split).lengths.max(initial=0)) for split in splits)
    if not limits or longest + budget <= min(limits).positions:
        return
    positions, model = min(limits)
    if not budget:
        raise ConfigError(
            f"data.max_length={datamodule.max_length} allows sequences of {longest} tokens, but the {model} has "
            f"{positions} positions.",
            f"Set data.max_length={positions}",
        )
    raise ConfigError(
        f"data.max_length={datamodule.max_length} allows prompts of {longest} tokens, which need {longest + budget} "
        f"positions with stage.sampling.max_new_tokens={budget}, but the {model} has {positions}.",
        f"Set data.max_length={positions}"
        if positions > budget
        else f"Set data.max_length={positions} stage.sampling.max_new_tokens={positions // 2}",
    )


def _sampling_limits(sampler: Sampler, config: PreTrainedConfig, model: str) -> list[Limit]:
    """Return the limit on what a sampler samples from a policy, if there is one."""
    positions = position_limit(config) if isinstance(sampler, LocalSampler) else None
    return [] if positions is None else [Limit(positions, model)]


def _positions(part: nn.Module) -> int | None:
    """Return the number of positions of a model's trunk; None if it has no limit."""
    config: Any = getattr(part, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    if config.model_type in _TABLES:
        return int(getattr(config, _TABLES[config.model_type]))
    learned = any(isinstance(child, nn.Embedding) and name in _LEARNED for name, child in part.named_children())
    dynamic = any(one["rope_type"] == "dynamic" for one in rope_parameters(config))
    return getattr(config, "max_position_embeddings", None) if learned or dynamic else None
