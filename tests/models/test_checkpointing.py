"""Gradient checkpointing gives the same gradients with less memory, in every stage."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    PretrainedConfig,
    PreTrainedModel,
)

from harness import TinyRun
from rlhf.errors import ConfigError
from rlhf.models import Policy, ScalarHead, ScalarModel, enable_gradient_checkpointing
from rlhf.speed import speed

ROWS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    ),
    "gpt2": GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=3, n_head=2),
    "mamba2": Mamba2Config(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=8,
        state_size=8,
        chunk_size=4,
        n_groups=1,
        tie_word_embeddings=True,
    ),
}


def language_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model in eval mode, as ``from_pretrained`` returns it."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def stored_bytes_and_gradients(model: nn.Module) -> tuple[int, list[Tensor]]:
    """Bytes of distinct tensors stored for the backward pass, without the weights, and the gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.ones_like(ROWS, dtype=torch.bool)
    response_mask = mask.clone()
    response_mask[:, :12] = False
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = model(ROWS, mask, response_mask).logprobs if isinstance(model, Policy) else model(ROWS, mask)
    scores.sum().backward()
    return sum(stored.values()), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["policy", "reward model"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_checkpointing_gives_the_same_gradients_with_less_memory(name: str, kind: str) -> None:
    """Of the activations of three layers, only the input of each layer is stored: less than a third of the bytes."""
    results = []
    for checkpointing in (False, True):
        lm = language_model(CONFIGS[name])
        torch.manual_seed(1)
        model = Policy(lm) if kind == "policy" else ScalarModel(lm.base_model, ScalarHead(16))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            enable_gradient_checkpointing([model])
        results.append(stored_bytes_and_gradients(model))
    (plain_bytes, plain), (fewer_bytes, recomputed) = results
    assert fewer_bytes < plain_bytes / 3
    for gradient, other in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_every_stage_recomputes_its_layers(tiny_run: TinyRun, stage: str) -> None:
    """With ``stage.gradient_checkpointing``, the first layer runs once more in each backward pass. Weights agree."""
    weights, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        run = tiny_run.build(stage, gradient_checkpointing=checkpointing)
        run.module.configure_model()
        trained = run.module.model if stage == "reward" else run.module.policy
        layer = next(child[0] for child in trained.modules() if isinstance(child, nn.ModuleList) and len(child) == 2)
        count: list[bool] = []
        next(layer.children()).register_forward_hook(lambda *args, count=count: count.append(torch.is_grad_enabled()))
        with speed(packed_rows=False):  # as layers are computed that are recomputed
            run.trainer.fit(run.module, run.datamodule)
        weights.append([parameter.detach().clone() for parameter in run.module.parameters()])
        calls.append(sum(count))
    assert calls[1] == 2 * calls[0] > 0
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


def test_an_architecture_without_checkpointing_is_refused() -> None:
    lm = language_model(CONFIGS["llama"])
    lm.supports_gradient_checkpointing = False
    message = (
        r"^stage\.gradient_checkpointing must be false for the architecture LlamaForCausalLM, which does not support "
        r"it, got true\.\n  Set stage\.gradient_checkpointing=false\.$"
    )
    with pytest.raises(ConfigError, match=message):
        enable_gradient_checkpointing([Policy(lm)])
