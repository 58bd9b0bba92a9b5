"""``stage=chat``: open the models of a run and talk to them in the terminal."""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from rlhf.artifacts import open_policies, open_sources, output_of
from rlhf.chat.models import ChatModel, RewardScores, Runtime
from rlhf.chat.session import Chat
from rlhf.chat.terminal import run_terminal
from rlhf.config import check_values
from rlhf.logs import quiet_libraries
from rlhf.models import as_sequence
from rlhf.sampling import SamplingParams
from rlhf.schema import Port, PositiveInt


def chat(
    cfg: DictConfig,
    *,
    models: Sequence[str] | Mapping[str, str] | None = None,
    reward_model: str | Sequence[str] | None = None,
    sampling: SamplingParams | None = None,
    template: str | None = None,
    system: str | None = None,
    multi_turn: bool | None = None,
    max_length: PositiveInt | None = None,
    browser: bool = False,
    host: str = "127.0.0.1",
    port: Port = 8089,
    token: str | None = None,
) -> int:
    """Talk to one or several models, which respond to the same prompts.

    Args:
        cfg: The composed configuration.
        models: Models that respond: names of stages or variants of the run, or paths of ``*_final.pt`` files,
            checkpoints or Hugging Face folders; a mapping gives them names. null: all policies of the run.
        reward_model: Reward model that scores the responses, or several as an ensemble. null: the reward model of the
            run, if there is one.
        sampling: Sampling settings, equal for all models.
        template: Text around the prompt, with ``{prompt}`` in it. null: the chat template that each model carries.
        system: System message at the beginning of each conversation. null: none.
        multi_turn: Whether earlier messages are part of the prompt. null: for models with a chat template for
            conversations.
        max_length: Maximum length of prompt and response together, in tokens. Longer prompts lose their beginning.
            null: ``data.max_length`` of the training that made the model, where it is known.
        browser: Show the chat as a page in the browser instead of the terminal.
        host: Address that the page's server listens on. Any address other than that of this machine requires a token.
        port: Port of the server. 0 chooses a free one.
        token: Secret of at least 16 characters that the address of the page contains. null: one is generated if
            ``host`` requires it.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended the chat.

    Raises:
        UserError: A model does not exist or cannot be opened.
    """
    quiet_libraries()
    check_values(cfg, ("command", "trainer"))
    if not browser and not (sys.stdin.isatty() and sys.stdout.isatty()):
        logging.getLogger("rlhf").setLevel(logging.WARNING)  # Standard output is for responses.
    opened = open_chat(
        cfg,
        models=models,
        reward_model=reward_model,
        sampling=sampling,
        system=system,
        template=template,
        multi_turn=multi_turn,
        max_length=max_length,
    )
    if browser:
        from rlhf.chat.web import run_browser  # imports a server

        return run_browser(opened, host=host, port=port, token=token)
    return run_terminal(opened)


def open_chat(
    cfg: DictConfig,
    *,
    models: Sequence[str] | Mapping[str, str] | None,
    reward_model: str | Sequence[str] | None,
    sampling: SamplingParams | None,
    system: str | None,
    **model_settings: Any,
) -> Chat:
    """Open the models of a chat. Arguments as for ``chat``; ``model_settings`` are those of each model."""
    sources = open_policies(cfg, models, key="command.models")
    runtime = Runtime.of_trainer(cfg)
    opened = {name: ChatModel(name, source, runtime, **model_settings) for name, source in sources.items()}
    chosen = reward_model or output_of(cfg, "reward")
    scores = None
    if chosen:
        members = as_sequence(open_sources(cfg, chosen))
        vocabulary = members[0].tokenizer(()).get_vocab()
        tokenizers = [model.tokenizer for model in opened.values()]
        fitting = [tokenizer for tokenizer in tokenizers if tokenizer.get_vocab() == vocabulary]
        if fitting or reward_model:
            scores = RewardScores(members, (fitting or tokenizers)[0], runtime)
    return Chat(opened, sampling=sampling or SamplingParams(), seed=int(cfg.seed), scores=scores, system=system)
