"""Who decides which response is better: a reward function, or people."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf.collect.candidates import Candidates
from rlhf.collect.objective import best_and_worst
from rlhf.errors import Stopped
from rlhf.label import serve_pairs
from rlhf.label.pairs import read_pairs
from rlhf.schema import Fraction, Port
from rlhf.web.access import Access


class Labels:
    """Base class of the sources of labels.

    Attributes:
        needs_scores: Whether the responses must be scored by the reward function.
        needs_single_process: Whether only a run on one process can use it.
    """

    needs_scores = False
    needs_single_process = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold what labeling needs, such as the port of a page. The context begins before responses are sampled."""
        yield

    def label(self, candidates: Sequence[Candidates], file: Path) -> list[dict[str, Any]]:
        """Return preference rows.

        Args:
            candidates: The responses to each prompt.
            file: The same responses in ``candidates.jsonl``.
        """
        raise NotImplementedError


class RewardLabels(Labels):
    """The best and the worst response to each prompt form a pair, by the score of the reward function.

    Identical responses, and responses with equal scores, form none.
    """

    needs_scores = True

    def label(self, candidates: Sequence[Candidates], file: Path) -> list[dict[str, Any]]:
        rows = []
        scores = torch.tensor([candidate.scores for candidate in candidates])
        for candidate, (best, worst) in zip(candidates, best_and_worst(scores).tolist(), strict=True):
            chosen, rejected = candidate.texts[best], candidate.texts[worst]
            if chosen != rejected:
                rows.append(
                    {
                        "prompt": candidate.prompt_field(),
                        "chosen": chosen,
                        "rejected": rejected,
                        "chosen_score": round(candidate.scores[best], 4),
                        "rejected_score": round(candidate.scores[worst], 4),
                    }
                )
        return rows


class PageLabels(Labels):
    """People decide, on the page of ``stage=label``. The stage waits until every pair has been labeled or skipped.

    Args:
        overlap: Share of the pairs that every annotator labels. Each other pair is labeled by one of them.
        host: Address to listen on. Any address other than that of this machine requires a token.
        port: Port to listen on. 0: any free one.
        token: Secret in the address of the page. null: none on this machine, otherwise a random one.
    """

    needs_single_process = True

    def __init__(
        self, *, overlap: Fraction = 0.1, host: str = "127.0.0.1", port: Port = 8088, token: str | None = None
    ) -> None:
        self.overlap, self.port = overlap, port
        self.access = Access.of(host, token, "labels")
        self._bound: socket.socket | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Occupy the port, so that one that is in use is reported before responses are sampled.

        Raises:
            ConfigError: The address cannot be used.
        """
        from rlhf.web.server import bind  # Imported here: training needs no server.

        with bind(self.access.host, self.port, "labels") as self._bound:
            yield

    def label(self, candidates: Sequence[Candidates], file: Path) -> list[dict[str, Any]]:
        """Return preference rows. This is called in the context of ``opened``.

        Raises:
            Stopped: The server was stopped before every pair was labeled.
        """
        assert self._bound is not None
        pairs, folder = read_pairs(file), file.parent / "label"
        session = serve_pairs(pairs, folder, self.access, self._bound, overlap=self.overlap, until_complete=True)
        if not session.is_complete:
            progress = session.progress("")
            raise Stopped(
                f"Labeling was stopped: {progress['labeled']} of {progress['total']} pairs are labeled.",
                "Every choice is on disk. Repeat the command to continue, in a pipeline with resume=true.",
                exit_code=130,
            )
        return session.rows  # The file also has rows of earlier sessions with other responses.
