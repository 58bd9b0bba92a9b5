"""Decoding of Mamba-2 with a preallocated state and without the modules of transformers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2ForCausalLM, PreTrainedModel

from rlhf.models import cache_name
from rlhf.models.optimizations.gated_mlp import is_silu
from rlhf.sampling.lean import LeanBatch
from rlhf.sampling.lean_layers import Function, linear, rms_norm
from rlhf.sampling.unpadded import groups_of_equal_length, padding_reaches_state
from rlhf.tensors import pad_rows_left, upload


def has_mamba_decoder(lm: Any) -> bool:
    """Return whether ``MambaBatch`` supports a model.

    Weights in half precision are converted between the layers of transformers, whose residuals are float32.
    """
    unlimited = type(lm) is Mamba2ForCausalLM and tuple(lm.config.time_step_limit) == (0.0, math.inf)
    return unlimited and lm.dtype == torch.float32


class MambaBatch(LeanBatch):
    """Decoding of Mamba-2, see ``has_mamba_decoder``."""

    def __init__(self, lm: PreTrainedModel, max_rows: int, capacity: int) -> None:
        super().__init__(lm, max_rows, capacity)
        trunk = self.lm.backbone
        self.layers = [_Layer(block) for block in trunk.layers]
        self.norm, self.embedding = rms_norm(trunk.norm_f), trunk.embeddings
        self.needs_equal_lengths = padding_reaches_state(lm)
        self.inputs: list[Tensor] = []  # [max_rows, kernel, channels] the last inputs of each layer's convolution
        self.states: list[Tensor] = []  # [max_rows, groups, state size, heads of a group, width of a head]

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        if not self.needs_equal_lengths:
            return super().prefill(rows, prompts)
        groups = groups_of_equal_length(prompts)
        fill = super().prefill
        logits = torch.cat([fill([rows[i] for i in group], [prompts[i] for i in group]) for group in groups])
        return logits[upload([i for group in groups for i in group], self.device).argsort()]

    def _fill(self, rows: Tensor, source: Tensor, prompts: list[list[int]]) -> Tensor:
        # Padding is on the left, where the mask keeps it out of the state.
        input_ids, mask = (upload(tensor, self.device) for tensor in pad_rows_left(prompts))
        keys = {"attention_mask": mask.long()} if len({len(prompt) for prompt in prompts}) > 1 else {}
        output = self.lm.backbone(input_ids, use_cache=True, **keys)
        layers = getattr(output, cache_name(self.lm)).layers
        groups = self.lm.config.n_groups
        cache = [
            (layer.conv_states[0].transpose(1, 2), layer.recurrent_states[0].unflatten(1, (groups, -1)).movedim(-1, 2))
            for layer in layers
        ]
        if not self.states:
            for inputs, state in cache:
                self.inputs.append(inputs.new_zeros(self.max_rows, *inputs.shape[1:]))
                self.states.append(state.new_zeros(self.max_rows, *state.shape[1:]))
        for (inputs, state), all_inputs, all_states in zip(cache, self.inputs, self.states, strict=True):
            all_inputs[rows], all_states[rows] = inputs[source], state[source]
        hidden: Tensor = output.last_hidden_state
        return hidden[:, -1]

    def decode(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer, inputs, states in zip(self.layers, self.inputs, self.states, strict=True):
            hidden = layer.output(hidden, inputs[: self.count], states[: self.count])
        return self.logits(self.norm(hidden))

    def _move(self, source: int, target: int) -> None:
        for cache in (*self.inputs, *self.states):
            cache[target] = cache[source]


class _Layer:
    def __init__(self, block: Any) -> None:
        mixer = block.mixer
        self.norm, self.gated_norm = rms_norm(block.norm), mixer.norm
        self.projection, self.projection_back = linear(mixer.in_proj), linear(mixer.out_proj)
        self.kernel = mixer.conv1d.weight[:, 0].T.contiguous()  # [kernel, channels]
        self.bias = mixer.conv1d.bias  # [channels] or None
        self.activation: Function = F.silu if is_silu(mixer.act) else mixer.act
        self.decay = -mixer.A_log.float().exp()  # [heads]
        self.step_bias, self.skip = mixer.dt_bias, mixer.D[:, None]  # [heads], [heads, 1]
        self.sizes = (mixer.intermediate_size, mixer.conv_dim, mixer.num_heads)
        self.groups, self.state_size = mixer.n_groups, mixer.ssm_state_size

    def output(self, hidden: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
        """Return the output of the layer for one token per row, and update the last inputs and the state.

        Equation 16 and section 6 of Dao and Gu 2024 (arXiv:2405.21060): h = exp(step * decay) h + step * B x and
        y = C h + skip * x, with step, x, B and C computed from the token.
        """
        rows, heads = len(hidden), self.sizes[2]
        gate, new, step = self.projection(self.norm(hidden)).split(self.sizes, dim=-1)
        inputs.copy_(torch.cat([inputs[:, 1:], new[:, None]], dim=1))
        convolved = (inputs * self.kernel).sum(dim=1)
        convolved = self.activation(convolved if self.bias is None else convolved + self.bias)
        x, b, c = convolved.split([self.sizes[0], *[self.groups * self.state_size] * 2], dim=-1)
        x = x.reshape(rows, heads, -1)
        step = F.softplus(step + self.step_bias).float()
        # Heads of a group share B and C. The state size comes before the heads, so that C h is a fast matrix product.
        state.mul_((step * self.decay).exp().view(rows, self.groups, 1, -1, 1))
        grouped = state.flatten(3)
        grouped.addcmul_(b.reshape(rows, self.groups, -1, 1), (step[:, :, None] * x).reshape(rows, self.groups, 1, -1))
        y = torch.matmul(c.reshape(rows, self.groups, 1, -1).to(state.dtype), grouped).view(rows, heads, -1)
        y = y.to(x.dtype) + self.skip * x
        return hidden + self.projection_back(self.gated_norm(y.reshape(rows, -1), gate).to(hidden.dtype))
