"""The sampler protocol, and the sampler that uses the training model itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models import gathered
from rlhf.sampling.decoding import Decoding, invalid_logits, lean_decoder
from rlhf.sampling.drawing import INVALID_TOKEN
from rlhf.sampling.params import SamplingParams
from rlhf.sampling.rollout import Rollout
from rlhf.sampling.unpadded import groups_of_equal_length, padding_reaches_state
from rlhf.schema import PositiveInt, check_arguments


class Sampler(Protocol):
    """Samples responses to prompts.

    Stages call ``sync`` before the first ``sample`` and after every weight update that the next responses must reflect.
    """

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use these weights and this tokenizer from now on.

        Args:
            policy: Language model whose current weights generate the responses.
            tokenizer: Tokenizer of the policy. Both are arguments of ``SamplingParams.stop_ids``.
        """

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        """Sample one response per prompt, in the order of the prompts.

        Args:
            prompts: Token ids of each prompt, at least one per prompt.
            params: Sampling settings.
        """


class LocalSampler(Sampler):
    """Samples with the training model itself, in eval mode and with the model's own cache.

    Responses are drawn with the global random state of torch. Token ids that the tokenizer does not have, such as those
    of a padded embedding, are never drawn. As with ``top_k``, log-probs are those of the full distribution: they differ
    by the log of the total probability of the remaining ids, which is close to 0 in a trained model.

    Args:
        stop_interval: Number of decoding steps after which finished responses leave the batch. Each time, the host
            waits for the device. null: 1 on the CPU, 8 elsewhere. Responses end at their stop token in any case.
        batch_size: Number of responses to sample at once, which limits the memory of sampling. In models that have a
            lean decoder (``speed.lean_decoding``), the next prompt takes the place of a finished response. null: all.
    """

    def __init__(self, *, stop_interval: PositiveInt | None = None, batch_size: PositiveInt | None = None) -> None:
        check_arguments(LocalSampler, "stage.sampler", locals())
        self.stop_interval = stop_interval
        self.batch_size = batch_size
        self.policy: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        # A reference is enough: the model is the one that is trained.
        self.policy, self.tokenizer = policy, tokenizer

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rollout:
        with self._ready() as lm:
            responses: dict[int, list[int]] = {}
            for batch in self._batches(lm, prompts):
                decoding = self._decoding(lm, [prompts[i] for i in batch], params, max_rows=self.batch_size)
                while not decoding.is_done:
                    decoding.step()
                responses.update(zip(batch, decoding.responses(), strict=True))
        ordered = [responses[i] for i in range(len(prompts))]
        return Rollout.from_responses(prompts, ordered, decoding.stop_ids, lm.device)

    @torch.no_grad()
    def stream(self, prompt: Sequence[int], params: SamplingParams, generator: torch.Generator) -> Iterator[int]:
        """Sample one response, and yield each token as soon as it is drawn.

        Several streams can take turns without changing the responses of each other. A response is the same as that of
        ``sample`` if the global random state had the same seed.

        Args:
            prompt: Token ids of the prompt, at least one.
            params: Sampling settings.
            generator: Random state of the draws, on the device of the policy.

        Yields:
            The token ids of the response, including its stop token.

        Raises:
            UserError: The logits of a token are NaN or infinite.
        """
        with self._ready() as lm:
            decoding = self._decoding(lm, [prompt], params, generator=generator)
        while not decoding.is_done:
            with self._ready():  # The consumer runs outside this context.
                decoding.step()
            token = int(decoding.token[0])
            if token == INVALID_TOKEN:
                raise invalid_logits(decoding.steps)
            yield token
            if token in decoding.stop_ids:
                return

    @contextmanager
    def _ready(self) -> Iterator[PreTrainedModel]:
        """Put the policy into eval mode, with complete weights, in this context."""
        if self.policy is None:
            raise RuntimeError("Call sync(policy, tokenizer) before sample().")
        training = self.policy.training
        self.policy.eval()
        try:
            with gathered(self.policy), _cached_casts(self.policy.device.type):
                yield self.policy
        finally:
            self.policy.train(training)

    def _batches(self, lm: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Return the indices of the prompts of each batch."""
        together: Sequence[int] = range(len(prompts))
        if lean_decoder(lm) is not None:
            return [together]
        groups = groups_of_equal_length(prompts) if padding_reaches_state(lm) else [together]
        size = self.batch_size or len(prompts)
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    def _decoding(
        self,
        lm: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        max_rows: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Decoding:
        assert self.tokenizer is not None, "sync sets the policy and the tokenizer"
        return Decoding(
            lm,
            list(map(list, prompts)),
            params,
            stop_ids=params.stop_ids(self.tokenizer, lm),
            vocab_size=max(self.tokenizer.get_vocab().values()) + 1,
            interval=self.stop_interval or (1 if lm.device.type == "cpu" else 8),
            max_rows=max_rows,
            generator=generator,
        )


@contextmanager
def _cached_casts(device_type: str) -> Iterator[None]:
    """Let autocast cast each weight once in this context, in which weights do not change.

    Lightning switches the cache of autocast off. All weights would be cast again for every token.
    """
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        yield
        return
    try:
        with torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()  # An outer autocast context would keep the copies until its end.
