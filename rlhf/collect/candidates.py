"""The responses to a prompt, from which pairs are made."""

from dataclasses import dataclass, field
from typing import Any

from rlhf.data import Prompt


@dataclass
class Candidates:
    """The responses to one prompt.

    Args:
        prompt: The prompt.
        texts: The responses.
        scores: Score of each response, in reward units; empty if they have none.
        members: Scores of the members of an ensemble for each response; empty without one.
        truncated: Number of responses without a stop token.
    """

    prompt: Prompt
    texts: list[str]
    scores: list[float] = field(default_factory=list)
    members: list[list[float]] = field(default_factory=list)
    truncated: int = 0

    def row(self) -> dict[str, Any]:
        """Return the responses as a row of ``candidates.jsonl``, which ``stage=label`` reads."""
        responses: list[dict[str, Any]] = [{"text": text} for text in self.texts]
        for response, score in zip(responses, self.scores, strict=False):
            response["score"] = round(score, 4)
        for response, members in zip(responses, self.members, strict=False):
            response["scores"] = [round(score, 4) for score in members]
        return {"prompt": self.prompt_field(), "target": self.prompt.target, "responses": responses}

    def prompt_field(self) -> Any:
        """Return the prompt as a row of data has it: text, or a list of messages."""
        messages = self.prompt.messages
        is_text = len(messages) == 1 and messages[0]["role"] == "user"
        return messages[0]["content"] if is_text else [dict(message) for message in messages]
