"""Small models and a batch of preference pairs, whose log-probs and gradients two ways to compute them must share."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from rlhf.models import Policy

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=1)
GPT2 = GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=2, n_head=2)
# Prompts of 9, 2 and 5 tokens, each with two responses.
PAIRS = [(9, 3, 12), (2, 7, 1), (5, 4, 4)]


def model(config: Any) -> PreTrainedModel:
    """A model without dropout, with random weights large enough that every token matters."""
    torch.manual_seed(0)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return lm


def pair_batch() -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
    """Input ids, attention mask, response mask, lengths and shared tokens of ``PAIRS``, padded on the right."""
    torch.manual_seed(1)
    prompts = [torch.randint(60, (prompt,)) for prompt, _, _ in PAIRS]
    rows = [
        torch.cat([tokens, torch.randint(60, (pair[1 + half],))])
        for half in (0, 1)
        for tokens, pair in zip(prompts, PAIRS, strict=True)
    ]
    lengths, starts = [len(row) for row in rows], torch.tensor([prompt for prompt, _, _ in PAIRS] * 2)
    time = torch.arange(max(lengths))
    mask = time < torch.tensor(lengths)[:, None]
    return nn.utils.rnn.pad_sequence(rows, True), mask, mask & (time >= starts[:, None]), lengths, starts.tolist()


def loss_and_gradients(policy: Policy, *, shared: bool) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of the batch of pairs, and the gradients of a loss in which each token has another weight."""
    tokens, mask, response, lengths, starts = pair_batch()
    policy.zero_grad()
    output = policy(tokens, mask, response, lengths=lengths, shared_tokens=starts if shared else ())
    weights = torch.linspace(-1, 1, output.logprobs.numel()).view_as(output.logprobs)
    (output.logprobs * weights).sum().backward()
    return output.logprobs.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def assert_same(
    found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], *, rtol: float = 1e-4
) -> None:
    """Compare log-probs, and gradients up to a relative error."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5)  # 1e-4, or the rounding of bfloat16


def saved_numbers(lm: PreTrainedModel) -> int:
    """Number of different elements that a forward pass of ten tokens stores for the backward pass."""
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        lm(input_ids=torch.arange(10)[None], use_cache=False)
    return sum(saved.values())
