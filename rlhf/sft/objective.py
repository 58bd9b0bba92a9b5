"""The loss of supervised fine-tuning."""

from torch import Tensor

from rlhf.tensors import masked_mean


def cross_entropy_loss(
    logprobs: Tensor,  # [batch, time] log pi(token), nats; carries the gradient
    response_mask: Tensor,  # [batch, time] bool; True on the tokens to learn
) -> Tensor:  # []            nats a token
    """Mean negative log-likelihood of the tokens to learn; its exponential is the perplexity.

    The mean is over tokens, so long answers weigh more than short ones.

    Source: Ouyang et al. 2022, section 3.5 (arXiv:2203.02155).
    """

    return -masked_mean(logprobs, response_mask)
