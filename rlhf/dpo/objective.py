"""Preference losses on summed log-probs of whole answers."""

import torch.nn.functional as F
from torch import Tensor


# fmt: off
def sigmoid_loss(
    chosen: Tensor,              # [pairs] log pi(better answer), nats; carries the gradient
    rejected: Tensor,            # [pairs] log pi(other answer), nats; carries the gradient
    reference_chosen: Tensor,    # [pairs] the same under the frozen reference, nats
    reference_rejected: Tensor,  # [pairs]
    *,
    beta: float,                 # strength of the pull to the reference; reward units per nat
) -> Tensor:                     # []      nats a pair; ln 2 while the policy is the reference
    """DPO: the negative log-likelihood of the labels under the implicit reward ``beta * (log pi - log reference)``.

    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).
    """
    # fmt: on
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -F.logsigmoid(margins).mean()
