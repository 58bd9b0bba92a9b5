"""Pairs of responses to choose from, and the files that they are read from."""

import hashlib
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf.data.json_files import JsonLines
from rlhf.data.records import RecordError
from rlhf.errors import ConfigError, DataError
from rlhf.metrics.evaluation_names import TARGET
from rlhf.run_names import OUTPUTS, RUN, command_in_run


@dataclass(frozen=True)
class Response:
    """One response.

    Args:
        text: The response.
        model: Name of the model that gave it; empty if it is unknown.
        score: Score of the reward model, in reward units; None if there is none.
        scores: Scores of the members of an ensemble.
    """

    text: str
    model: str = ""
    score: float | None = None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt.

    Args:
        prompt: The prompt as a row of data has it: text, or a list of messages.
        first, second: The responses, in the order of the file.
        equal: Names of the models of ``first`` and ``second`` in equal pairs, which other models have given.
    """

    prompt: Any
    first: Response
    second: Response
    equal: tuple[tuple[str, str], ...] = ()

    @property
    def id(self) -> str:
        """What identifies the pair: a hash of its texts, so that it does not depend on the file."""
        content = json.dumps([self.prompt, self.first.text, self.second.text])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def matchups(self) -> tuple[tuple[str, str], ...]:
        """Names of the models of ``first`` and ``second``, for all pairs with these texts."""
        return ((self.first.model, self.second.model), *self.equal)

    @property
    def disagreement(self) -> float | None:
        """Standard deviation over the members of the ensemble of the difference between the two scores."""
        if len(self.first.scores) < 2 or len(self.first.scores) != len(self.second.scores):
            return None
        differences = [a - b for a, b in zip(self.first.scores, self.second.scores, strict=True)]
        return statistics.pstdev(differences)

    def prompt_text(self) -> str:
        """Return the prompt as one text, with the roles of the messages of a conversation."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


def read_pairs(path: Path, models: Sequence[str] | None = None, run: Path = Path(OUTPUTS, RUN)) -> list[Pair]:
    """Read the pairs of a file: ``samples.jsonl`` of an evaluation, or ``candidates.jsonl`` of ``stage=collect``.

    Every two responses to a prompt form a pair. Identical responses do not, and equal pairs of several models are one.

    Args:
        path: The file.
        models: Names of the models whose responses are compared; None: all models in the file.
        run: Directory of the run that the message about a missing file suggests to evaluate.

    Raises:
        ConfigError: There is no such file, or it has no responses of these models.
        DataError: A row has another form.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ConfigError(
            f"command.pairs={path}: there is no such file, or it is empty.",
            f"Run {command_in_run(run, 'stage=evaluate')}, or set command.pairs=<file> to a candidates.jsonl of "
            "stage=collect.",
        )
    rows = JsonLines(str(path))
    found: dict[tuple[str, frozenset[str]], Pair] = {}
    names: set[str] = set()
    for index in range(len(rows)):
        try:
            prompt, responses = _read_row(rows[index])
        except (RecordError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}:{rows.line_number(index)}: the row must have a prompt and responses, as samples.jsonl and "
                f"candidates.jsonl have ({error}).",
                "Set command.pairs=outputs/<run>/evaluation/samples.jsonl",
            ) from error
        names |= {response.model for response in responses}
        for pair in _pairs(prompt, [r for r in responses if models is None or r.model in models]):
            texts = pair.prompt_text(), frozenset({pair.first.text, pair.second.text})
            found[texts] = _with_models(found[texts], pair) if texts in found else pair
    if models is not None and (unknown := [name for name in models if name not in names]):
        raise ConfigError(
            f"command.models contains {unknown[0]}, but {path} has responses of {', '.join(sorted(names))}.",
            f"Set command.models=[{','.join(sorted(names))}].",
        )
    if not found:
        raise ConfigError(f"{path} contains no prompt with two different responses.", "Compare other models.")
    return list(found.values())


def in_order(pairs: Sequence[Pair], select: str, seed: int) -> list[Pair]:
    """Return pairs in the order in which they are shown.

    Args:
        pairs: The pairs, in the order of the file.
        select: ``order`` of the file, ``random``, or ``disagreement``: those first about whose difference the members
            of the reward ensemble disagree most.
        seed: Seed of the random order.

    Raises:
        ConfigError: The pairs have no scores of an ensemble.
    """
    if select == "random":
        return random.Random(seed).sample(list(pairs), len(pairs))
    if select != "disagreement":
        return list(pairs)
    if any(pair.disagreement is None for pair in pairs):
        raise ConfigError(
            "command.select=disagreement requires the scores of an ensemble, which the pairs do not have.",
            "Collect them: python train.py stage=collect 'stage.reward_model=[<path>,<path>]'",
        )
    return sorted(pairs, key=lambda pair: -(pair.disagreement or 0.0))


def _read_row(row: Any) -> tuple[Any, list[Response]]:
    prompt, responses = row["prompt"], row["responses"]
    if isinstance(responses, dict):
        found = [_response({"model": name, **entry}) for name, entry in responses.items() if name != TARGET]
    else:
        found = [_response(entry) for entry in responses]
    is_conversation = isinstance(prompt, list) and all(
        isinstance(message["role"], str) and isinstance(message["content"], str) for message in prompt
    )
    if not isinstance(prompt, str) and not is_conversation:
        raise ValueError("the prompt must be text or a list of messages")
    json.dumps(prompt, ensure_ascii=False).encode()  # Half of a surrogate pair raises an error.
    return prompt, found


def _response(entry: dict[str, Any]) -> Response:
    text, score = entry["text"], entry.get("score", entry.get("reward"))
    if not isinstance(text, str):
        raise ValueError("a response must be text")
    text.encode()
    scores = tuple(float(value) for value in entry.get("scores") or ())
    return Response(text, str(entry.get("model", "")), None if score is None else float(score), scores)


def _with_models(pair: Pair, other: Pair) -> Pair:
    """Return a pair with the names of the models that have given the same two responses."""
    names = {response.text: response.model for response in (other.first, other.second)}
    models = names[pair.first.text], names[pair.second.text]
    return pair if models in pair.matchups else replace(pair, equal=(*pair.equal, models))


def _pairs(prompt: Any, responses: Sequence[Response]) -> Iterator[Pair]:
    for first, second in combinations(responses, 2):
        if first.text != second.text:
            yield Pair(prompt, first, second)
