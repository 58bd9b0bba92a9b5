"""The loss of supervised fine-tuning."""

from torch import Tensor

from rlhf.tensors import masked_mean


def cross_entropy_loss(logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens to learn; its exponential is the perplexity.

        L = -mean_t logprobs_t

    The mean is taken over tokens, so long responses have more weight than short ones.

    Args:
        logprobs: [batch, time] log-probs of the tokens under the policy, in nats. Gradients flow through them.
        response_mask: [batch, time] bool, True on the tokens to learn.

    Returns:
        Scalar loss, in nats per token.

    Reference: Ouyang et al. 2022, section 3.5 (arXiv:2203.02155).
    """
    return -masked_mean(logprobs, response_mask)
