"""The result of a stage as a Hugging Face folder, which opens without this project."""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf.errors import ConfigError
from rlhf.export.file import Export
from rlhf.models import ScalarModel, adapter_of
from rlhf.models.adapters import save_adapter, set_classifier_adapter
from rlhf.stage import Result

log = logging.getLogger(__name__)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
NO_FOLDER = "Only its *_final.pt is written, which load_model opens."


def save_huggingface(source: str, directory: str, *, merged: bool = False) -> None:
    """Write a model as a Hugging Face folder that opens without this project.

    ``transformers`` opens the folder of a complete model, and ``peft`` that of an adapter. A reward model becomes a
    sequence classifier with one label.

    Args:
        source: A ``*_final.pt``.
        directory: Directory to write to; it is created if necessary.
        merged: Write the complete model even if the file contains an adapter.

    Raises:
        ConfigError: It is a reward model that ``transformers`` has no sequence classifier for.
    """
    export = Export(source)
    tokenizer = export.tokenizer()
    model: Any
    generation_config: GenerationConfig | None = None
    if export.kind == "scalar_model":
        model = sequence_classifier(export.scalar_model(tokenizer, merge=merged), tokenizer)
    else:
        model = export.language_model(tokenizer, merge=merged)
        generation_config = model.generation_config
        model.generation_config = GenerationConfig()  # Saving rejects some settings that models are published with.
    for stale in (path for pattern in WEIGHT_FILES for path in Path(directory).glob(pattern)):
        stale.unlink()  # Otherwise an adapter and a complete model of an earlier run would be mixed.
    if (adapter := adapter_of(model)) is not None:
        save_adapter(model, adapter, Path(directory))
    else:
        model.save_pretrained(directory)
    if generation_config is not None:
        generation_config.to_json_file(str(Path(directory, "generation_config.json")), use_diff=True)
    tokenizer.save_pretrained(directory)


def check_huggingface(result: Result) -> None:
    """Raise a ``ConfigError`` if ``save_huggingface`` could not write a result."""
    if isinstance(result.model, ScalarModel):
        empty_classifier(result.model, result.tokenizer)


def sequence_classifier(model: ScalarModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a reward model as a sequence classifier of ``transformers`` with one label, which shares its weights.

    Its layer ``score`` has no bias: the score of the reward model is the logit plus ``config.score_offset``.
    """
    classifier = empty_classifier(model, tokenizer)
    layer: Any = model.head.layers[0]
    offset = layer.bias.item() - model.reward_mean.item()
    log.info("The score of the reward model is the logit of the folder %+.6g (score_offset in config.json).", offset)
    classifier.config.score_offset = offset
    setattr(classifier, classifier.base_model_prefix, model.trunk)
    classifier.score.weight = layer.weight
    if adapter_of(model) is not None:
        set_classifier_adapter(classifier)
    return classifier.eval()


def empty_classifier(model: ScalarModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a sequence classifier for the weights of a reward model, on the meta device.

    Raises:
        ConfigError: ``transformers`` has no classifier that computes the same scores.
    """
    settings = model.head.settings
    if settings["num_layers"] > 1 or settings["num_heads"] > 1:
        raise _not_a_classifier(
            f"stage.num_layers={settings['num_layers']} stage.num_heads={settings['num_heads']}, but a sequence "
            "classifier of transformers has one linear layer"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise _not_a_classifier(
            "transformers reads the score at the last token other than the padding token, and the tokenizer has no "
            "padding token that differs from EOS"
        )
    config: Any = deepcopy(model.config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        score = getattr(classifier, "score", None)
        shape = (1, settings["input_dim"])
        if isinstance(score, nn.Linear) and score.bias is None and score.weight.shape == shape:
            return classifier
    raise _not_a_classifier(f"transformers has no such classifier for model_type={config.model_type}")


def _not_a_classifier(reason: str) -> ConfigError:
    return ConfigError(f"The reward model cannot be written as a Hugging Face folder: {reason}.", NO_FOLDER)
