"""Models with a scalar output: reward models, critics and ensembles of reward models."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import ConfigError
from rlhf.models.autocast import without_autocast
from rlhf.models.logits import NO_TRUNK, unsupported_architecture
from rlhf.models.rotary import float32_frequencies
from rlhf.models.trunk import hidden_states, prepare_trunk, states_before
from rlhf.schema import PositiveInt, check_arguments
from rlhf.tensors import last_true, scatter, true_positions


class ScalarHead(nn.Module):
    """One or more MLPs that map a hidden state to a scalar each. They compute in float32 under any precision of a run.

    The weights of the last layer are initialized from N(0, 1 / sqrt(fan_in + 1)) and its bias with 0.

    Args:
        input_dim: Width of the hidden states.
        hidden_dim: Width of the layers between the first and the last one.
        num_layers: Number of linear layers, with GELU between them. 1 is a linear map.
        num_heads: Number of MLPs. They have the same shape and independent initial weights, and thus form an ensemble
            on one trunk.

    Reference: Huang et al. 2024, detail 11 (arXiv:2403.17031).
    """

    def __init__(
        self,
        input_dim: PositiveInt,
        hidden_dim: PositiveInt = 128,
        num_layers: PositiveInt = 1,
        num_heads: PositiveInt = 1,
    ) -> None:
        super().__init__()
        check_arguments(ScalarHead, "stage", locals())
        widths = [input_dim] + [hidden_dim] * (num_layers - 1)
        self.layers = _mlp(widths)
        self.others = nn.ModuleList(_mlp(widths) for _ in range(num_heads - 1))
        self.settings = {
            "input_dim": input_dim,
            "hidden_dim": hidden_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
        }

    def forward(self, hidden: Tensor) -> Tensor:
        """Mean over the heads: [..., width] to [...], float32."""
        return self.scores(hidden).mean(dim=-1)

    def scores(self, hidden: Tensor) -> Tensor:
        """Output of each head: [..., width] to [..., heads], float32."""
        with without_autocast(hidden.device):
            return torch.cat([_float32_output(mlp, hidden) for mlp in (self.layers, *self.others)], dim=-1)


def _float32_output(mlp: nn.Module, hidden: Tensor) -> Tensor:
    """Output of an MLP, computed in float32 from hidden states and weights of any precision."""
    output = hidden.float()
    for layer in mlp.children():
        if isinstance(layer, nn.Linear):
            output = F.linear(output, layer.weight.float(), layer.bias.float())
        else:
            output = layer(output)
    return output


def _mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers of the given widths with GELU between them, and a last layer with one output."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
    last = nn.Linear(widths[-1], 1)
    nn.init.normal_(last.weight, std=(widths[-1] + 1) ** -0.5)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class ScalarModel(nn.Module):
    """The trunk of a language model with a scalar head: a reward model or a critic.

    Args:
        trunk: A causal model without its output layer.
        head: Maps the last hidden state of the trunk to a scalar.
        reward_mean: Mean score of the demonstrations, in reward units; it is subtracted from every score (Huang et al.
            2024, detail 12, arXiv:2403.17031). With several heads, each head has its own mean, [heads]: preferences
            do not determine the offset of a head, and different offsets would look like disagreement.

    Raises:
        ConfigError: The trunk has an output layer, which its architecture does not separate from it.
    """

    reward_mean: Tensor

    def __init__(self, trunk: nn.Module, head: ScalarHead, reward_mean: float = 0.0) -> None:
        super().__init__()
        if isinstance(trunk, PreTrainedModel) and trunk.get_output_embeddings() is not None:
            raise unsupported_architecture(trunk, NO_TRUNK)
        self.trunk = trunk
        prepare_trunk(trunk)
        self.head = head
        heads = head.settings["num_heads"]
        # Under bf16-true, Lightning opens models with bfloat16 as the default dtype.
        mean = torch.full((heads,) if heads > 1 else (), reward_mean, dtype=torch.float32)
        self.register_buffer("reward_mean", mean)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ScalarModel":
        mean = self.reward_mean
        with float32_frequencies(self.trunk):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.reward_mean.dtype != mean.dtype:  # Scores are float32 under any precision, and so is their mean.
            self.reward_mean = mean.to(self.reward_mean.device)
        return self

    @property
    def config(self) -> Any:
        """The ``PretrainedConfig`` of the trunk."""
        return self.trunk.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score of each sequence, read at its last real token and averaged over the heads.

        Args:
            input_ids: [batch, time] token ids.
            attention_mask: [batch, time] bool, True on real tokens.

        Returns:
            [batch] scores, in reward units.
        """
        return self.scores(input_ids, attention_mask).mean(dim=1)

    def scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        shared_tokens: Sequence[int] = (),
    ) -> Tensor:
        """Score of each sequence by each head.

        Args:
            input_ids: [batch, time] token ids.
            attention_mask: [batch, time] bool, True on real tokens.
            lengths: See ``hidden_states``.
            shared_tokens: See ``hidden_states``.

        Returns:
            [batch, heads] scores, in reward units.
        """
        last = (torch.arange(len(input_ids), device=input_ids.device), last_true(attention_mask))
        states = hidden_states(
            self.trunk, input_ids, attention_mask, last, lengths=lengths, shared_tokens=shared_tokens
        )
        return self.head.scores(states) - self.reward_mean

    def token_values(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, response_tokens: int | None = None
    ) -> Tensor:
        """Value before each response token, for a critic.

        Args:
            input_ids: [batch, time] token ids.
            attention_mask: [batch, time] bool, True on real tokens.
            response_mask: [batch, time] bool, True on response tokens including EOS.
            response_tokens: Number of True entries of ``response_mask``. None: the host waits for the device to count
                them.

        Returns:
            [batch, time] values, in reward units; 0 outside the response.
        """
        positions = true_positions(response_mask, response_tokens)
        states = states_before(self.trunk, input_ids, attention_mask, positions)
        return scatter(self.values(states), response_mask)

    def values(self, hidden: Tensor) -> Tensor:
        """Scalar output at every hidden state, for a critic: [..., width] to [...], in reward units."""
        return (self.head.scores(hidden) - self.reward_mean).mean(dim=-1)


class RewardModelEnsemble(nn.Module):
    """Several reward models that score the same sequences.

    Args:
        members: At least one reward model; all have the same vocabulary. Their scores are only comparable if every
            member has a ``reward_mean``.
    """

    def __init__(self, members: Sequence[ScalarModel]) -> None:
        super().__init__()
        if not members:
            raise ConfigError(
                "A reward model ensemble must have at least one member.", "Set stage.reward_model=[<path>,<path>]"
            )
        self.members = nn.ModuleList(members)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean score of each sequence, [batch], in reward units. Arguments as for ``ScalarModel.forward``."""
        return self.scores(input_ids, attention_mask).mean(dim=1)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores by all heads of all members, in the order of the members: [batch, all heads], in reward units."""
        members: Iterable[Any] = self.members
        return torch.cat([member.scores(input_ids, attention_mask) for member in members], dim=1)
