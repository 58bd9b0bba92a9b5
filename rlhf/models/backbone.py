"""Causal language models as policies: hidden states, log-probs and entropy of given tokens."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.tensors import scatter, states_before

LOGIT_CHUNK_TOKENS = 4096  # logits of at most this many tokens are computed at once, to save memory


def hidden_states(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden state of every token, independent of padding, batch size and the other rows of the batch.

    The trunk only sees right-padded rows, where causality alone keeps padding away from real tokens. It therefore needs
    no attention mask, which attention and state-space models interpret differently, and positions are counted from the
    first real token.

    Args:
        trunk: A causal model without its output layer.
        input_ids: [batch, time] token ids.
        attention_mask: [batch, time] bool, True on real tokens. They must be contiguous; padding may be on either side.

    Returns:
        [batch, time, width] hidden states. Values at padding positions are undefined.
    """
    left_padded = not bool(attention_mask[:, 0].all())
    if left_padded:
        order = attention_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        input_ids = input_ids.gather(1, order)
    hidden: Tensor = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
    if left_padded:
        hidden = hidden.gather(1, order.argsort(dim=1)[..., None].expand_as(hidden))
    return hidden


@dataclass
class PolicyOutput:
    """Log-probs and related quantities of given tokens under a policy.

    Args:
        logprobs: [batch, time] log-prob of each response token, in nats; 0 outside the response.
        entropy: [batch, time] entropy of the distribution that each response token was drawn from, in nats; 0 outside
            the response.
        is_argmax: [batch, time] bool, True where a response token is the most likely token.
        hidden: [batch, time, width] last hidden states.
    """

    logprobs: Tensor
    entropy: Tensor
    is_argmax: Tensor
    hidden: Tensor


class Policy(nn.Module):
    """A Hugging Face causal language model that returns log-probs of given tokens.

    Args:
        lm: The language model.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self._linear_head: bool | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token embeddings."""
        embeddings: Any = self.lm.get_input_embeddings()
        return int(embeddings.num_embeddings)

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden state."""
        config: Any = self.lm.config.get_text_config()
        return int(config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        temperature: float = 1.0,
        *,
        entropy_grad: bool = False,
    ) -> PolicyOutput:
        """Compute the log-prob of each response token given all tokens before it.

        Args:
            input_ids: [batch, time] token ids.
            attention_mask: [batch, time] bool, True on real tokens.
            response_mask: [batch, time] bool, True on response tokens. Logits are computed for these tokens only.
            temperature: Divides the logits, as it did when the tokens were sampled.
            entropy_grad: Whether gradients flow through the entropy, too.
        """
        hidden = hidden_states(self.lm.base_model, input_ids, attention_mask)
        states, targets = states_before(hidden, response_mask), input_ids[response_mask]
        chunks = [
            self._evaluate(
                states[i : i + LOGIT_CHUNK_TOKENS], targets[i : i + LOGIT_CHUNK_TOKENS], temperature, entropy_grad
            )
            for i in range(0, max(len(targets), 1), LOGIT_CHUNK_TOKENS)
        ]
        logprobs, entropy, is_argmax = (torch.cat(values) for values in zip(*chunks, strict=True))
        return PolicyOutput(
            scatter(logprobs, response_mask), scatter(entropy, response_mask), scatter(is_argmax, response_mask), hidden
        )

    def _evaluate(
        self, states: Tensor, targets: Tensor, temperature: float, entropy_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-prob, entropy and argmax match, [tokens] each, of target tokens given the states before them."""
        logits = self.logits(states).float() / temperature
        logprobs = -F.cross_entropy(logits, targets, reduction="none")
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            shifted = logits - logits.amax(dim=-1, keepdim=True)
            weights = shifted.exp()
            total = weights.sum(dim=-1)
            entropy = total.log() - (weights * shifted).sum(dim=-1) / total
            is_argmax = shifted.gather(-1, targets[:, None])[:, 0] == 0
        return logprobs, entropy, is_argmax

    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits of hidden states: [tokens, width] to [tokens, vocabulary]."""
        if self._linear_head is None:
            self._linear_head = self._has_linear_head()
        if self._linear_head:
            logits: Tensor = self.lm.get_output_embeddings()(states)
            return logits
        return self._logits_of_model(states)

    @torch.no_grad()
    def _has_linear_head(self) -> bool:
        """Return whether the logits are the output embedding applied to the last hidden state, without cap or scale."""
        was_training = self.lm.training
        self.lm.eval()
        input_ids = torch.arange(2, device=self.lm.device)[None] % self.vocab_size
        states: list[Tensor] = []

        def enlarge(module: nn.Module, inputs: object, output: Any) -> None:
            # The logits of an untrained model are so small that a soft cap hardly changes them.
            output.last_hidden_state = output.last_hidden_state * 1000
            states.append(output.last_hidden_state)

        hook = self.lm.base_model.register_forward_hook(enlarge)
        try:
            logits = self.lm(input_ids=input_ids, use_cache=False).logits
        finally:
            hook.remove()
        self.lm.train(was_training)
        return torch.allclose(self.lm.get_output_embeddings()(states[0]).float(), logits.float(), rtol=1e-3)

    def _logits_of_model(self, states: Tensor) -> Tensor:
        """Compute logits with the model's own head, which may scale or cap them.

        The forward pass runs on a shallow copy of the model, which shares all parameters and has a trunk that returns
        the given states. The model itself is not modified.
        """
        head = copy.copy(self.lm)
        head._modules = {**self.lm._modules, self.lm.base_model_prefix: _KnownStates(states)}
        input_ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        logits: Tensor = head(input_ids=input_ids).logits
        return logits[0]


class _KnownStates(nn.Module):
    """A trunk that returns hidden states that have been computed before."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states[None])


def kl_divergence(
    policy: Policy,
    hidden: Tensor,
    reference: Policy,
    reference_hidden: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Exact KL(policy || reference) of the next-token distributions before each response token.

        KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v))

    The sum is over the whole vocabulary, in contrast to estimates from the sampled tokens. Logits are computed in
    chunks of tokens, never for the whole batch.

    Args:
        policy: p. Gradients flow through this model.
        hidden: [batch, time, width] last hidden states of the policy.
        reference: q, a model with the same vocabulary.
        reference_hidden: [batch, time, width'] last hidden states of the reference model.
        response_mask: [batch, time] bool, True on response tokens.
        temperature: Divides the logits of both models.

    Returns:
        [batch, time] KL, in nats; 0 outside the response.
    """
    states, ref_states = states_before(hidden, response_mask), states_before(reference_hidden, response_mask)
    chunks = []
    for i in range(0, max(len(states), 1), LOGIT_CHUNK_TOKENS):
        logp = (policy.logits(states[i : i + LOGIT_CHUNK_TOKENS]).float() / temperature).log_softmax(dim=-1)
        logq = (reference.logits(ref_states[i : i + LOGIT_CHUNK_TOKENS]).float() / temperature).log_softmax(dim=-1)
        chunks.append((logp.exp() * (logp - logq)).sum(dim=-1))
    return scatter(torch.cat(chunks), response_mask)
