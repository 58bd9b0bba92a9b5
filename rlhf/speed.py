"""Switches of optimizations that change time and memory, and results only by rounding.

They are settings of the process, like those of ``torch.backends``. Models and samplers read them where they are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rlhf.schema import PositiveInt


@dataclass(frozen=True)
class SpeedSettings:
    """Optimizations. docs/speed.md explains each of them and shows what it gains.

    Args:
        concurrent_models: On the CPU, let PPO compute the policy and a separate critic at the same time, each with half
            of the threads. false: compute them one after another with all threads.
        keep_heap: On Linux, in runs on the CPU, keep freed memory for the next step, which is faster. false: return it.
        fused_logprobs: Compute log-prob, entropy and argmax of a token from one buffer of logits, which then becomes
            their gradient. false: let autograd store each intermediate result.
        fused_mlp: Let the backward pass of a gated MLP compute the activation and the product again, which uses less
            memory. false: let autograd store them.
        fused_rms_norm: Let the backward pass of an RMS norm in float32 compute the normalized states again if they have
            a width of 512 or more, which uses less memory. false: let autograd store them.
        onednn_products: Whether oneDNN instead of MKL computes matrix products in float32 on the CPU. null: on
            processors of AMD with units of 512 bits, where it is about twice as fast. true and false: always and never.
        packed_rows: On the CPU, compute the rows of a batch one after another in a single row without padding, if the
            architecture allows it. false: pad them as ``row_groups`` does.
        row_groups: On the CPU, compute the rows of a batch in up to this many groups of similar length, each padded to
            its own longest row, unless ``packed_rows`` applies. 1: pad all rows to the longest one of the batch.
        shared_prompts: Compute the prompt of a preference pair once for both responses, if the architecture allows it
            and if this saves tokens. false: compute it twice.
        partial_last_layer: Let the MLP of the last layer compute only those tokens whose last hidden states are used,
            if the architecture allows it and if they are less than 80 % of all. false: compute every token.
        lean_decoding: Decode with a preallocated cache and without the modules of transformers, for architectures that
            have such a decoder. false: decode with the model and the cache of transformers.
        cudnn_attention: On NVIDIA GPUs, let attention use cuDNN as well, which prepares a plan for each new shape.
            false: use the kernels in PyTorch only, such as FlashAttention.
        scan_chunk: On the CPU, let Mamba-2 scan at most this many tokens at once. null: ``chunk_size`` of the model,
            which is 256 in most pretrained models.
    """

    concurrent_models: bool = True
    keep_heap: bool = True
    fused_logprobs: bool = True
    fused_mlp: bool = True
    fused_rms_norm: bool = True
    onednn_products: bool | None = None
    packed_rows: bool = True
    row_groups: PositiveInt = 8
    shared_prompts: bool = True
    partial_last_layer: bool = True
    lean_decoding: bool = True
    cudnn_attention: bool = False
    scan_chunk: PositiveInt | None = 64


_current = SpeedSettings()


def speed_settings() -> SpeedSettings:
    """Return the settings of this process."""
    return _current


def set_speed(settings: SpeedSettings) -> None:
    """Change the settings of this process."""
    global _current
    _current = settings


@contextmanager
def speed(**changes: bool | int | None) -> Iterator[None]:
    """Change some settings inside of this context.

    Args:
        changes: Fields of ``SpeedSettings``.
    """
    before = speed_settings()
    set_speed(replace(before, **changes))  # type: ignore[arg-type]
    try:
        yield
    finally:
        set_speed(before)
