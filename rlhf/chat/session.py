"""A chat without a user interface: prompts, the responses of all models as they are sampled, and their scores."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from rlhf.chat.models import ChatModel, RewardScores
from rlhf.chat.text import TokenText
from rlhf.data import Message
from rlhf.errors import ConfigError, UserError
from rlhf.sampling import SamplingParams

log = logging.getLogger(__name__)

State = Literal["running", "finished", "truncated", "stopped", "failed"]
LARGEST_SEED = 2**32 - 1


@dataclass
class Response:
    """The response of one model to one prompt.

    Args:
        model: Name of the model.
        prompt_ids: Token ids of the prompt.
        prompt_cut: Whether the beginning of the prompt was removed because it was too long.
        response_ids: Token ids of the response so far, including its stop token.
        text: The response so far, without special tokens.
        state: ``truncated``: it has reached ``max_new_tokens``. ``stopped``: the user has interrupted it. ``failed``:
            the model could not continue it.
        reward: Score of the reward model; None if there is no finite one, or if the response is not complete.
        seconds: Time that sampling has taken.
        error: Why the response has failed.
    """

    model: str
    prompt_ids: list[int]
    prompt_cut: bool = False
    response_ids: list[int] = field(default_factory=list)
    text: str = ""
    state: State = "running"
    reward: float | None = None
    seconds: float = 0.0
    error: str = ""


@dataclass
class Turn:
    """One prompt with the responses of all models.

    Args:
        prompt: The prompt, without a template.
        seed: Seed from which each response was sampled.
        sampling: Sampling settings.
        conversation: Number of the conversation, from 1.
        responses: One response for each model.
    """

    prompt: str
    seed: int
    sampling: SamplingParams
    conversation: int
    responses: list[Response]

    @property
    def is_running(self) -> bool:
        """Whether a response is not complete."""
        return any(response.state == "running" for response in self.responses)

    def describe(self) -> dict[str, Any]:
        """Return the turn for a JSON file. The responses have the form of samples.jsonl of ``stage=evaluate``."""
        responses = {
            response.model: {
                "text": response.text,
                **({} if response.reward is None else {"reward": round(response.reward, 4)}),
                "length": len(response.response_ids),
                "truncated": float(response.state == "truncated"),
                "state": response.state,
            }
            for response in self.responses
        }
        return {
            "prompt": self.prompt,
            "conversation": self.conversation,
            "seed": self.seed,
            "sampling": asdict(self.sampling),
            "responses": responses,
        }


class Chat:
    """A conversation with one or several models, which get the same prompts. Models of a chat share nothing else.

    The responses to one prompt are sampled in turns, one token of each model after the other, each with its own random
    state. They do not depend on which other models take part, and equal those of ``LocalSampler.sample`` after
    ``torch.manual_seed``. The seed of the next prompt is greater by 1.

    Args:
        models: The models by name.
        sampling: Sampling settings of all models.
        seed: Seed of the first prompt.
        scores: Scores of the reward model; None if there is none.
        system: Text of the system message with which each conversation begins; None for none.

    Attributes:
        turns: All prompts so far with their responses.
        active: Names of the models that respond.
    """

    def __init__(
        self,
        models: Mapping[str, ChatModel],
        *,
        sampling: SamplingParams,
        seed: int = 1,
        scores: RewardScores | None = None,
        system: str | None = None,
    ) -> None:
        self.models = dict(models)
        self.sampling, self.seed, self.scores, self.system = sampling, seed, scores, system
        self.active = list(models)
        self.turns: list[Turn] = []
        self.conversation = 1
        self._left_out: list[Turn] = []
        self._running: list[_Running] = []

    @property
    def sampling(self) -> SamplingParams:
        """Sampling settings of the next prompts."""
        return self._sampling

    @sampling.setter
    def sampling(self, params: SamplingParams) -> None:
        for model in self.models.values():
            model.stop_ids(params)  # Report an unknown stop token.
            if params.max_new_tokens >= model.max_length:
                raise ConfigError(
                    f"max_new_tokens must be less than {model.max_length}, the length of prompt and response together "
                    f"that {model.name} supports, got {params.max_new_tokens}.",
                    f"Set it to {model.max_length // 2}.",
                )
        self._sampling = params

    def ask(self, prompt: str) -> Turn:
        """Begin the responses of all active models to a prompt. ``step`` continues them.

        Raises:
            UserError: A chat template does not support the conversation.
        """
        self.stop()
        prompt = prompt.encode("utf-8", "replace").decode()  # A terminal or JSON may contain halves of characters.
        encoded = {
            name: self.models[name].encode(self.messages(name, prompt), reserve=self.sampling.max_new_tokens)
            for name in self.active
        }
        responses = [Response(name, input_ids, cut) for name, (input_ids, cut) in encoded.items()]
        turn = Turn(prompt, self.seed, self.sampling, self.conversation, responses)
        self._running = [_Running(response, self.models[response.model], turn) for response in responses]
        self.turns.append(turn)
        self.seed = (self.seed + 1) % (LARGEST_SEED + 1)
        return turn

    def step(self) -> bool:
        """Continue each running response by one token, and score those that are complete.

        Returns:
            Whether a response is still running.
        """
        for running in self._running:
            running.step()
            if running.response.state in ("finished", "truncated"):
                self._score(running)
        self._running = [running for running in self._running if running.response.state == "running"]
        return bool(self._running)

    def stop(self) -> None:
        """Stop all running responses. They keep the text that they have."""
        for running in self._running:
            running.response.state = "stopped"
        self._running = []

    def reset(self) -> None:
        """Begin a new conversation."""
        self.stop()
        self.conversation += 1

    def leave_out(self, turn: Turn) -> None:
        """Leave a turn out of the conversation that models get from now on."""
        self._left_out.append(turn)

    def messages(self, name: str, prompt: str) -> list[Message]:
        """Return the messages that a model gets with a prompt: the conversation so far if it uses earlier messages."""
        found: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        if self.models[name].multi_turn:
            for turn in self.turns:
                own = [response for response in turn.responses if response.model == name and response.state != "failed"]
                is_part = turn.conversation == self.conversation and not any(turn is left for left in self._left_out)
                if is_part and own:
                    found += [
                        {"role": "user", "content": turn.prompt},
                        {"role": "assistant", "content": own[0].text},
                    ]
        return [*found, {"role": "user", "content": prompt}]

    def _score(self, running: "_Running") -> None:
        model, response = running.model, running.response
        if self.scores is not None and self.scores.can_score(model):
            score = self.scores.score(response.prompt_ids, response.response_ids, model, running.stop_ids)
            if math.isfinite(score):
                response.reward = score
            else:
                log.warning(
                    "The reward model gives the response of %s the score %s, which is left out.", model.name, score
                )


class _Running:
    """A response that is being sampled."""

    def __init__(self, response: Response, model: ChatModel, turn: Turn) -> None:
        self.response, self.model, self.params = response, model, turn.sampling
        self.text = TokenText(model.tokenizer)
        self.stop_ids = model.stop_ids(self.params)
        generator = torch.Generator(model.runtime.device).manual_seed(turn.seed)
        self.tokens = model.sampler.stream(response.prompt_ids, self.params, generator)

    def step(self) -> None:
        """Sample the next token."""
        response, started = self.response, time.perf_counter()
        try:
            with torch.inference_mode(), self.model.runtime.forward_context():
                token = next(self.tokens)
        except UserError as error:
            response.state, response.error = "failed", str(error)
            return
        finally:
            response.seconds += time.perf_counter() - started
        response.response_ids.append(token)
        self.text.append(token)
        response.text = self.text.text
        if token in self.stop_ids:
            response.state = "finished"
        elif len(response.response_ids) == self.params.max_new_tokens:
            response.state = "truncated"
        if response.state != "running":
            response.text = self.text.final()
