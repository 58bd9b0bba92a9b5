"""What transformers saved opens here with the same numbers, and what cannot be used says so."""

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

from rlhf.errors import UserError
from rlhf.models import Mamba, ModelSource, Pretrained, Transformer

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


def classes(name: str, count: int) -> object:
    """The configuration of a classifier with so many labels."""
    config = deepcopy(CONFIGS[name])
    config.num_labels = count
    return config


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_opens_with_identical_logits(
    name: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Weights, tokenizer and template are those that transformers wrote; bfloat16 weights are opened as float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name])).eval()
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).float()  # numbers that the file can hold
    with torch.no_grad():
        expected = model(input_ids=ROW).logits
    source = Pretrained(folder(tmp_path, model.to(dtype), tokenizer))

    opened_tokenizer = source.tokenizer()
    opened = source.language_model(opened_tokenizer).eval()

    assert {part.dtype for part in opened.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ROW).logits, expected)
    assert opened_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert opened_tokenizer.chat_template == tokenizer.chat_template


def test_every_copy_is_a_model_of_its_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Policy and reference opened from one folder share no memory."""
    source = Pretrained(folder(tmp_path, AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"])), tokenizer))
    one, other = source.language_model(tokenizer), source.language_model(tokenizer)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}


@pytest.mark.parametrize("method", ["tokenizer", "language_model", "scalar_model"])
def test_a_folder_that_is_not_there_is_a_user_error(
    method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """It names the path as typed and the override."""
    source = Pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"model\.path=.*nowhere.*\n  model\.path=<folder"):
        getattr(source, method)(*([] if method == "tokenizer" else [tokenizer]))


@pytest.mark.parametrize("method", ["tokenizer", "language_model", "scalar_model"])
def test_a_folder_without_a_model_is_a_user_error(
    method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no model here")
    with pytest.raises(UserError, match=r"model\.path="):
        getattr(Pretrained(str(tmp_path)), method)(*([] if method == "tokenizer" else [tokenizer]))


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No answer could ever end."""
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>")
    endless.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no EOS token.*\n.*eos_token"):
        Pretrained(str(tmp_path)).tokenizer()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_sequence_classifier_gives_the_score_transformers_gives(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """One label, one unpadded row: our score is transformers' logit, also with padding beside it."""
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(classes(name, 1)).eval()
    model = Pretrained(folder(tmp_path, classifier, tokenizer)).scalar_model(tokenizer).eval()
    with torch.no_grad():
        expected = classifier(input_ids=ROW).logits[:, 0]
        mask = torch.ones_like(ROW, dtype=torch.bool)
        torch.testing.assert_close(model(ROW, mask), expected)
        pad = torch.nn.functional.pad
        torch.testing.assert_close(model(pad(ROW, (2, 3)), pad(mask, (2, 3))), expected)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_language_model_is_no_reward_model(labels: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Its folder has no head, so one would be made up, whatever number of labels the config names."""
    lm = AutoModelForCausalLM.from_config(classes("llama", labels))
    source = Pretrained(folder(tmp_path, lm, tokenizer))
    with pytest.raises(UserError, match=r"holds no reward model: the score head is not in the folder: score\.weight"):
        source.scalar_model(tokenizer)


def test_a_folder_without_an_output_layer_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The body alone, of a model whose output embedding is its own: a made-up one would answer at random."""
    lm = AutoModelForCausalLM.from_config(classes("llama", 2))
    assert not lm.config.tie_word_embeddings
    body = {name: weight for name, weight in lm.state_dict().items() if not name.startswith("lm_head")}
    lm.save_pretrained(folder(tmp_path, lm, tokenizer), state_dict=body)
    with pytest.raises(UserError, match=r"weights of the language model are not in the folder: lm_head\.weight"):
        Pretrained(str(tmp_path)).language_model(tokenizer)


def test_a_fresh_model_knows_its_tokenizer(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> None:
    """The vocabulary is the tokenizer's, and so are the special tokens; input and output embedding are one."""
    lm = source.language_model(tokenizer)
    assert lm.get_input_embeddings().num_embeddings == len(tokenizer) == 300
    assert (lm.config.bos_token_id, lm.config.eos_token_id, lm.config.pad_token_id) == (1, 2, 0)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def test_a_fresh_model_opens_in_plain_transformers(
    source: ModelSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """No class of ours is needed to read what was saved."""
    lm = source.language_model(tokenizer).eval()
    lm.save_pretrained(tmp_path)
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(opened(input_ids=ROW).logits, lm(input_ids=ROW).logits)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Transformer(hidden_size=30, num_heads=4), r"model\.hidden_size=30 .*model\.num_heads=4"),
        (Mamba(hidden_size=30, head_dim=16), r"model\.hidden_size=30 .*model\.head_dim=16"),
    ],
)
def test_widths_that_do_not_divide_are_refused(
    source: ModelSource, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=message):
        source.language_model(tokenizer)
