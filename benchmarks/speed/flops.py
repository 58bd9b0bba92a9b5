"""Useful floating-point operations of a training step, and the peak rate of matrix products on this machine.

python benchmarks/speed/flops.py
"""

import json
import sys
import time
from typing import Any

SIZES = (1024, 2048, 4096)
SLOW = 2.0  # seconds


def useful_flops(module: Any, batch: Any) -> float:
    """Return the operations that forward and backward pass of a batch need: real tokens, and logits of responses only.

    Args:
        module: One of our modules.
        batch: Its batch.
    """
    sequences = getattr(batch, "sequences", batch)
    lengths = sequences.attention_mask.sum(dim=1).tolist()
    lm = module.policy.lm if hasattr(module, "policy") else module.model.trunk
    flops = trunk_flops(lm, lengths)
    if getattr(module, "critic", None) is not None and getattr(module.critic, "trunk", None) is not None:
        flops += trunk_flops(module.critic.trunk, lengths)
    if hasattr(module, "policy"):
        flops += 2 * lm.config.hidden_size * lm.config.vocab_size * int(sequences.response_mask.sum())
    computes_reference = hasattr(module, "compute_ref_logprobs") and module.reference is not None
    # The backward pass needs twice as many. A live reference model has a forward pass only.
    return (4 if computes_reference else 3) * flops


def trunk_flops(lm: Any, lengths: list[int]) -> float:
    """Return the operations of a forward pass: two per weight of a matrix and token, and those of causal attention."""
    layers = lm.base_model.layers
    weights = sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    width = lm.config.num_attention_heads * lm.config.head_dim
    return sum(2 * weights * length + 2 * len(layers) * width * length**2 for length in lengths)


def peak(dtype_name: str) -> float:
    """Return the highest rate of matrix products, in operations per second, with MKL or oneDNN.

    Without instructions for bfloat16, such products take minutes. Larger ones are left out after a slow one.
    """
    import torch

    def onednn(one: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")

    dtype, best = getattr(torch, dtype_name), 0.0
    for size in SIZES:
        one = torch.randn(size, size).to(dtype)
        for product in [lambda one: one @ one, onednn] * 8:
            started = time.perf_counter()
            product(one)
            seconds = time.perf_counter() - started
            best = max(best, 2 * size**3 / seconds)
            if seconds > SLOW:
                return best
    return best


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: peak(name) for name in ("float32", "bfloat16")}) + "\n")
