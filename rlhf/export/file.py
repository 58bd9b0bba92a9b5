"""The ``*_final.pt`` format: write the result of a stage, and open it again."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.distributed import is_rank_zero
from rlhf.errors import ConfigError, DataError, UserError
from rlhf.export.content import FORMAT, build_limit, parse_config, parse_generation_config, parse_json, read_export
from rlhf.files import FINAL_MODEL, atomic_write
from rlhf.models import (
    Adapter,
    BaseModel,
    Pretrained,
    ScalarHead,
    ScalarModel,
    adapter_of,
    base_weights,
    full_state_dict,
    trunk_on_meta,
    trunk_without_weights,
)
from rlhf.models.adapters import add_adapter, merge_adapter, trunk_of
from rlhf.models.opening import REPLACE_FILE, Attention, check_finite, language_model_class, opening
from rlhf.models.sources import remember_config
from rlhf.models.weights import check_fit, load_weights
from rlhf.run_names import OUTPUTS, RUN
from rlhf.stage import Result
from rlhf.tokenizer.files import pack_tokenizer, unpack_tokenizer
from rlhf.tokenizer.vocabulary import compare_tokenizers

log = logging.getLogger(__name__)
M = TypeVar("M", PreTrainedModel, ScalarModel)

FINAL_PATTERN = "*_final.pt"


def load_model(
    name: str = "rl_trained",
    *,
    run: str = RUN,
    device: str | torch.device | None = None,
    outputs: str = OUTPUTS,
    base: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase, torch.device]:
    """Open a trained model.

    Args:
        name: ``rl_trained`` (the result of PPO, or of GRPO or DPO if PPO was not run), the name of a stage (``sft``,
            ``reward``, ``ppo``, ``grpo``, ``dpo``) or of a pipeline variant, or the path of a ``*_final.pt``, a
            checkpoint or a Hugging Face folder.
        run: Name of the run, a directory in ``outputs``. Default: ``"rlhf"``.
        device: Device of the model; None selects a GPU if there is one.
        outputs: Directory of all runs. Default: ``"outputs"``.
        base: Path of the base model, if the file contains an adapter and its base model has been moved.

    Returns:
        The model in eval mode, its tokenizer, and its device. An adapter is merged into its base model. The model is a
        ``transformers`` causal language model, or for a reward model a ``ScalarModel``, which maps input_ids and
        attention_mask, [batch, time] each, to scores, [batch].

    Raises:
        ConfigError: There is no such model.
        DataError: The file is not a complete export.
    """
    source = open_model_source(str(_path_of(name, Path(outputs), run)), base=base)
    tokenizer = source.tokenizer(())
    scalar = isinstance(source, Export) and source.kind == "scalar_model"
    model: Any = source.scalar_model(tokenizer) if scalar else source.language_model(tokenizer)
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return model.to(target).eval(), tokenizer, target


def _path_of(name: str, outputs: Path, run: str) -> Path:
    """Return the path of the model that ``load_model`` is asked for."""
    directory = outputs / run
    if name == "rl_trained" and (directory / FINAL_MODEL).is_file():
        return directory / FINAL_MODEL
    if found := sorted((directory / name).glob(FINAL_PATTERN)):
        return found[0]
    if Path(name).exists():
        return Path(name)
    models = sorted(path.parent.name for path in directory.glob(f"*/{FINAL_PATTERN}"))
    raise ConfigError(
        f"load_model({name!r}): {directory} has no such model, and there is no file or folder of that name. "
        f"Models of run={run}: {', '.join(models) or 'none'}.",
        f"Train one: python train.py run={run}" + ("" if outputs == Path(OUTPUTS) else f" paths.root={outputs}"),
    )


def save_result(result: Result, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write the result of a stage as one file that ``torch.load(weights_only=True)`` opens.

    Of a model with an adapter, the file contains everything except the frozen base model.

    The file is written to a temporary name and renamed, so that a crash cannot corrupt an existing export. All ranks
    call this function, because the weights may be sharded. Only rank 0 writes.
    """
    weights = full_state_dict(result.model, without=base_weights(result.model))
    content = {**describe(result, provenance), "weights": weights}
    if is_rank_zero():
        atomic_write(path, lambda file: torch.save(content, file))


def describe(result: Result, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything in an export except the weights: text and numbers only."""
    model: Any = result.model
    scalar = isinstance(model, ScalarModel)
    adapter = adapter_of(model)
    config = getattr(trunk_of(model), "original_config", None)
    return {
        "format": FORMAT,
        "kind": "scalar_model" if scalar else "language_model",
        "config": config or model.config.to_json_string(use_diff=False),
        "generation_config": None if scalar else model.generation_config.to_json_string(use_diff=False),
        "head": dict(model.head.settings) if scalar else None,
        "adapter": None if adapter is None else adapter.to_dict(),
        "tokenizer": pack_tokenizer(result.tokenizer),
        "provenance": json.dumps(provenance),
    }


@dataclass(frozen=True)
class Export:
    """A ``*_final.pt`` or a Lightning checkpoint of a stage, as a model source.

    Args:
        path: Path of the file.
        attention: ``attn_implementation`` of transformers; None: the default of the architecture.
        base: Path of the base model of an adapter, if it is not the path that the file contains.
    """

    path: str
    attention: Attention | None = None
    base: str | None = None

    @property
    def kind(self) -> str:
        """``language_model`` or ``scalar_model``."""
        return str(self._content()["kind"])

    @property
    def provenance(self) -> dict[str, Any]:
        """How the file was made: stage, inputs, configuration, data and versions."""
        return parse_json(self._content()["provenance"], self.path, "provenance")

    def digest(self) -> str:
        """Return the SHA-256 of the weights, whatever else the file contains."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._content()["weights"].items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def tokenizer(self, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        """Open the tokenizer of the file; ``texts`` are not used.

        Raises:
            DataError: The file contains tokenizer files under unsafe names, or no tokenizer that can be used.
        """
        return unpack_tokenizer(self._content()["tokenizer"], self.path)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that the file contains; None if it contains a complete model."""
        content = self._content().get("adapter")
        try:
            return None if content is None else Adapter.from_dict(content)
        except Exception as error:  # The settings may have any type.
            raise DataError(f"{self.path}: the adapter has invalid settings ({error}).", REPLACE_FILE) from error

    def language_model(self, tokenizer: PreTrainedTokenizerBase, *, merge: bool = True) -> PreTrainedModel:
        """Return a new copy of the causal language model in float32 on the CPU.

        Args:
            tokenizer: Its tokenizer.
            merge: Add the update of an adapter to the weights. Otherwise the adapter is trainable, the rest frozen.
        """
        content = self._content("language_model")
        model = self._with_weights(content, lambda: self._without_weights(content, language_model_class, tokenizer))
        if (generation_config := parse_generation_config(content, self.path)) is not None:
            model.generation_config = generation_config
        if merge and adapter_of(model):
            merge_adapter(model)
        return model

    def scalar_model(self, tokenizer: PreTrainedTokenizerBase, *, merge: bool = True) -> ScalarModel:
        """Return a new copy of the reward model in float32 on the CPU. Arguments as for ``language_model``.

        Raises:
            DataError: The reward model was trained with a vocabulary other than that of ``tokenizer``.
        """
        content = self._content("scalar_model")
        compare_tokenizers(self.tokenizer(), tokenizer, self.path)
        head = dict(content.get("head") or {})

        def build() -> ScalarModel:
            trunk = self._without_weights(content, lambda config: AutoModel, tokenizer).base_model
            with opening(self.path, "reward head", REPLACE_FILE):
                return ScalarModel(trunk, ScalarHead(**head))

        model = self._with_weights(content, build)
        if merge and adapter_of(model):
            merge_adapter(model)
        return model

    def _with_weights(self, content: Mapping[str, Any], build: Callable[[], M]) -> M:
        """Build a model and load the weights of the file.

        The first copy is on the meta device: sizes in the file that do not fit its weights take no memory.
        """
        if self.adapter is None:
            with torch.device("meta"), build_limit(self.path):
                check_fit(build(), content["weights"], self.path)
        model = build()
        load_weights(model, content["weights"], self.path)
        check_finite(content["weights"], self.path)
        return model

    def _without_weights(
        self, content: Any, auto_class: Callable[[PreTrainedConfig], Any], tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Return a model to load the file's weights into: random, or the base model with a new adapter."""
        if self.adapter is None:
            keywords = {} if self.attention is None else {"attn_implementation": self.attention}
            config = parse_config(content, self.path)
            with opening(self.path, "model", REPLACE_FILE):
                model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False, **keywords)
            return remember_config(model)
        base = self.adapter.base
        log.info("%s contains an adapter. Its base model is read from %s.", self.path, self.base or base.path)
        with self._opening_base(base) as source:
            model = source.language_model(tokenizer)
        base.check(model, self.path)
        with build_limit(self.path):
            add_adapter(model, self.adapter)
        return model

    @contextmanager
    def _opening_base(self, base: BaseModel) -> Iterator["Export | Pretrained"]:
        """Open the base model of an adapter. An error in this context names the file with the adapter."""
        path = self.base or base.path
        try:
            source = open_model_source(path, revision=base.revision, attention=self.attention)
            if isinstance(source, Export) and source.adapter is not None:
                raise DataError(f"{path} contains an adapter itself.")
            yield source
        except UserError as error:
            raise DataError(
                f"{self.path} contains an adapter, and its base model cannot be opened. {error.args[0]}",
                f"Restore the base model at {base.path}, or open the file with load_model(<path>, base=<path>).",
            ) from error

    def trunk_without_weights(self) -> PreTrainedModel | None:
        """Return the model without its output layer, on the meta device; None if it is not known."""
        if self.adapter is not None:
            with self._opening_base(self.adapter.base) as source:
                return trunk_without_weights(source)
        config = parse_config(self._content(), self.path)
        with build_limit(self.path), opening(self.path, "model", REPLACE_FILE):
            return trunk_on_meta(config)

    def _content(self, kind: str | None = None) -> dict[str, Any]:
        return read_export(self.path, kind)


def open_model_source(
    path: str, *, revision: str | None = None, attention: Attention | None = None, base: str | None = None
) -> Export | Pretrained:
    """Return a model source for a ``*_final.pt``, a checkpoint, a Hugging Face folder or a Hub ID.

    Args:
        path: Path or Hub ID.
        revision: Branch, tag or commit on the Hub.
        attention: ``attn_implementation`` of transformers; None: the default of the architecture.
        base: See ``Export``.
    """
    if path.endswith((".pt", ".ckpt")):
        if Path(path).is_dir():
            raise ConfigError(f"{path} is a directory, but a {Path(path).suffix} file is needed.", "Name a file in it.")
        if not Path(path).is_file():
            raise ConfigError(f"{path}: there is no such file.", "Make it first: python train.py stage=<stage>")
        return Export(path, attention, base)
    return Pretrained(path, revision, attention)
