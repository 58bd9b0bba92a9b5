"""Exports reload exactly, in a new process, and only if they are complete."""

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from contract.configs import compose_config
from forked import run_python
from harness import TINY_DATA, TinyRun, one_architecture
from rlhf import load_model
from rlhf.artifacts import open_sources, policies_to_evaluate
from rlhf.errors import ConfigError, DataError, UserError
from rlhf.export import open_model_source, save_result
from rlhf.export.huggingface import check_huggingface, save_huggingface
from rlhf.models import ModelSource, Pretrained, ScalarHead, ScalarModel, chat_template, disable_dropout
from rlhf.run import run_stage
from rlhf.stage import Result
from rlhf.stages import stages

TEXT = "<bos>It rains.\nSummary: May<eos>"
DECODER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
# Architectures with a sequence classifier, without special tokens in the configuration.
CLASSIFIERS = {
    "gpt2": GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2),
    "llama": LlamaConfig(vocab_size=300, **DECODER),
    "mistral": MistralConfig(vocab_size=300, num_key_value_heads=1, tie_word_embeddings=True, **DECODER),
}
MESSAGES = [{"role": "user", "content": "It rains."}]


@pytest.fixture
def reward_model(lm: PreTrainedModel) -> ScalarModel:
    """A scalar model with a head of two layers and a stored mean."""
    torch.manual_seed(1)
    return ScalarModel(deepcopy(lm.base_model), ScalarHead(32, hidden_dim=7, num_layers=2), reward_mean=0.25).eval()


def save(model: Any, tokenizer: PreTrainedTokenizerFast, outputs: Path, stage: str = "sft") -> Path:
    path = outputs / "rlhf" / stage / str(stages()[stage].final)
    save_result(Result(model, tokenizer), path, {"stage": stage, "inputs": {}})
    return path


@torch.no_grad()
def logits(model: Any, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return model(ids).logits


@torch.no_grad()
def scores(model: ScalarModel, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return model(ids, torch.ones_like(ids, dtype=torch.bool))


def rewrite(path: Path, change: Any) -> None:
    """Change the content of an export as a program outside this project would."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_an_export_contains_no_code(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """It loads with weights_only=True. Weights are tensors, everything else is text and numbers, provenance is JSON."""
    path = save(lm, tokenizer, tmp_path)
    content = torch.load(path, weights_only=True)
    assert json.loads(content["provenance"]) == {"stage": "sft", "inputs": {}}
    assert content["weights"].keys() == lm.state_dict().keys()
    assert all(isinstance(weight, torch.Tensor) for weight in content["weights"].values())
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_a_policy_reloads_with_its_tokenizer(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Logits, vocabulary and chat template are equal; the model is in eval mode on the requested device."""
    save(lm, tokenizer, tmp_path)
    model, opened, device = load_model("sft", device="cpu", outputs=str(tmp_path))
    assert torch.equal(logits(model, opened), logits(lm, tokenizer))
    assert opened.get_vocab() == tokenizer.get_vocab()
    special = ("bos_token", "eos_token", "pad_token", "chat_template")
    assert [getattr(opened, name) for name in special] == [getattr(tokenizer, name) for name in special]
    assert (device, model.training) == (torch.device("cpu"), False)


def test_a_reward_model_reloads_with_its_scores(
    reward_model: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Head, hidden layer and stored mean are restored: scores are equal, and 0.25 below those without the mean."""
    save(reward_model, tokenizer, tmp_path, "reward")
    model, opened, _ = load_model("reward", device="cpu", outputs=str(tmp_path))
    assert torch.equal(scores(model, opened), scores(reward_model, tokenizer))
    reward_model.reward_mean.zero_()
    torch.testing.assert_close(scores(model, opened), scores(reward_model, tokenizer) - 0.25)


@pytest.fixture
def four_heads(lm: PreTrainedModel) -> ScalarModel:
    """A scalar model with four heads of two layers, each with its own stored mean."""
    torch.manual_seed(1)
    model = ScalarModel(deepcopy(lm.base_model), ScalarHead(32, hidden_dim=7, num_layers=2, num_heads=4)).eval()
    model.reward_mean.copy_(torch.tensor([0.25, -1.0, 2.0, 0.5]))
    return model


def test_several_heads_reload(four_heads: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Every head and every mean is restored: the scores of each head are equal bit for bit."""
    path = save(four_heads, tokenizer, tmp_path, "reward")
    model = open_model_source(str(path)).scalar_model(tokenizer).eval()
    ids = torch.arange(20, 29)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert model.scores(ids, mask).shape == (1, 4)
    assert torch.equal(model.scores(ids, mask), four_heads.scores(ids, mask))
    assert model.reward_mean.tolist() == [0.25, -1.0, 2.0, 0.5]


def test_a_file_without_a_number_of_heads_opens(
    reward_model: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A file whose head settings have no num_heads has one head, with the same parameter names and a scalar mean."""
    path = save(reward_model, tokenizer, tmp_path, "reward")
    rewrite(path, lambda content: content["head"].pop("num_heads"))
    content = torch.load(path, weights_only=True)
    assert content["head"] == {"input_dim": 32, "hidden_dim": 7, "num_layers": 2}
    assert {name for name in content["weights"] if not name.startswith("trunk.")} == {
        "reward_mean",
        "head.layers.0.weight",
        "head.layers.0.bias",
        "head.layers.2.weight",
        "head.layers.2.bias",
    }
    assert content["weights"]["reward_mean"].shape == ()
    model, opened, _ = load_model(str(path), device="cpu")
    assert torch.equal(scores(model, opened), scores(reward_model, tokenizer))


def remove_weights(path: Path, start: str) -> None:
    """Remove the weights whose names start with a prefix from a file."""

    def change(content: dict[str, Any]) -> None:
        kept = {name: weight for name, weight in content["weights"].items() if not name.startswith(start)}
        assert 0 < len(kept) < len(content["weights"])
        content["weights"] = kept

    rewrite(path, change)


@one_architecture
@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("head.layers.2.weight", r"the reward head is missing from the file: head\.layers\.2\.weight\."),
        ("head.", r"the reward head is missing from the file: head\.layers\.0\.bias, head\.layers\.0\.weight, head"),
        ("head.others.2", r"the reward head is missing from the file: head\.others\.2\.0\.bias"),
        ("reward_mean", r"these weights are missing from the file: reward_mean\."),
        ("trunk.", r"these weights are missing from the file: trunk\..* and \d+ more"),
    ],
)
def test_missing_weights_are_rejected(
    four_heads: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, lost: str, message: str
) -> None:
    """A missing head is never initialized at random (trl#1379): the error names the file and the missing weights."""
    path = save(four_heads, tokenizer, tmp_path, "reward")
    remove_weights(path, lost)
    with pytest.raises(UserError, match=rf"reward_model_final\.pt: {message}"):
        load_model(str(path))


@one_architecture
def test_a_policy_with_a_missing_weight_is_rejected(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = save(lm, tokenizer, tmp_path)
    name = next(name for name in lm.state_dict() if "norm" in name)
    remove_weights(path, name)
    with pytest.raises(UserError, match=rf"sft_final\.pt: these weights are missing from the file: {name}"):
        load_model("sft", outputs=str(tmp_path))


@one_architecture
def test_weights_of_a_wrong_shape_are_rejected(
    reward_model: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A head of a different width, and a weight that belongs to no layer."""
    path = save(reward_model, tokenizer, tmp_path, "reward")
    rewrite(path, lambda content: content["weights"].update({"head.layers.2.weight": torch.zeros(1, 8)}))
    with pytest.raises(UserError, match=r"do not fit the model configuration: head\.layers\.2\.weight"):
        load_model(str(path))
    path = save(reward_model, tokenizer, tmp_path, "reward")
    rewrite(path, lambda content: content["weights"].update({"head.layers.9.weight": torch.zeros(1, 7)}))
    with pytest.raises(UserError, match=r"do not fit the model configuration: head\.layers\.9\.weight"):
        load_model(str(path))


@one_architecture
def test_a_policy_cannot_be_opened_as_a_reward_model(
    lm: PreTrainedModel, reward_model: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Opening one kind as the other raises an error that names both."""
    policy, reward = save(lm, tokenizer, tmp_path), save(reward_model, tokenizer, tmp_path, "reward")
    with pytest.raises(UserError, match="contains a language model, but a reward model is needed"):
        open_model_source(str(policy)).scalar_model(tokenizer)
    with pytest.raises(UserError, match="contains a reward model, but a language model is needed"):
        open_model_source(str(reward)).language_model(tokenizer)


def test_a_reward_model_with_another_tokenizer_is_rejected(
    reward_model: ScalarModel, tokenizer: PreTrainedTokenizerFast, source: ModelSource, tmp_path: Path
) -> None:
    """It would misinterpret the token ids of the policy."""
    path = save(reward_model, tokenizer, tmp_path, "reward")
    other = source.tokenizer(["an entirely different text"])
    with pytest.raises(UserError, match=r"the tokenizer of the reward model .* differs from that of the policy"):
        open_model_source(str(path)).scalar_model(other)


def test_a_reward_model_with_another_chat_template_is_reported_once(
    reward_model: ScalarModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PPO opens it twice: as the reward model, and as the critic."""
    export = open_model_source(str(save(reward_model, tokenizer, tmp_path, "reward")))
    tokenizer.chat_template = chat_template("{prompt}\nTL;DR:")
    for _ in range(2):
        export.scalar_model(tokenizer)
    (message,) = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
    assert r"trained on '<bos>How tall is the bridge?\nSummary: Thirty meters.<eos>', but" in message
    assert r"writes '<bos>How tall is the bridge?\nTL;DR: Thirty meters.<eos>'. Train" in message
    assert "data.template" in message


def test_chat_templates_that_write_the_same_text_are_not_reported(
    reward_model: ScalarModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    export = open_model_source(str(save(reward_model, tokenizer, tmp_path, "reward")))
    tokenizer.chat_template += "{# a comment, and white space after EOS #}\n\n"
    export.scalar_model(tokenizer)
    assert not [record for record in caplog.records if "chat template" in record.getMessage()]


# What a pretrained model brings


@pytest.fixture
def pretrained(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Pretrained:
    """A model with dropout, and with the generation settings of an instruct model."""
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, attention_dropout=0.1, **tiny))
    lm.generation_config = GenerationConfig(eos_token_id=[2, 5], do_sample=True, temperature=0.6, top_p=0.9)
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return Pretrained(str(tmp_path / "base"))


def test_settings_of_a_pretrained_model_survive_two_stages(
    pretrained: Pretrained, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Dropout, which training turns off, all EOS tokens and the sampling settings are those of the first model."""
    source: Any = pretrained
    for stage in ("sft", "dpo"):
        path = save(disable_dropout(source.language_model(tokenizer)), tokenizer, tmp_path, stage)
        source = open_model_source(str(path))
    assert source.language_model(tokenizer).config.attention_dropout == 0.1
    save_huggingface(str(path), str(tmp_path / "hf"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = AutoModelForCausalLM.from_pretrained(pretrained.path)
    assert opened.generation_config.eos_token_id == [2, 5]
    assert opened.generation_config.to_diff_dict() == expected.generation_config.to_diff_dict()
    assert opened.config.attention_dropout == expected.config.attention_dropout == 0.1


def test_a_reward_model_keeps_the_dropout_of_its_base(
    pretrained: Pretrained, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lm = disable_dropout(pretrained.language_model(tokenizer))
    path = save(ScalarModel(lm.base_model, ScalarHead(16)), tokenizer, tmp_path, "reward")
    assert open_model_source(str(path)).scalar_model(tokenizer).config.attention_dropout == 0.1


def test_generation_settings_that_transformers_refuses_to_save_do_not_stop_an_export(
    pretrained: Pretrained, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Published models have a temperature without do_sample. The folder contains what the model came with."""
    lm = pretrained.language_model(tokenizer)
    lm.generation_config.do_sample = False
    with pytest.raises(ValueError, match="temperature"):
        lm.save_pretrained(tmp_path / "refused")
    save_huggingface(str(save(lm, tokenizer, tmp_path)), str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["temperature"] == 0.6


def test_every_stage_opens_models_with_the_configured_attention(
    pretrained: Pretrained, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """``model.attention`` also applies to the output of an earlier stage, to folders and in the evaluation."""
    path = str(save(pretrained.language_model(tokenizer), tokenizer, tmp_path))
    cfg = compose_config("stage=dpo", "model=pretrained", f"model.path={pretrained.path}", "model.attention=eager")
    for chosen in (path, pretrained.path):
        source: Any = open_sources(cfg, chosen)
        assert source.language_model(tokenizer).config._attn_implementation == "eager"
    evaluation = ["stage=evaluate", "model=pretrained", "model.path=x", "model.attention=eager"]
    (source,) = policies_to_evaluate(compose_config(*evaluation, f"stage.models=[{path}]")).values()
    assert source.attention == "eager"


def test_a_hugging_face_folder_opens_in_transformers(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Logits are identical and the chat template is kept. load_model opens the folder by its path."""
    path, folder = save(lm, tokenizer, tmp_path), tmp_path / "hf"
    save_huggingface(str(path), str(folder))
    plain, opened = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(logits(plain, opened), logits(lm, tokenizer))
    assert opened.chat_template == tokenizer.chat_template
    prompt = opened.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert prompt == "<bos>It rains.\nSummary:"
    model, opened, _ = load_model(str(folder), device="cpu")
    assert torch.equal(logits(model, opened), logits(lm, tokenizer))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_a_reward_model_opens_as_a_sequence_classifier(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Plain transformers gives the scores of ``load_model`` in a padded batch, minus ``score_offset``.

    offset = bias - mean = 0.5 - 0.25 = 0.25. This project opens the folder as a reward model as well.
    """
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CLASSIFIERS[name])
    head = ScalarHead(16)
    torch.nn.init.constant_(head.layers[0].bias, 0.5)
    path = save(ScalarModel(lm.base_model, head, reward_mean=0.25), tokenizer, tmp_path, "reward")
    save_huggingface(str(path), str(tmp_path / "hf"))

    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "hf")([TEXT, TEXT * 2, "May"], padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    assert mask.sum(dim=1).unique().numel() == 3
    with torch.no_grad():
        logits = classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = load_model(str(path), device="cpu")[0](batch["input_ids"], mask)
        reopened = Pretrained(str(tmp_path / "hf")).scalar_model(tokenizer).eval()(batch["input_ids"], mask)
    assert logits.shape == (3, 1)
    assert classifier.config.score_offset == 0.25
    torch.testing.assert_close(logits[:, 0] + 0.25, expected)
    torch.testing.assert_close(reopened + 0.25, expected)


@one_architecture
@pytest.mark.parametrize("head", [{"num_layers": 2}, {"num_heads": 3}])
def test_a_head_that_transformers_does_not_have_is_no_folder(
    head: dict[str, int], lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (setting,) = (f"stage.{name}={value}" for name, value in head.items())
    with pytest.raises(ConfigError, match=rf"^The reward model cannot be written .*{setting}.* one linear layer\.\n"):
        check_huggingface(Result(ScalarModel(lm.base_model, ScalarHead(32, **head)), tokenizer))


def test_a_reward_model_that_cannot_be_a_folder_is_reported_before_training(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is trained all the same: in a pipeline, the folders of the policies are needed as well."""
    policy = save(lm, tokenizer, tmp_path / "base")
    tiny = [*TINY_DATA[:1], "data.max_rows=8", "data.max_length=32", "trainer.max_steps=1", f"paths.root={tmp_path}"]
    run_stage(compose_config("stage=reward", f"stage.policy={policy}", "stage.num_heads=2", "save_hf=true", *tiny))
    warnings = [record.message for record in caplog.records if record.message.startswith("The reward model cannot be")]
    assert len(warnings) == 2, "before training and at its end"
    assert "stage.num_heads=2" in warnings[0]
    assert (tmp_path / "rlhf" / "reward" / "reward_model_final.pt").is_file()
    assert not (tmp_path / "rlhf" / "reward" / "hf").exists()


def test_a_reward_model_of_an_architecture_without_classifier_is_no_folder(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, architecture: str
) -> None:
    """Llama has one, and Mamba-2 does not. A policy is always written."""
    result = Result(ScalarModel(lm.base_model, ScalarHead(32)), tokenizer)
    if architecture == "mamba":
        with pytest.raises(ConfigError, match=r"transformers has no such classifier for model_type=mamba2\.\n"):
            check_huggingface(result)
    else:
        check_huggingface(result)
    check_huggingface(Result(lm, tokenizer))


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_the_padding_token_of_a_classifier_differs_from_eos(
    pad: str | None, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """transformers would read the score before EOS, or refuse batches."""
    other = deepcopy(tokenizer)
    other.pad_token = pad
    with pytest.raises(ConfigError, match=r"no padding token that differs from EOS\.\n  Only its "):
        check_huggingface(Result(ScalarModel(lm.base_model, ScalarHead(32)), other))


@one_architecture
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign"])
def test_a_broken_file_is_named(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, damage: str
) -> None:
    """The error names a file that is truncated, empty, not an archive, or an archive of something else."""
    path = save(lm, tokenizer, tmp_path)
    whole = path.read_bytes()
    if damage == "foreign":
        torch.save({"weights": {}}, path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(UserError, match=rf"{path.name}: not a valid rlhf export"):
        load_model(str(path))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    """A pickle that would write a file when it is loaded is rejected, and writes nothing."""

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": 1, "bomb": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"bomb\.pt"):
        load_model(str(tmp_path / "bomb.pt"))
    assert not (tmp_path / "ran").exists()


@one_architecture
@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "../../tokenizer.json",
        "/absolute/tokenizer.json",
        "a/b",
        "a/tokenizer.json",
        "a/b.model",
        "a\\b.model",
        "C:b.model",
        "..",
        "",
        ".model",
        "tokenization_mine.py",
        "tokenizer.json\n",
        "tokenizer.model\n",
        "tokenizer.model.py",
        "config.json",
        7,
    ],
)
def test_a_tokenizer_file_with_an_unsafe_name_is_rejected(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    """Such a file could otherwise be written anywhere on the disk. Valid files are not written, either."""
    path = save(lm, tokenizer, tmp_path)
    if isinstance(name, str) and name.startswith("/"):
        name = str(tmp_path / "absolute" / "tokenizer.json")
        Path(name).parent.mkdir()
    rewrite(path, lambda content: content["tokenizer"].update({name: "changed"}))
    temporary = tmp_path / "a" / "b"  # '../../x' would be written to the directory of the export
    temporary.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=r"sft_final\.pt: the tokenizer contains a file named ") as error:
        open_model_source(str(path)).tokenizer()
    assert repr(name) in str(error.value)
    assert "Only plain names of tokenizer files" in str(error.value)
    assert "run the stage again: python train.py stage=" in str(error.value)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@one_architecture
def test_every_file_of_a_tokenizer_is_restored(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The files that ``save_pretrained`` writes for the opened tokenizer are those of the original.

    All of them are equal byte for byte, except for ``tokenizer_config.json``, to which ``transformers``
    adds where a tokenizer was opened.
    """
    path, folders = save(lm, tokenizer, tmp_path), (tmp_path / "before", tmp_path / "after")
    tokenizer.save_pretrained(folders[0])
    open_model_source(str(path)).tokenizer().save_pretrained(folders[1])
    files, opened = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files.keys()
    assert torch.load(path, weights_only=True)["tokenizer"].keys() == files.keys() == opened.keys()
    assert {name for name in files if files[name] != opened[name]} <= {"tokenizer_config.json"}


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "bpe.codes",
        "normalizer.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "spm_char.model",
        "source.spm",
    ],
)
def test_the_names_that_transformers_writes_are_allowed(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Text and bytes under every usual name reach the directory that the tokenizer is opened from unchanged."""
    path = save(lm, tokenizer, tmp_path)
    for stored, data in (("text", b"text"), (torch.tensor([255, 0, 10], dtype=torch.uint8), b"\xff\x00\n")):
        rewrite(path, lambda content, stored=stored: content.update({"tokenizer": {name: stored}}))
        seen: dict[str, bytes] = {}

        def record(folder: str, seen: dict[str, bytes] = seen, **options: Any) -> None:
            seen.update({file.name: file.read_bytes() for file in Path(folder).iterdir()})

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", record)
        monkeypatch.setattr("rlhf.tokenizer.files.check_tokenizer", lambda tokenizer, origin: None)
        open_model_source(str(path)).tokenizer()
        assert seen == {name: data}


@one_architecture
def test_a_failed_write_keeps_the_existing_file(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up halfway through: the previous file is unchanged."""
    path = save(lm, tokenizer, tmp_path)
    old = path.read_bytes()

    def fill_the_disk(content: Any, file: Any) -> None:
        file.write(b"incomplete")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        save(lm, tokenizer, tmp_path)
    assert path.read_bytes() == old


def test_load_model_opens_results_stages_variants_and_paths(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Each of four files has its own weights. A variant has its own directory, and the file name of its stage."""
    names = {
        "rl_trained": "rlhf/final_rl_model.pt",
        "grpo": "rlhf/grpo/grpo_final.pt",
        "rloo": "rlhf/rloo/grpo_final.pt",
        f"{tmp_path}/elsewhere.pt": "elsewhere.pt",
    }
    embedding = lm.get_input_embeddings().weight
    for number, path in enumerate(names.values()):
        with torch.no_grad():
            embedding[5, 0] = number
        save_result(Result(lm, tokenizer), tmp_path / path, {})
    for number, name in enumerate(names):
        model, _, _ = load_model(name, device="cpu", outputs=str(tmp_path))
        assert model.get_input_embeddings().weight[5, 0] == number
    with pytest.raises(ConfigError, match=r"Models of run=rlhf: grpo, rloo\.\n"):
        load_model("dpo", outputs=str(tmp_path))


def test_a_missing_model_names_the_command(tmp_path: Path) -> None:
    """For a stage that has not run, the error contains the command; for an unknown name, the models that exist."""
    outputs = str(tmp_path)
    with pytest.raises(UserError, match=r"python train\.py .*run=qwen"):
        load_model("rl_trained", run="qwen", outputs=outputs)
    with pytest.raises(UserError, match=r"load_model\('sfft'\): .* Models of run=rlhf: none") as raised:
        load_model("sfft", outputs=outputs)
    assert str(raised.value).endswith(f"python train.py run=rlhf paths.root={outputs}")
    with pytest.raises(
        UserError, match=r"nothing\.pt: there is no such file\.\n  Make it first: python train\.py stage="
    ):
        open_model_source(str(tmp_path / "nothing.pt"))


IN_A_NEW_PROCESS = """
import sys, torch
from rlhf import load_model
outputs, ids = sys.argv[1], torch.load(sys.argv[2])
policy, reward = (load_model(name, device="cpu", outputs=outputs)[0] for name in ("sft", "reward"))
with torch.no_grad():
    torch.save([policy(ids).logits, reward(ids, torch.ones_like(ids, dtype=torch.bool))], sys.argv[3])
"""


def test_a_new_process_computes_the_same(
    lm: PreTrainedModel, reward_model: ScalarModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, repo: Path
) -> None:
    """Logits and scores are bit-for-bit equal: the files contain everything that they depend on."""
    save(lm, tokenizer, tmp_path)
    save(reward_model, tokenizer, tmp_path, "reward")
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    torch.save(ids, tmp_path / "ids")
    files = [str(tmp_path), str(tmp_path / "ids"), str(tmp_path / "outputs")]
    done = run_python(["-c", IN_A_NEW_PROCESS, *files], repo)
    assert done.returncode == 0, done.stderr
    got_logits, got_scores = torch.load(tmp_path / "outputs")
    assert torch.equal(got_logits, logits(lm, tokenizer))
    assert torch.equal(got_scores, scores(reward_model, tokenizer))


def test_a_checkpoint_without_a_description_of_its_model_is_explained(tiny_run: TinyRun, tmp_path: Path) -> None:
    """A plain Trainer has written it."""
    tiny_run.train("sft").trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(DataError, match=r"plain\.ckpt: a Lightning checkpoint that does not describe its model\."):
        open_model_source(str(tmp_path / "plain.ckpt")).tokenizer(())
