"""Causal language models as policies: hidden states, log-probs and entropy of given tokens."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from rlhf.distributed import gather_objects
from rlhf.errors import ConfigError
from rlhf.models.logits import chunk_size, find_logit_transform, in_chunks
from rlhf.tensors import scatter, states_before, true_positions

EntropyMode: TypeAlias = Literal["none", "value", "grad"]


def skip_padding_check(trunk: Any) -> None:
    """Let a model not look for padding tokens when it is called without an attention mask, as GPT-2 does.

    The host would wait for the device, and the warning would be wrong: ``hidden_states`` needs no attention mask.

    Args:
        trunk: A causal model without its output layer.
    """
    if hasattr(trunk, "warn_if_padding_and_no_attention_mask"):
        trunk.warn_if_padding_and_no_attention_mask = _ignore


def _ignore(*args: Any) -> None:
    """Do nothing."""


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
    hidden: Tensor
    # Without padding on the left, there is nothing to move. The CPU can find this out without waiting for a device.
    if attention_mask.device.type == "cpu" and bool(attention_mask[:, 0].all()):
        hidden = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    start = attention_mask.to(torch.int8).argmax(dim=1, keepdim=True)
    rolled = input_ids.gather(1, (columns + start) % len(columns))
    hidden = trunk(input_ids=rolled, use_cache=False).last_hidden_state
    return hidden.gather(1, ((columns - start) % len(columns))[..., None].expand_as(hidden))


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
        skip_padding_check(lm.base_model)
        self.logit_transform = find_logit_transform(lm)

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
        entropy: EntropyMode = "none",
        is_argmax: bool = False,
        response_tokens: int | None = None,
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
        """
        hidden = hidden_states(self.lm.base_model, input_ids, attention_mask)
        positions = true_positions(response_mask, response_tokens)
        states, targets = states_before(hidden, positions), input_ids[positions]

        def statistics(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            logits = self._logits(states)
            return _token_statistics(logits if temperature == 1 else logits / temperature, targets, entropy, is_argmax)

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


def _token_statistics(logits: Tensor, targets: Tensor, entropy: EntropyMode, is_argmax: bool) -> tuple[Tensor, ...]:
    """Return the log-prob of each target token and, if requested, the entropy and the argmax match, [tokens] each."""
    logp = logits.log_softmax(dim=-1)
    results = [logp.gather(-1, targets[:, None])[:, 0]]
    if entropy == "grad":
        results.append(-(logp.exp() * logp).sum(dim=-1))
    with torch.no_grad():
        if entropy == "value":
            results.append(-logp.exp().mul_(logp).sum(dim=-1))
        if is_argmax:
            results.append(logits.gather(-1, targets[:, None])[:, 0] == logits.amax(dim=-1))
    return tuple(results)


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
