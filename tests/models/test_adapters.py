"""Adapters (LoRA): what is trained, what models share, what files contain, and how training continues."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from contract.configs import compose_config
from harness import EXACT, TINY_DATA, Run, TinyRun, assert_same_weights, one_architecture, tiny_reward_model
from rlhf import load_model
from rlhf.artifacts import with_adapter
from rlhf.callbacks import ExportHeader
from rlhf.checkpoint import RunCheckpoint
from rlhf.config import check_choices
from rlhf.errors import ConfigError, DataError
from rlhf.export import Export, open_model_source, save_result
from rlhf.export.huggingface import save_huggingface
from rlhf.models import (
    Adapter,
    Frozen,
    LoRA,
    Policy,
    Pretrained,
    ScalarHead,
    ScalarModel,
    SharedBase,
    Transformer,
    WithAdapter,
    adapter_of,
    base_weights,
    cast_frozen_matrices,
    enable_gradient_checkpointing,
    open_reference,
    starting_point,
    stored_weights,
)
from rlhf.models.adapters import BaseModel, add_adapter
from rlhf.preflight.checks import check_frozen_models
from rlhf.run import run_stage
from rlhf.stage import Result

ROW = torch.tensor([[5, 260, 17, 3, 99, 41, 8]])
MASK = torch.ones_like(ROW, dtype=torch.bool)
SMALL = LoRA(r=2, alpha=4)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
MAMBA = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}
EXPERTS = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
# A configuration, and the linear layers of a block that get an adapter.
ARCHITECTURES = {
    "gpt2": (
        GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, **SPECIAL),
        "c_attn c_fc c_proj",
    ),
    "llama": (
        LlamaConfig(vocab_size=300, num_hidden_layers=2, **LLAMA, **SPECIAL),
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    ),
    "mamba2": (Mamba2Config(vocab_size=300, num_hidden_layers=2, **MAMBA, **SPECIAL), "in_proj"),
    # peft adapts each of the two parameters of the fused experts by a layer: ``experts``, and its ``base_layer``.
    "qwen3_moe": (
        Qwen3MoeConfig(vocab_size=300, num_hidden_layers=2, **LLAMA, **EXPERTS, **SPECIAL),
        "q_proj k_proj v_proj o_proj gate experts base_layer",
    ),
}


@pytest.fixture(params=ARCHITECTURES)
def family(request: pytest.FixtureRequest) -> str:
    """The architecture of ``folder``."""
    return request.param


@pytest.fixture
def folder(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A Hugging Face folder with a tiny pretrained model."""
    torch.manual_seed(0)
    path = tmp_path / "base"
    AutoModelForCausalLM.from_config(deepcopy(ARCHITECTURES[family][0])).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def base(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Export:
    """A base model in an output of this project."""
    save_result(Result(lm, tokenizer), tmp_path / "base_final.pt", {})
    return Export(str(tmp_path / "base_final.pt"))


@pytest.fixture
def reward_base(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Export:
    """A complete reward model in an output of this project."""
    save_result(Result(tiny_reward_model(lm), tokenizer), tmp_path / "reward_base.pt", {})
    return Export(str(tmp_path / "reward_base.pt"))


@torch.no_grad()
def train_a_little(model: nn.Module) -> None:
    """Change every trainable parameter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=ROW).logits


def adapter_file(
    source: Any, tokenizer: PreTrainedTokenizerFast, path: Path, lora: LoRA = SMALL
) -> tuple[Export, PreTrainedModel]:
    """Write the output of a stage that has trained an adapter, and return it with the trained model."""
    lm = WithAdapter(source, lora).language_model(tokenizer)
    train_a_little(lm)
    save_result(Result(lm, tokenizer), path, {})
    return Export(str(path)), lm


def addresses(model: nn.Module, *, frozen: bool) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad != frozen}


# What an adapter is


def test_a_new_adapter_leaves_the_model_as_it_is(family: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Logits are equal to the last bit. Every linear layer but the output embedding has an adapter; it alone trains."""
    plain = Pretrained(str(folder)).language_model(tokenizer)
    lm = WithAdapter(Pretrained(str(folder)), SMALL).language_model(tokenizer)
    assert torch.equal(logits(lm), logits(plain))
    trained = [name for name, parameter in lm.named_parameters() if parameter.requires_grad]
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained} == set(ARCHITECTURES[family][1].split())


def test_a_merged_adapter_computes_what_the_adapter_computes(
    folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Opening the file merges it, to rounding. Without the adapter, the logits are those of the base, bit by bit."""
    export, trained = adapter_file(Pretrained(str(folder)), tokenizer, tmp_path / "sft_final.pt")
    plain = Pretrained(str(folder)).language_model(tokenizer)
    merged = export.language_model(tokenizer)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not torch.allclose(logits(trained), logits(plain), atol=1e-3), "the adapter must matter"
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(export.language_model(tokenizer, merge=False)), logits(trained))
    for layer in trained.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(False)
    assert torch.equal(logits(trained), logits(plain))


def test_the_merged_weight_is_w_plus_alpha_over_r_times_b_a(base: Export, tokenizer: PreTrainedTokenizerFast) -> None:
    lora = LoRA(r=2, alpha=8, target_modules=["q_proj"] if "llama" in base_type(base, tokenizer) else ["in_proj"])
    export, trained = adapter_file(base, tokenizer, Path(base.path).with_name("sft_final.pt"), lora)
    name = next(name for name, _ in trained.named_modules() if name.endswith(lora.target_modules[0]))
    layer = trained.get_submodule(name)
    expected = layer.base_layer.weight + 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.equal(export.language_model(tokenizer).get_submodule(name).weight, expected)


def base_type(base: Export, tokenizer: PreTrainedTokenizerFast) -> str:
    return base.language_model(tokenizer).config.model_type


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"^adapter\.r must be an integer of at least 1, got 0\."),
        ({"alpha": 0}, r"^adapter\.alpha must be an integer of at least 1, got 0\."),
        ({"dropout": 1.0}, r"^adapter\.dropout must be a number of at least 0 and below 1, got 1\.0\."),
        ({"target_modules": []}, r"^adapter\.target_modules names no module\.\n  Set adapter\.target_modules=all-lin"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)


def test_unknown_target_modules_are_rejected(base: Export, tokenizer: PreTrainedTokenizerFast) -> None:
    source = WithAdapter(base, LoRA(target_modules=["no_such_layer"]))
    with pytest.raises(
        ConfigError, match=r"^adapter\.target_modules=\[no_such_layer\] does not fit the model: .*\n  Set"
    ):
        source.language_model(tokenizer)


@pytest.mark.parametrize(
    ("target", "tied", "message"),
    [
        ("embed_tokens", False, "includes the input embedding, which cannot be adapted"),
        ("lm_head", True, "includes the output embedding, which shares its weight with the input embedding"),
        ("lm_head", False, None),
    ],
)
def test_tied_embeddings_cannot_be_adapted(target: str, tied: bool, message: str | None) -> None:
    """Merging the update of a tied output embedding would also change the input embedding."""
    lm = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=300, num_hidden_layers=1, tie_word_embeddings=tied, **LLAMA, **SPECIAL)
    )
    adapter = Adapter(LoRA(target_modules=["q_proj", target]), BaseModel("base", None, ""))
    if message is None:
        add_adapter(lm, adapter)
        assert isinstance(lm.lm_head, LoraLayer)
    else:
        with pytest.raises(ConfigError, match=rf"^adapter\.target_modules=\[{target},q_proj\] {message}.*\n  Set"):
            add_adapter(lm, adapter)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_experts_have_no_dropout(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """peft adapts their weights instead of their inputs, so there is nothing to drop."""
    source = WithAdapter(Pretrained(str(folder)), LoRA(dropout=0.1))
    with pytest.raises(ConfigError, match=r"lora_dropout.*\n  Set adapter\.dropout=0\."):
        source.language_model(tokenizer)


def test_random_weights_cannot_be_a_base_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """They are stored nowhere, so the adapter could not be opened again."""
    with pytest.raises(
        ConfigError, match=r"requires a trained base model, but Transformer has random weights\.\n  Set mod"
    ):
        WithAdapter(Transformer(hidden_size=16), SMALL).language_model(tokenizer)


@one_architecture
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_only_sft_trains_with_dropout(stage: str, tiny_run: TinyRun, base: Export, reward_base: Export) -> None:
    """``adapter.dropout`` changes what SFT learns. The other stages turn it off, as all dropout."""
    weights = []
    for dropout in (0.0, 0.5):
        source = WithAdapter(base, LoRA(r=2, alpha=4, dropout=dropout))
        weights.append(tiny_run.train(stage, policy=source).weights)
    trained = [name for name in weights[0] if ".lora_B." in name]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in trained) == (stage == "sft")


# What files contain


def test_a_file_contains_the_adapter_only(base: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """It is smaller than the model by the size of the base, and it opens with ``weights_only=True``."""
    export, trained = adapter_file(base, tokenizer, tmp_path / "sft_final.pt")
    content = torch.load(export.path, weights_only=True)
    assert all(".lora_" in name for name in content["weights"])
    assert sum(weight.numel() for weight in content["weights"].values()) == sum(
        parameter.numel() for parameter in trained.parameters() if parameter.requires_grad
    )
    weights = 4 * sum(parameter.numel() for parameter in trained.parameters() if not parameter.requires_grad)
    assert Path(export.path).stat().st_size < Path(base.path).stat().st_size - 0.8 * weights


def test_load_model_opens_a_file_whose_base_model_has_been_moved(
    base: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    export, trained = adapter_file(base, tokenizer, tmp_path / "sft_final.pt")
    moved = Path(base.path).rename(tmp_path / "moved_final.pt")
    with pytest.raises(
        DataError, match=r"sft_final\.pt contains an adapter, .*base_final\.pt: there is no such file.*\n.*base="
    ):
        load_model(export.path, device="cpu")
    model, _, _ = load_model(export.path, device="cpu", base=str(moved))
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-5)


def test_a_changed_base_model_is_rejected(
    base: Export, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """An adapter on other weights would be another model. The message names the path of the base."""
    export, _ = adapter_file(base, tokenizer, tmp_path / "sft_final.pt")
    next(iter(lm.parameters())).data[0, 0] += 1e-3
    save_result(Result(lm, tokenizer), Path(base.path), {})
    with pytest.raises(DataError, match=r"base model \S*base_final\.pt, whose weights have changed since\.\n  Restore"):
        export.language_model(tokenizer)


def test_a_file_without_a_part_of_its_adapter_is_rejected(
    base: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    export, _ = adapter_file(base, tokenizer, tmp_path / "sft_final.pt")
    content = torch.load(export.path, weights_only=True)
    removed = next(name for name in content["weights"] if ".lora_B." in name)
    del content["weights"][removed]
    torch.save(content, export.path)
    with pytest.raises(DataError, match=rf"these weights are missing from the file: {removed}"):
        export.language_model(tokenizer)


def test_a_file_with_unknown_adapter_settings_is_rejected(
    base: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    export, _ = adapter_file(base, tokenizer, tmp_path / "sft_final.pt")
    content = torch.load(export.path, weights_only=True)
    content["adapter"]["lora"]["r"] = -1
    torch.save(content, export.path)
    with pytest.raises(DataError, match=r"sft_final\.pt: the adapter has invalid settings"):
        export.language_model(tokenizer)


@pytest.mark.parametrize("merged", [False, True])
def test_a_hugging_face_folder_opens_without_this_project(
    merged: bool, folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """``peft`` opens the adapter on its base with equal logits, and ``transformers`` opens the merged model.

    The folder is written twice: files of an earlier call with another setting do not remain.
    """
    export, trained = adapter_file(Pretrained(str(folder)), tokenizer, tmp_path / "sft_final.pt")
    written = tmp_path / "hf"
    save_huggingface(export.path, str(written), merged=not merged)
    save_huggingface(export.path, str(written), merged=merged)
    names = {path.name for path in written.iterdir()}
    assert ("adapter_model.safetensors" in names, "model.safetensors" in names) == (not merged, merged)
    if merged:
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(written)), logits(trained), rtol=1e-4, atol=1e-5
        )
    else:
        opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(written))
        assert torch.equal(logits(opened), logits(trained))
        assert opened.peft_config["default"].base_model_name_or_path == str(folder)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe"])
@pytest.mark.parametrize("merged", [False, True])
def test_the_folder_of_a_reward_model_opens_without_this_project(
    merged: bool, folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """``peft`` opens adapter and ``score`` on the base model, and ``transformers`` opens the merged classifier."""
    lm = WithAdapter(Pretrained(str(folder)), SMALL).language_model(tokenizer)
    model = ScalarModel(lm.base_model, ScalarHead(16))
    train_a_little(model)
    save_result(Result(model, tokenizer), tmp_path / "reward_model_final.pt", {})
    written = tmp_path / "hf"
    save_huggingface(str(tmp_path / "reward_model_final.pt"), str(written), merged=not merged)
    save_huggingface(str(tmp_path / "reward_model_final.pt"), str(written), merged=merged)
    opener = AutoModelForSequenceClassification.from_pretrained
    classifier = opener(written) if merged else PeftModel.from_pretrained(opener(folder, num_labels=1), str(written))
    with torch.no_grad():
        expected = model.eval()(ROW, MASK)
    offset = model.head.layers[0].bias.item()
    torch.testing.assert_close(logits(classifier)[:, 0] + offset, expected, rtol=1e-4, atol=1e-5)


def test_a_reward_model_reloads_with_adapter_and_head(
    base: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The file holds adapter, head and mean. Merged and as separate layers, scores are equal to rounding."""
    lm = WithAdapter(base, SMALL).language_model(tokenizer)
    model = ScalarModel(lm.base_model, ScalarHead(32), reward_mean=0.25)
    train_a_little(model)
    save_result(Result(model, tokenizer), tmp_path / "reward_model_final.pt", {})
    export = Export(str(tmp_path / "reward_model_final.pt"))
    weights = torch.load(export.path, weights_only=True)["weights"]
    assert {name for name in weights if ".lora_" not in name} == {
        "head.layers.0.weight",
        "head.layers.0.bias",
        "reward_mean",
    }
    with torch.no_grad():
        expected = model.eval()(ROW, MASK)
        assert torch.equal(export.scalar_model(tokenizer, merge=False).eval()(ROW, MASK), expected)
        torch.testing.assert_close(export.scalar_model(tokenizer).eval()(ROW, MASK), expected, rtol=1e-4, atol=1e-5)


# What models share


def test_all_models_of_a_stage_share_the_base(base: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Policy, reference model, reward model and critic hold one copy of the base, and their own adapters and heads."""
    lm = WithAdapter(base, SMALL).language_model(tokenizer)
    reward = ScalarModel(lm.base_model, ScalarHead(32))
    train_a_little(reward)
    save_result(Result(reward, tokenizer), tmp_path / "reward_model_final.pt", {})
    shared = SharedBase()
    policies = WithAdapter(base, SMALL, shared)
    rewards = WithAdapter(Export(str(tmp_path / "reward_model_final.pt")), SMALL, shared)
    policy = Policy(policies.language_model(tokenizer))
    reference = Frozen(open_reference(policies, tokenizer)).model
    reward_model = Frozen(starting_point(rewards).scalar_model(tokenizer)).model
    critic = rewards.scalar_model(tokenizer)

    assert addresses(reference, frozen=True) == addresses(policy, frozen=True)
    assert not addresses(reference, frozen=False)
    assert addresses(critic, frozen=True) <= addresses(policy, frozen=True)
    trained = [addresses(policy, frozen=False), addresses(critic, frozen=False)]
    own = addresses(reward_model, frozen=True) - addresses(policy, frozen=True)
    assert len(own) == len(trained[1]), "the frozen reward model has its own adapter and head"
    assert not trained[0] & trained[1]
    assert not own & (trained[0] | trained[1])
    for model in (policy, critic):
        model.to(torch.float64)
    assert {p.dtype for p in reference.parameters()} == {torch.float64}, "moving one model moves the shared base"


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_policy_and_reference_model_share_the_experts(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The reference model has no adapter, so it holds nothing but the base."""
    source = WithAdapter(Pretrained(str(folder)), SMALL, SharedBase())
    policy = source.language_model(tokenizer)
    reference = starting_point(source).language_model(tokenizer)
    assert addresses(reference, frozen=True) == addresses(policy, frozen=True)


def test_different_weights_are_not_shared(
    base: Export, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A reward model on another base keeps its own weights."""
    shared = SharedBase()
    policy = WithAdapter(base, SMALL, shared).language_model(tokenizer)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.01)
    other = Path(base.path).with_name("other_final.pt")
    save_result(Result(lm, tokenizer), other, {})
    model = WithAdapter(Export(str(other)), SMALL, shared).language_model(tokenizer)
    assert not addresses(policy, frozen=True) & addresses(model, frozen=True)


# Starting at an adapter


def test_training_continues_the_adapter_of_an_earlier_stage(
    base: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The reference model is the base with the frozen adapter. Training the policy does not change it."""
    export, trained = adapter_file(base, tokenizer, tmp_path / "sft_final.pt")
    source = WithAdapter(export, SMALL, SharedBase())
    policy = Policy(source.language_model(tokenizer))
    reference = open_reference(source, tokenizer)
    assert torch.equal(logits(policy.lm), logits(trained))
    assert torch.equal(logits(reference.lm), logits(trained))
    assert adapter_of(policy.lm) == adapter_of(trained), "the base is that of the first adapter"
    train_a_little(policy)
    assert torch.equal(logits(reference.lm), logits(trained))
    assert not torch.equal(logits(policy.lm), logits(trained))


def test_other_settings_than_those_of_the_file_are_rejected(
    base: Export, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    export, _ = adapter_file(base, tokenizer, tmp_path / "sft_final.pt")
    with pytest.raises(
        ConfigError,
        match=r"sft_final\.pt contains an adapter with adapter\.r=2 .*has adapter\.r=4 .*\n  Set adapter\.r=2 ",
    ):
        WithAdapter(export, LoRA(r=4, alpha=4)).language_model(tokenizer)


# Stages


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "grpo", "dpo"])
def test_every_stage_trains_the_adapter_and_nothing_of_the_base(
    stage: str, tiny_run: TinyRun, base: Export, reward_base: Export
) -> None:
    """Frozen weights keep every bit, and every adapter changes. The first KL of the on-policy stages is exactly 0."""
    run = tiny_run.train(stage, **sources(stage, base, reward_base))
    frozen = base_weights(run.module)
    assert frozen
    start = run.recorder.initial_weights
    for name, weight in run.weights.items():
        if isinstance(weight, torch.Tensor) and name in frozen:
            assert torch.equal(weight, start[name]), name
    changed = [name for name in start if ".lora_B." in name and not torch.equal(run.weights[name], start[name])]
    assert changed
    assert len(changed) == len([name for name in start if ".lora_B." in name])
    if stage in ("ppo", "grpo"):
        assert run.curve("objective/kl")[0] == 0.0


@one_architecture
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_samples_are_drawn_in_the_precision_of_training(
    stage: str, tiny_run: TinyRun, base: Export, reward_base: Export
) -> None:
    """Without autocast, a model whose frozen linear layers are stored in bfloat16 cannot run."""
    data = {"val_fraction": 0.5}
    flags = {"precision": "bf16-mixed"}
    run = tiny_run.train(stage, data=data, trainer=flags, samples=2, **sources(stage, base, reward_base))
    assert torch.bfloat16 in {parameter.dtype for parameter in run.module.policy.parameters()}


def sources(stage: str, base: Export, reward_base: Export) -> dict[str, Any]:
    """Return inputs of a stage as sources with adapters on one shared base."""
    shared = SharedBase()
    rewards = {"reward_model": WithAdapter(reward_base, SMALL, shared)} if stage in ("ppo", "grpo") else {}
    return {"policy": WithAdapter(base, SMALL, shared), **rewards}


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_resuming_is_exact_and_checkpoints_contain_no_base(
    stage: str, tiny_run: TinyRun, base: Export, reward_base: Export, tmp_path: Path
) -> None:
    """Two epochs in one run and in two give the same weights. The checkpoint opens as a model, too."""
    uninterrupted = tiny_run.train(stage, trainer={"max_epochs": 2}, **sources(stage, base, reward_base))
    saving = RunCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    flags = {"enable_checkpointing": True, "max_epochs": 1}
    first = tiny_run.train(
        stage, trainer=flags, callbacks=[saving, ExportHeader({})], **sources(stage, base, reward_base)
    )
    path = tmp_path / "checkpoints" / "last.ckpt"
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    assert names == stored_weights(first.module).keys()
    assert not names & base_weights(first.module)
    resumed = tiny_run.train(stage, trainer={"max_epochs": 2}, resume=path, **sources(stage, base, reward_base))
    assert_same_weights(resumed.module, uninterrupted.module, **EXACT)
    source = open_model_source(str(path))
    if stage == "ppo":
        opened = source.language_model(tiny_run.tokenizer, merge=False)
        assert torch.equal(logits(opened), logits(first.module.policy.lm))
    else:
        assert source.scalar_model(tiny_run.tokenizer, merge=False).head is not None


@one_architecture
def test_averaged_weights_resume_without_the_base(
    tiny_run: TinyRun, base: Export, reward_base: Export, tmp_path: Path
) -> None:
    """Lightning's EMA callback moves the current weights to another entry of the checkpoint."""

    def train(epochs: int, *callbacks: Any, resume: Path | None = None) -> Run:
        flags = {"max_epochs": epochs, "enable_checkpointing": len(callbacks) > 0}
        ema = EMAWeightAveraging(decay=0.5)
        keys = sources("sft", base, reward_base)
        return tiny_run.train("sft", trainer=flags, callbacks=[ema, *callbacks], resume=resume, **keys)

    uninterrupted = train(2)
    first = train(1, RunCheckpoint(dirpath=tmp_path, save_last=True))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["state_dict"].keys() == content["current_model_state"].keys() == stored_weights(first.module).keys()
    resumed = train(2, resume=tmp_path / "last.ckpt")
    assert_same_weights(resumed.module, uninterrupted.module, **EXACT)


@one_architecture
def test_a_checkpoint_without_a_part_of_the_adapter_is_rejected(
    tiny_run: TinyRun, base: Export, reward_base: Export, tmp_path: Path
) -> None:
    """Lightning loads it without its strict mode, because the base is left out."""
    saving = RunCheckpoint(dirpath=tmp_path, save_last=True)
    tiny_run.train(
        "sft", trainer={"enable_checkpointing": True}, callbacks=[saving], **sources("sft", base, reward_base)
    )
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    removed = next(name for name in content["state_dict"] if ".lora_A." in name)
    del content["state_dict"][removed]
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(DataError, match=rf"these weights are missing from the file: {removed}"):
        tiny_run.train("sft", resume=tmp_path / "last.ckpt", **sources("sft", base, reward_base))


@one_architecture
def test_the_pre_flight_check_accepts_a_shared_base(tiny_run: TinyRun, base: Export, reward_base: Export) -> None:
    """Frozen models may share frozen weights with trained models. Sharing trained weights remains a fault."""
    module = tiny_run.build("ppo", **sources("ppo", base, reward_base)).module
    module.configure_model()
    assert check_frozen_models(module).passed
    trained = next(parameter for parameter in module.policy.lm.parameters() if parameter.requires_grad)
    module.reference.model.lm.extra = nn.Parameter(trained.data, requires_grad=False)
    assert not check_frozen_models(module).passed


# Commands


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that runs a stage of one step on the folder with overrides."""

    def run(stage: str, *overrides: str) -> None:
        tiny = [*TINY_DATA[:1], "data.max_rows=8", "data.max_length=32", "data.batch_size=4", "trainer.max_steps=1"]
        flags = ["trainer.limit_val_batches=0", "trainer.enable_progress_bar=false", f"paths.root={tmp_path}"]
        model = ["model=pretrained", f"model.path={folder}", "adapter=lora", "adapter.r=2"]
        run_stage(compose_config(f"stage={stage}", *tiny, *flags, *model, *overrides))

    return run


@pytest.mark.parametrize("family", ["llama"])
def test_commands_train_and_export_adapters(
    command: Callable[..., Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """SFT trains a new adapter and DPO continues it. ``save_hf=true`` writes a folder that peft opens."""
    command("sft", "stage.samples=0", "save_hf=true")
    command("dpo", "save_hf=merged")
    for stage, merged in (("sft", False), ("dpo", True)):
        content = torch.load(tmp_path / "rlhf" / stage / f"{stage}_final.pt", weights_only=True)
        assert content["adapter"]["base"]["path"] == str(tmp_path / "base")
        assert content["adapter"]["lora"]["r"] == 2
        assert all(".lora_" in name for name in content["weights"])
        assert (tmp_path / "rlhf" / stage / "hf" / "model.safetensors").is_file() == merged
    model, _, _ = load_model("rl_trained", outputs=str(tmp_path), device="cpu")
    assert torch.isfinite(logits(model)).all()
    merged_folder = AutoModelForCausalLM.from_pretrained(tmp_path / "rlhf" / "dpo" / "hf")
    assert torch.equal(logits(merged_folder), logits(model))
    with pytest.raises(ConfigError, match=r"adapter with adapter\.r=2 .* has adapter\.r=4"):
        command("dpo", "adapter.r=4", "overwrite=true")


def test_a_model_that_is_trained_from_scratch_cannot_have_an_adapter() -> None:
    """The run refuses it before anything is loaded or trained."""
    cfg = compose_config("stage=sft", "adapter=lora")
    with pytest.raises(ConfigError, match=r"^adapter=lora requires a trained base model, but Transformer has random"):
        with_adapter(cfg, {"policy": Transformer()})


def test_all_inputs_of_a_stage_get_the_adapter() -> None:
    """They share one list of open models. An input that is not used stays None."""
    cfg = compose_config("stage=ppo", "adapter=lora", "adapter.target_modules=[v_proj,q_proj]")
    inputs = {"policy": Pretrained("p"), "reward_model": [Pretrained("a"), Pretrained("b")], "other": None}
    adapted = with_adapter(cfg, inputs)
    first, second = adapted["reward_model"]
    assert adapted["policy"].lora.target_modules == ("q_proj", "v_proj")
    assert adapted["policy"].shared is first.shared is second.shared
    assert adapted["other"] is None
    assert with_adapter(compose_config("stage=ppo"), inputs) is inputs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["save_hf=zip"], r"^save_hf must be false, true or merged, got zip\."),
        (["save_hf=merged"], r"^save_hf=merged has no effect with adapter=none\."),
    ],
)
def test_invalid_values_of_save_hf_are_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_choices(compose_config("stage=sft", *overrides))
    check_choices(compose_config("stage=sft", "adapter=lora", "save_hf=merged"))


# Other settings


def test_gradients_are_those_of_the_model_without_checkpointing(
    base: Export, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Recomputed activations reach the adapters of all layers, although the embeddings are frozen."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = Policy(WithAdapter(base, SMALL).language_model(tokenizer)).train()
        train_a_little(policy)
        if checkpointing:
            enable_gradient_checkpointing([policy])
        policy(ROW, MASK, MASK & (torch.arange(7) > 0)).logprobs.sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_a_base_in_the_dtype_of_autocast_changes_no_result(base: Export, tokenizer: PreTrainedTokenizerFast) -> None:
    """Under bf16-mixed, frozen linear layers of a trained model are stored in bfloat16; adapters stay in float32."""
    outputs = []
    for cast in (False, True):
        torch.manual_seed(0)
        policy = Policy(WithAdapter(base, SMALL).language_model(tokenizer))
        train_a_little(policy)
        if cast:
            cast_frozen_matrices(policy, torch.bfloat16)
            dtypes = {p.dtype for name, p in policy.named_parameters() if "base_layer.weight" in name}
            assert dtypes == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = policy(ROW, MASK, MASK & (torch.arange(7) > 0)).logprobs
        logprobs.sum().backward()
        outputs.append([logprobs.detach(), *(p.grad for p in policy.parameters() if p.requires_grad)])
    torch.testing.assert_close(outputs[0], outputs[1], **EXACT)
