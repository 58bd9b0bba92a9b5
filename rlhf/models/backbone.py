"""Causal language models as policies: hidden states, log-probs and entropy of given tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from rlhf.distributed import gather_objects
from rlhf.errors import ConfigError
from rlhf.models.logits import chunk_size, find_logit_transform, in_chunks, state_width
from rlhf.models.optimizations.fused_modules import fuse_modules
from rlhf.models.optimizations.matrix_products import FusedLinear
from rlhf.models.rotary import float32_frequencies
from rlhf.models.token_statistics import EntropyMode, token_statistics
from rlhf.models.trunk import prepare_trunk, states_before
from rlhf.tensors import scatter, true_positions


@dataclass
class PolicyOutput:
    """Log-probs and related quantities of given tokens under a policy.

    Args:
        logprobs: [batch, time] log-prob of each response token, in nats; 0 outside the response.
        states: [response tokens, width] last hidden state before each response token, row by row.
        entropy: [batch, time] entropy of the distribution that each response token was drawn from, in nats; 0 outside
            the response. None unless it was requested.
        is_argmax: [batch, time] bool, True where a response token is the most likely token. None unless it was
            requested.
    """

    logprobs: Tensor
    states: Tensor
    entropy: Tensor | None = None
    is_argmax: Tensor | None = None


class Policy(nn.Module):
    """A Hugging Face causal language model that returns log-probs of given tokens.

    Args:
        lm: The language model.

    Raises:
        ConfigError: The architecture of the model is not supported.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        prepare_trunk(lm.base_model)
        fuse_modules(lm, FusedLinear)  # the output embedding
        self.logit_transform = find_logit_transform(lm)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Policy":
        with float32_frequencies(self.lm):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def vocab_size(self) -> int:
        """Number of token embeddings."""
        embeddings: Any = self.lm.get_input_embeddings()
        return int(embeddings.num_embeddings)

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden state."""
        return state_width(self.lm)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        temperature: float = 1.0,
        *,
        entropy: EntropyMode = "none",
        is_argmax: bool = False,
        response_tokens: int | None = None,
        lengths: Sequence[int] | None = None,
        shared_tokens: Sequence[int] = (),
        states: Tensor | None = None,
    ) -> PolicyOutput:
        """Compute the log-prob of each response token given all tokens before it.

        Args:
            input_ids: [batch, time] token ids.
            attention_mask: [batch, time] bool, True on real tokens.
            response_mask: [batch, time] bool, True on response tokens. Logits are computed for these tokens only.
            temperature: Divides the logits, as it did when the tokens were sampled.
            entropy: Whether to compute the entropy: ``none``, ``value`` for its value only, or ``grad`` for its value
                with gradient.
            is_argmax: Whether to compute which tokens are the most likely ones.
            response_tokens: Number of True entries of ``response_mask``. None: the host waits for the device to count
                them.
            lengths: See ``hidden_states``.
            shared_tokens: See ``hidden_states``.
            states: [response tokens, width] what ``concurrent_states`` has computed from the same tokens. None: the
                states are computed here.
        """
        positions = true_positions(response_mask, response_tokens)
        targets = input_ids[positions]
        if states is None:
            states = states_before(
                self.lm.base_model, input_ids, attention_mask, positions, lengths=lengths, shared_tokens=shared_tokens
            )

        def statistics(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return token_statistics(self._logits(states), targets, temperature, entropy, is_argmax)

        logprobs, *requested = in_chunks(statistics, (states, targets), self.vocab_size)
        output = PolicyOutput(scatter(logprobs, response_mask), states)
        if is_argmax:
            output.is_argmax = scatter(requested.pop(), response_mask)
        if entropy != "none":
            output.entropy = scatter(requested.pop(), response_mask)
        return output

    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits of hidden states: [tokens, width] to [tokens, vocabulary], float32 in any precision."""
        return self._logits(states)

    def _logits(self, states: Tensor) -> Tensor:
        """Logits for methods that already run with gathered parameters; see ``rlhf.models.sharding``."""
        embedding: Any = self.lm.get_output_embeddings()
        # Mamba's states are float32 in any precision of its weights.
        logits: Tensor = embedding(states.to(embedding.weight.dtype))
        return self.logit_transform(logits.float())


def kl_divergence(
    policy: Policy,
    states: Tensor,
    reference: Policy,
    ref_states: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Exact KL(policy || reference) of the next-token distributions before each response token.

        KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v))

    The sum is over the whole vocabulary, in contrast to estimates from the sampled tokens. Logits are computed in
    chunks of tokens, never for the whole batch.

    Args:
        policy: p. Gradients flow through this model.
        states: [response tokens, width] ``PolicyOutput.states`` of the policy.
        reference: q, a model with the same vocabulary.
        ref_states: [response tokens, width'] ``PolicyOutput.states`` of the reference model.
        response_mask: [batch, time] bool, True on response tokens.
        temperature: Divides the logits of both models.

    Returns:
        [batch, time] KL, in nats; 0 outside the response.
    """

    def divergence(states: Tensor, ref_states: Tensor) -> tuple[Tensor]:
        logp = (policy.logits(states) / temperature).log_softmax(dim=-1)
        logq = (reference.logits(ref_states) / temperature).log_softmax(dim=-1)
        return ((logp.exp() * (logp - logq)).sum(dim=-1),)

    if isinstance(policy, FSDPModule):  # Each call of ``logits`` is a collective operation: one call on every rank.
        _check_one_chunk(max(gather_objects(len(states))), policy.vocab_size)
    (kl,) = in_chunks(divergence, (states, ref_states), policy.vocab_size)
    return scatter(kl, response_mask)


def _check_one_chunk(tokens: int, vocab_size: int) -> None:
    """Refuse more tokens than one chunk has, whose number would differ between the ranks of a sharded model."""
    if tokens > chunk_size(vocab_size):
        raise ConfigError(
            "stage.kl.estimator=full with trainer=fsdp needs the logits of all response tokens of a minibatch at once, "
            f"at most {chunk_size(vocab_size)} tokens with a vocabulary of {vocab_size}, got {tokens}.",
            "Set stage.kl.estimator=k3.",
        )
