"""One number a token: the head of reward models and critics, and ensembles of them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.backbone import hidden_states
from rlhf.tensors import last_true


class ScalarHead(nn.Module):
    """MLPs from a hidden state to one number each; one layer is a plain linear map.

    Args:
        input_dim: width of the hidden state it reads.
        hidden_dim: width of the layers between, when there are any.
        num_layers: linear layers, at least 1.
        num_heads: MLPs of the same shape and independent first weights: an ensemble on one trunk.

    The last layer starts as N(0, 1/sqrt(fan_in + 1)) with bias 0: Huang et al. 2024, detail 11 (arXiv:2403.17031).
    """

    def __init__(self, input_dim: int, hidden_dim: int = 128, num_layers: int = 1, num_heads: int = 1) -> None:
        super().__init__()
        if num_layers < 1:
            raise UserError(f"num_layers={num_layers}: a head has at least one layer", "stage.num_layers=1")
        if num_heads < 1:
            raise UserError(f"num_heads={num_heads}: a score needs at least one head", "stage.num_heads=1")
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
        """[..., width] to [...]: the mean over the heads, float32 whatever the precision of the body."""
        return self.scores(hidden).mean(dim=-1)

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., width] to [..., heads], float32: what each head says."""
        hidden = hidden.to(self.layers[-1].weight.dtype)
        return torch.cat([layers(hidden) for layers in (self.layers, *self.others)], dim=-1).float()


def _mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers from width to width, and a last one to a single number."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
    last = nn.Linear(widths[-1], 1)
    nn.init.normal_(last.weight, std=(widths[-1] + 1) ** -0.5)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class ScalarModel(nn.Module):
    """A language model's body with a scalar head: a reward model, or a critic.

    Args:
        trunk: body of a causal model, without its output embedding.
        head: reads the trunk's last hidden state.
        reward_mean: score of the average demonstration, subtracted from every score, reward units
            (Huang et al. 2024, detail 12, arXiv:2403.17031). With several heads each has its own, [heads]: preferences
            say nothing about a head's zero, and heads with different zeros would disagree about every answer.
    """

    reward_mean: Tensor

    def __init__(self, trunk: nn.Module, head: ScalarHead, reward_mean: float = 0.0) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        heads = head.settings["num_heads"]
        self.register_buffer("reward_mean", torch.full((heads,) if heads > 1 else (), reward_mean))

    @property
    def config(self) -> Any:
        return self.trunk.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score of each sequence, read at its last real token; the mean over the heads.

        Args:
            tokens: [batch, time] token ids.
            mask: [batch, time] bool, True on real tokens.

        Returns:
            [batch], reward units; the mean score of the demonstrations is 0 once it has been stored.
        """
        return self.scores(input_ids, attention_mask).mean(dim=1)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What each head says of each sequence, [batch, heads], reward units; arguments as for a call."""
        hidden = hidden_states(self.trunk, input_ids, attention_mask)
        last = hidden[torch.arange(len(input_ids), device=input_ids.device), last_true(attention_mask)]
        return self.head.scores(last) - self.reward_mean

    def values(self, hidden: Tensor) -> Tensor:
        """[..., width] to [...]: the same number read at any token, for a critic."""
        return (self.head.scores(hidden) - self.reward_mean).mean(dim=-1)


class RewardModelEnsemble(nn.Module):
    """Several reward models that judge the same answers.

    Args:
        members: of one vocabulary, each with one head or several; at least one. Scores are only comparable if each
            member's zero is fixed, as the stored mean of the demonstrations does.
    """

    def __init__(self, members: Sequence[ScalarModel]) -> None:
        super().__init__()
        if not members:
            raise UserError("an ensemble without members scores nothing", "stage.reward_model=[<path>, <path>]")
        self.members = nn.ModuleList(members)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean over all scores of each sequence, [batch], reward units; arguments as for ScalarModel."""
        return self.scores(input_ids, attention_mask).mean(dim=1)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, all heads of all members], reward units, in the order of the members."""
        return torch.cat([member.scores(input_ids, attention_mask) for member in self.members], dim=1)


def pessimistic_score(
    scores: Tensor,  # [batch, scorers] what heads or members say of each answer, reward units
    *,
    uncertainty_penalty: float,  # price of their disagreement, dimensionless; 0 is the mean
) -> Tensor:  # [batch]          reward units
    """Mean over the scorers less ``uncertainty_penalty`` population standard deviations: little is given for contested answers.

    Coste et al. 2023 (arXiv:2310.02743), uncertainty-weighted optimization, take off the variance; the standard
    deviation keeps the unit, so that the coefficient means the same for rewards of any size. No spread of a single
    scorer. Not meant to be differentiated: equal scores have no derivative of their spread.
    """

    return scores.mean(dim=1) - uncertainty_penalty * scores.std(dim=1, correction=0)
