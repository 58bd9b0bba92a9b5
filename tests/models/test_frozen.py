"""Frozen models are hidden from their owner, and models without dropout agree in train and eval mode."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from harness import TinyRun
from rlhf.models import (
    Frozen,
    Policy,
    ScalarHead,
    ScalarModel,
    all_named_modules,
    cast_frozen_matrices,
    disable_dropout,
)

ROW = torch.tensor([[5, 260, 17, 3, 99, 41, 2]])
TINY = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2(dropout: float) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(
            vocab_size=300,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def test_train_and_eval_mode_agree_without_dropout() -> None:
    """A GPT-2 with dropout 0.5 gives different logits in train mode; with dropout disabled, the same ones."""
    lm = gpt2(dropout=0.5)
    with torch.no_grad():
        eval_logits, train_logits = lm.eval()(input_ids=ROW).logits, lm.train()(input_ids=ROW).logits
        assert not torch.allclose(eval_logits, train_logits)
        disable_dropout(lm)
        assert torch.equal(lm.train()(input_ids=ROW).logits, eval_logits)
        assert torch.equal(lm.eval()(input_ids=ROW).logits, eval_logits)


@pytest.mark.parametrize(
    "config",
    [
        # Llama stores its attention dropout as a float in the attention module, without an nn.Dropout.
        LlamaConfig(**TINY, num_key_value_heads=2, attention_dropout=0.5),
        # The decoder layer of Falcon reads it from the configuration. OPT also drops complete layers.
        FalconConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.5),
        OPTConfig(
            vocab_size=60,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            dropout=0.0,
            layerdrop=0.5,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_dropout_stored_as_a_number_is_disabled(config: PretrainedConfig) -> None:
    """Of six passes in train mode, some differ from eval mode before dropout is disabled, and none afterwards."""
    torch.manual_seed(0)
    lm, tokens = AutoModelForCausalLM.from_config(config), ROW % 60
    with torch.no_grad():
        expected = lm.eval()(input_ids=tokens).logits
        lm.train()
        assert not all(torch.equal(lm(input_ids=tokens).logits, expected) for _ in range(6))
        disable_dropout(lm)
        assert all(torch.equal(lm(input_ids=tokens).logits, expected) for _ in range(6))


class Owner(nn.Module):
    """Like a LightningModule with a trained and a frozen model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2)
        self.reference = Frozen(model)


def test_a_frozen_model_is_hidden_from_its_owner() -> None:
    """The owner has only its own two parameters, and ``train()`` leaves the frozen model in eval mode."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    owner = Owner(model)
    assert [name for name, _ in owner.named_parameters()] == ["trained.weight", "trained.bias"]
    assert list(owner.state_dict()) == ["trained.weight", "trained.bias"]
    assert list(owner.buffers()) == []
    owner.train()
    assert owner.training
    assert not any(module.training for module in model.modules())


def test_all_named_modules_include_those_of_frozen_models() -> None:
    owner = nn.Sequential(Owner(nn.Sequential(nn.ReLU())))
    names = ["", "0", "0.trained", "0.reference", "0.reference.model", "0.reference.model.0"]
    assert [name for name, _ in all_named_modules(owner)] == names
    assert [name for name, _ in all_named_modules(Frozen(nn.ReLU()))] == ["", "model"]


def test_a_frozen_model_has_no_gradients() -> None:
    """Neither its weights nor its inputs get gradients, in any gradient mode of the caller."""
    model = nn.Linear(2, 2)
    frozen = Frozen(model)
    result = frozen(torch.ones(1, 2, requires_grad=True))
    assert not result.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_model_follows_its_owner() -> None:
    """``owner.to(dtype)`` and ``owner.to(device)`` move the frozen weights as well."""
    model = nn.Linear(2, 2)
    owner = Owner(model).to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    owner.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# Weights in the dtype of autocast


def transformer(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def models_with_all_kinds_of_layers() -> dict[str, PreTrainedModel]:
    """Linear, Conv1D of transformers, and Mamba mixers; with tied and with separate output embeddings."""
    mamba = {"head_dim": 16, "state_size": 8, "chunk_size": 4, "n_groups": 1, "num_heads": 4}
    return {
        "llama": transformer(LlamaConfig(**TINY, num_key_value_heads=1, attention_bias=True)),
        "llama tied": transformer(LlamaConfig(**TINY, tie_word_embeddings=True)),
        "gpt2": gpt2(dropout=0.0),
        "mamba2": transformer(
            Mamba2Config(vocab_size=60, hidden_size=32, num_hidden_layers=2, tie_word_embeddings=True, **mamba)
        ),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "mamba2"])
def test_cast_matrices_change_no_bit_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Autocast would convert the same weights at every use. More than half of the bytes of the layers are saved."""
    model = models_with_all_kinds_of_layers()[name]
    tokens = torch.cat([ROW, ROW.flip(1)]) % 60
    mask = torch.ones_like(tokens, dtype=torch.bool)
    response_mask = mask.clone()
    response_mask[:, :2] = False
    frozen = Frozen(Policy(model))

    def outputs() -> list[Tensor]:
        with torch.autocast("cpu", dtype):
            output = frozen(tokens, mask, response_mask, entropy="value")
        return [output.logprobs, output.entropy, output.states]

    expected = outputs()
    cast_frozen_matrices(frozen, dtype)
    assert all(torch.equal(value, other) for value, other in zip(outputs(), expected, strict=True))
    cast = {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    embeddings = {name for name in matrices if "embed" in name or "wte" in name or "wpe" in name}
    assert {name for name in cast if name in matrices} == matrices - embeddings
    assert all(name.endswith(".bias") for name in cast - matrices)


class TwoModels(nn.Module):
    """A trained reward model, and a frozen reference model that uses one of its frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = ScalarModel(models_with_all_kinds_of_layers()["llama"].base_model, ScalarHead(16))
        self.trained.trunk.layers[0].mlp.requires_grad_(False)
        reference = ScalarModel(models_with_all_kinds_of_layers()["llama"].base_model, ScalarHead(16, num_layers=2))
        reference.trunk.layers[0].mlp = self.trained.trunk.layers[0].mlp
        self.reference = Frozen(reference)


def test_only_frozen_matrices_are_cast() -> None:
    """Trained layers, embeddings, norms and scalar heads stay in float32. Models that share a layer keep sharing it."""
    module = TwoModels()
    cast_frozen_matrices(module, torch.bfloat16)
    trained, reference = module.trained, module.reference.model
    cast = {name for name, parameter in trained.named_parameters() if parameter.dtype == torch.bfloat16}
    assert cast == {f"trunk.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    shared = trained.trunk.layers[0].mlp.up_proj.weight
    assert reference.trunk.layers[0].mlp.up_proj.weight is shared
    assert reference.trunk.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in reference.head.parameters()} == {torch.float32}
    assert reference.trunk.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_stages_store_frozen_models_in_the_dtype_of_autocast(tiny_run: TinyRun, precision: str) -> None:
    """Reference model and reward model of PPO; the policy is trained in float32."""
    module = tiny_run.train("ppo", trainer={"precision": precision}).module
    dtypes = {torch.float32, torch.bfloat16} if precision == "bf16-mixed" else {torch.float32}
    for frozen in (module.reference, module.reward.model):
        assert {parameter.dtype for parameter in frozen.model.parameters()} == dtypes
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


# Noise of routers


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5),
        # The router of PhiMoE also draws experts at random in train mode. Its noise is a threshold in eval mode.
        PhimoeConfig(**TINY, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_noise_of_routers_is_disabled(config: PretrainedConfig) -> None:
    """Six passes in train mode differ from eval mode before, and agree afterwards. Eval mode gives the same as ever."""
    lm, tokens = transformer(config), ROW % 60
    with torch.no_grad():
        expected = lm(input_ids=tokens).logits
        lm.train()
        assert not all(torch.equal(lm(input_ids=tokens).logits, expected) for _ in range(6))
        disable_dropout(lm)
        assert all(torch.equal(lm.train()(input_ids=tokens).logits, expected) for _ in range(6))
        assert torch.equal(lm.eval()(input_ids=tokens).logits, expected)
