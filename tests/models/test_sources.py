"""Model sources: saved models are opened with identical outputs, and incomplete ones are rejected."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.errors import ConfigError, DataError
from rlhf.models import Mamba, ModelSource, Pretrained, Transformer
from rlhf.sft import SFTModule

ROW = torch.tensor([[5, 260, 17, 3, 99, 41, 8]])
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, **SPECIAL),
    "llama": LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **SPECIAL,
    ),
    "mamba2": Mamba2Config(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=4,
        **SPECIAL,
    ),
}


def folder(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def classifier_config(name: str, count: int) -> object:
    """The configuration of a classifier with ``count`` labels."""
    config = deepcopy(CONFIGS[name])
    config.num_labels = count
    return config


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_opened_with_identical_logits(
    name: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Weights, tokenizer and chat template equal those that were saved. bfloat16 weights are opened in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name])).eval()
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).float()  # values that the file can represent
    with torch.no_grad():
        expected = model(input_ids=ROW).logits
    source = Pretrained(folder(tmp_path, model.to(dtype), tokenizer))

    opened_tokenizer = source.tokenizer()
    opened = source.language_model(opened_tokenizer).eval()

    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ROW).logits, expected)
    assert opened_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert opened_tokenizer.chat_template == tokenizer.chat_template


def test_every_copy_is_a_separate_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A policy and a reference model from the same directory share no memory."""
    source = Pretrained(folder(tmp_path, AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"])), tokenizer))
    one, other = source.language_model(tokenizer), source.language_model(tokenizer)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}


@pytest.mark.parametrize("method", ["tokenizer", "language_model", "scalar_model"])
def test_a_missing_directory_is_a_data_error(method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The message contains the path and says what to use."""
    source = Pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere: could not load a .* from this path .*\n  Use a directory"):
        getattr(source, method)(*([] if method == "tokenizer" else [tokenizer]))


@pytest.mark.parametrize("method", ["tokenizer", "language_model", "scalar_model"])
def test_a_directory_without_a_model_is_a_data_error(
    method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no model here")
    with pytest.raises(DataError, match=r"could not load a "):
        getattr(Pretrained(str(tmp_path)), method)(*([] if method == "tokenizer" else [tokenizer]))


def test_a_tokenizer_without_eos_is_rejected(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Without an EOS token, a response could not end."""
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>")
    endless.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"])).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"no EOS token.*\n.*eos_token"):
        Pretrained(str(tmp_path)).tokenizer()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_sequence_classifier_has_the_same_scores_as_in_transformers(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The score equals the logit of the only label, with and without padding."""
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(classifier_config(name, 1)).eval()
    model = Pretrained(folder(tmp_path, classifier, tokenizer)).scalar_model(tokenizer).eval()
    with torch.no_grad():
        expected = classifier(input_ids=ROW).logits[:, 0]
        mask = torch.ones_like(ROW, dtype=torch.bool)
        torch.testing.assert_close(model(ROW, mask), expected)
        pad = torch.nn.functional.pad
        torch.testing.assert_close(model(pad(ROW, (2, 3)), pad(mask, (2, 3))), expected)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_language_model_is_rejected_as_a_reward_model(
    labels: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its directory contains no score layer, and transformers would initialize one at random."""
    lm = AutoModelForCausalLM.from_config(classifier_config("llama", labels))
    source = Pretrained(folder(tmp_path, lm, tokenizer))
    with pytest.raises(DataError, match=r"weights of the reward model are missing: score\.weight\.\n.*one label"):
        source.scalar_model(tokenizer)


def test_a_language_model_without_output_layer_is_rejected(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The output layer is not tied to the embedding, and transformers would initialize it at random."""
    lm = AutoModelForCausalLM.from_config(classifier_config("llama", 2))
    assert not lm.config.tie_word_embeddings
    trunk = {name: weight for name, weight in lm.state_dict().items() if not name.startswith("lm_head")}
    lm.save_pretrained(folder(tmp_path, lm, tokenizer), state_dict=trunk)
    with pytest.raises(DataError, match=r"weights of the language model are missing: lm_head\.weight\."):
        Pretrained(str(tmp_path)).language_model(tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_reward_model_with_another_vocabulary_is_rejected(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """It would misinterpret the token ids of the policy, without any error if its vocabulary is large enough."""
    classifier = AutoModelForSequenceClassification.from_config(classifier_config(name, 1))
    other = Transformer(vocab_size=290).tokenizer(["an entirely different text"])
    source = Pretrained(folder(tmp_path, classifier, other))
    with pytest.raises(
        DataError, match=r"the tokenizer of the reward model .* differs from that of the policy \(300 tokens"
    ):
        source.scalar_model(tokenizer)
    assert source.scalar_model(other)


def test_every_model_has_the_configured_attention(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """``model.attention`` applies to language models and to reward models."""
    config = classifier_config("llama", 1)
    language_model = folder(tmp_path / "lm", AutoModelForCausalLM.from_config(config), tokenizer)
    classifier = folder(tmp_path / "rm", AutoModelForSequenceClassification.from_config(config), tokenizer)
    for attention in ("eager", "sdpa"):
        lm = Pretrained(language_model, attention=attention).language_model(tokenizer)
        reward_model = Pretrained(classifier, attention=attention).scalar_model(tokenizer)
        assert [model.config._attn_implementation for model in (lm, reward_model)] == [attention, attention]


@pytest.mark.parametrize("kind", ["language_model", "scalar_model"])
def test_a_tokenizer_with_more_tokens_than_embeddings_is_rejected(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The first sequence with a higher token id would be an index error. The message contains the fix."""
    config = classifier_config("llama", 1)
    config.vocab_size = 299
    auto_class = AutoModelForCausalLM if kind == "language_model" else AutoModelForSequenceClassification
    source = Pretrained(folder(tmp_path, auto_class.from_config(config), tokenizer))
    with pytest.raises(DataError, match=r"ids up to 299, but the model has 299 .*\n.*resize_token_embeddings\(300\)"):
        getattr(source, kind)(tokenizer)


def test_a_padded_embedding_is_accepted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Published models often have more embeddings than their tokenizer has tokens."""
    config = classifier_config("llama", 1)
    config.vocab_size = 320
    lm = Pretrained(folder(tmp_path, AutoModelForCausalLM.from_config(config), tokenizer)).language_model(tokenizer)
    assert lm.get_input_embeddings().num_embeddings == 320


def test_a_stage_opens_a_pretrained_model_under_a_device_context(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Lightning opens models in the device context of the strategy, where transformers would require accelerate."""
    lm = AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"]))
    module = SFTModule(policy=Pretrained(folder(tmp_path, lm, tokenizer)), tokenizer=tokenizer)
    with torch.device("meta"):
        module.configure_model()
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert torch.equal(module.policy.lm.get_input_embeddings().weight, lm.get_input_embeddings().weight)


def test_a_new_model_matches_its_tokenizer(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> None:
    """It has the vocabulary size and the special tokens of the tokenizer. Input and output embedding are tied."""
    lm = source.language_model(tokenizer)
    assert lm.get_input_embeddings().num_embeddings == len(tokenizer) == 300
    assert (lm.config.bos_token_id, lm.config.eos_token_id, lm.config.pad_token_id) == (1, 2, 0)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def test_a_new_model_can_be_opened_with_transformers(
    source: ModelSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A saved model can be opened without this project."""
    lm = source.language_model(tokenizer).eval()
    lm.save_pretrained(tmp_path)
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(opened(input_ids=ROW).logits, lm(input_ids=ROW).logits)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            Transformer(hidden_size=30, num_heads=4),
            r"^hidden_size must be a multiple of num_heads \(4\), got 30\.\n  Set model\.hidden_size=32\.",
        ),
        (
            Mamba(hidden_size=30, head_dim=16),
            r"^2 \* hidden_size must be a multiple of head_dim \(16\), got 2 \* 30\.\n  Set model\.hidden_size=32\.",
        ),
    ],
)
def test_widths_that_do_not_match_are_rejected(
    source: ModelSource, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=message):
        source.language_model(tokenizer)


def test_random_weights_cannot_be_used_as_a_reward_model(
    source: ModelSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=r"has random weights .*\n  Set stage\.reward_model=<path>"):
        source.scalar_model(tokenizer)


def test_a_tokenizer_cannot_be_trained_without_texts(source: ModelSource) -> None:
    with pytest.raises(ConfigError, match="no tokenizer until one has been trained"):
        source.tokenizer(())
