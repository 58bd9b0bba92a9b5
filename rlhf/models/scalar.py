"""One number a token: the head of reward models and critics."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.backbone import hidden_states
from rlhf.tensors import last_true


class ScalarHead(nn.Module):
    """An MLP from a hidden state to one number; one layer is a plain linear map.

    Args:
        input_dim: width of the hidden state it reads.
        hidden_dim: width of the layers between, when there are any.
        num_layers: linear layers, at least 1.

    The last layer starts as N(0, 1/sqrt(fan_in + 1)) with bias 0: Huang et al. 2024, detail 11 (arXiv:2403.17031).
    """

    def __init__(self, input_dim: int, hidden_dim: int = 128, num_layers: int = 1) -> None:
        super().__init__()
        if num_layers < 1:
            raise UserError(f"num_layers={num_layers}: a head has at least one layer", "stage.num_layers=1")
        widths = [input_dim] + [hidden_dim] * (num_layers - 1)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        last = nn.Linear(widths[-1], 1)
        nn.init.normal_(last.weight, std=(widths[-1] + 1) ** -0.5)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)
        self.settings = {"input_dim": input_dim, "hidden_dim": hidden_dim, "num_layers": num_layers}

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] to [...], float32 whatever the precision of the body."""
        return self.layers(hidden.to(self.layers[-1].weight.dtype))[..., 0].float()


class ScalarModel(nn.Module):
    """A language model's body with a scalar head: a reward model, or a critic.

    Args:
        trunk: body of a causal model, without its output embedding.
        head: reads the trunk's last hidden state.
        reward_mean: score of the average demonstration, subtracted from every score, reward units
            (Huang et al. 2024, detail 12, arXiv:2403.17031).
    """

    reward_mean: Tensor

    def __init__(self, trunk: nn.Module, head: ScalarHead, reward_mean: float = 0.0) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.register_buffer("reward_mean", torch.tensor(reward_mean))

    @property
    def config(self) -> Any:
        return self.trunk.config

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Score of each sequence, read at its last real token.

        Args:
            tokens: [batch, time] token ids.
            mask: [batch, time] bool, True on real tokens.

        Returns:
            [batch], reward units; the mean score of the demonstrations is 0 once it has been stored.
        """
        hidden = hidden_states(self.trunk, tokens, mask)
        last = hidden[torch.arange(len(tokens), device=tokens.device), last_true(mask)]
        return self.head(last) - self.reward_mean

    def values(self, hidden: Tensor) -> Tensor:
        """[..., width] to [...]: the same number read at any token, for a critic."""
        return self.head(hidden) - self.reward_mean
