"""A causal language model as the stages see it: hidden states in one place, log-probs in one place."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.tensors import scatter, states_before

PIECE = 4096  # tokens whose logits are computed at once, so that without a gradient no more are held


def hidden_states(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden state of every token, the same whatever the padding, the batch size or the neighbours.

    The trunk only ever sees right-padded text, where causality alone keeps padding out of every real token. No mask is
    passed: attention and state-space models agree, and positions count from the first real token.

    Args:
        trunk: the body of a causal model, transformer or state-space.
        tokens: [batch, time] token ids.
        mask: [batch, time] bool, True on real tokens; they stand together, padding left or right of them.

    Returns:
        [batch, time, width]; what stands on padding means nothing.
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
    """What a policy says of given tokens.

    logprobs: [batch, time] log pi(token), nats; 0 outside the mask.
    entropy: [batch, time] entropy of the distribution the token was drawn from, nats; no gradient unless asked for.
    correct: [batch, time] bool, True where the token is the most likely one.
    hidden: [batch, time, width] last hidden states.
    """

    logprobs: Tensor
    entropy: Tensor
    correct: Tensor
    hidden: Tensor


class Policy(nn.Module):
    """A Hugging Face causal language model that gives log-probs of chosen tokens."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self._plain_head: bool | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.lm.get_input_embeddings().num_embeddings)

    @property
    def hidden_size(self) -> int:
        """Size of the last hidden state."""
        return int(self.lm.config.get_text_config().hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        temperature: float = 1.0,
        *,
        entropy_grad: bool = False,
    ) -> PolicyOutput:
        """Log-probs of the chosen tokens, each given the tokens before it.

        Args:
            tokens: [batch, time] token ids.
            mask: [batch, time] bool, True on real tokens.
            chosen: [batch, time] bool, the tokens to score; logits are computed for these only.
            temperature: divides the logits, as it did when the tokens were sampled.
            entropy_grad: let the entropy carry a gradient too.
        """
        hidden = hidden_states(self.lm.base_model, input_ids, attention_mask)
        states, targets = states_before(hidden, response_mask), input_ids[response_mask]
        parts = [
            self._score(states[i : i + PIECE], targets[i : i + PIECE], temperature, entropy_grad)
            for i in range(0, max(len(targets), 1), PIECE)
        ]
        logprobs, entropy, correct = (torch.cat(part) for part in zip(*parts, strict=True))
        return PolicyOutput(
            scatter(logprobs, response_mask), scatter(entropy, response_mask), scatter(correct, response_mask), hidden
        )

    def _score(
        self, states: Tensor, targets: Tensor, temperature: float, entropy_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(states).float() / temperature
        logprobs = -F.cross_entropy(logits, targets, reduction="none")
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            shifted = logits - logits.amax(dim=-1, keepdim=True)
            weights = shifted.exp()
            total = weights.sum(dim=-1)
            entropy = total.log() - (weights * shifted).sum(dim=-1) / total
            correct = shifted.gather(-1, targets[:, None])[:, 0] == 0
        return logprobs, entropy, correct

    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits of chosen hidden states: [tokens, width] to [tokens, vocabulary]."""
        if self._plain_head is None:
            self._plain_head = self._head_is_plain()
        if self._plain_head:
            return self.lm.get_output_embeddings()(states)
        return self._logits_by_model(states)

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """True if the logits are the output embedding of the last hidden state and nothing else (no cap, no scale)."""
        was_training = self.lm.training
        self.lm.eval()
        input_ids = torch.arange(2, device=self.lm.device)[None] % self.vocab_size
        states: list[Tensor] = []

        def enlarge(module: nn.Module, inputs: object, output: BaseModelOutputWithPast) -> None:
            # a cap does not show on the small logits of a young model
            output.last_hidden_state = output.last_hidden_state * 1000
            states.append(output.last_hidden_state)

        hook = self.lm.base_model.register_forward_hook(enlarge)
        try:
            logits = self.lm(input_ids=input_ids, use_cache=False).logits
        finally:
            hook.remove()
        self.lm.train(was_training)
        return torch.allclose(self.lm.get_output_embeddings()(states[0]).float(), logits.float(), rtol=1e-3)

    def _logits_by_model(self, states: Tensor) -> Tensor:
        """The model's own road from states to logits, with its body replaced by the states already computed."""
        body = _Replay(states)
        name = self.lm.base_model_prefix
        original = getattr(self.lm, name)
        self.lm._modules[name] = body
        try:
            return self.lm(input_ids=torch.zeros(1, len(states), dtype=torch.long, device=states.device)).logits[0]
        finally:
            self.lm._modules[name] = original


def kl_divergence(
    policy: Policy,
    hidden: Tensor,
    reference: Policy,
    reference_hidden: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """KL(policy || reference) of the whole next-token distribution at each chosen token; carries the policy's gradient.

    Args:
        policy, reference: models over one vocabulary.
        hidden, reference_hidden: [batch, time, width] their last hidden states.
        chosen: [batch, time] bool, the tokens before which the distributions are compared.
        temperature: divides both logits.

    Returns:
        [batch, time], nats; 0 outside ``chosen``. Logits are made in pieces of tokens, never for the whole batch.
    """
    states, others = states_before(hidden, response_mask), states_before(reference_hidden, response_mask)
    parts = []
    for i in range(0, max(len(states), 1), PIECE):
        ours = (policy.logits(states[i : i + PIECE]).float() / temperature).log_softmax(dim=-1)
        theirs = (reference.logits(others[i : i + PIECE]).float() / temperature).log_softmax(dim=-1)
        parts.append((ours.exp() * (ours - theirs)).sum(dim=-1))
    return scatter(torch.cat(parts), response_mask)


class _Replay(nn.Module):
    """Stands in for a model's body and answers with states that are already known."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *args: object, **kwargs: object) -> object:
        return BaseModelOutputWithPast(last_hidden_state=self.states[None])
