"""``stage=label``: serve the preference page."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from rlhf.errors import ConfigError
from rlhf.files import locked
from rlhf.label.pairs import Pair, in_order, read_pairs
from rlhf.label.session import Session
from rlhf.printable import printable
from rlhf.schema import Fraction, Port, PositiveInt
from rlhf.web.access import Access


def label(
    cfg: DictConfig,
    *,
    pairs: str | None = None,
    models: Sequence[str] | None = None,
    select: Literal["order", "random", "disagreement"] = "random",
    max_pairs: PositiveInt | None = None,
    overlap: Fraction = 0.1,
    host: str = "127.0.0.1",
    port: Port = 8088,
    token: str | None = None,
    output: str = "outputs/rlhf/label",
) -> int:
    """Serve a page on which people choose between two responses, until SIGINT or SIGTERM.

    Args:
        cfg: The composed configuration.
        pairs: File with the responses: ``samples.jsonl`` of an evaluation, or ``candidates.jsonl`` of
            ``stage=collect``. null: the evaluation of the run.
        models: Names of the models whose responses are compared, such as ``[sft,ppo]``. null: all in the file.
        select: Order of the pairs: ``order`` of the file, ``random``, or ``disagreement`` of the reward ensemble.
        max_pairs: Number of pairs, the first ones in this order. null: all.
        overlap: Share of the pairs that every annotator labels. Each other pair is labeled by one of them.
        host: Address to listen on. Any address other than that of this machine requires a token.
        port: Port to listen on. 0: any free one.
        token: Secret in the address of the page. null: none on this machine, otherwise a random one.
        output: Directory of ``journal.jsonl``, with every choice, and of ``preferences.jsonl``, which ``stage=reward``
            and ``stage=dpo`` read.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: There are no pairs, or the address cannot be used.
    """
    from rlhf.web.server import bind  # Imported here: training needs no server.

    path = Path(pairs) if pairs is not None else Path(cfg.paths.run) / "evaluation" / "samples.jsonl"
    found = in_order(read_pairs(path, models, Path(cfg.paths.run)), select, cfg.seed)[:max_pairs]
    access = Access.of(host, token)
    with bind(host, port) as bound:
        serve_pairs(found, Path(output), access, bound, overlap=overlap, seed=cfg.seed)
    return 0


def serve_pairs(
    pairs: Sequence[Pair],
    directory: Path,
    access: Access,
    bound: socket.socket,
    *,
    overlap: float = 0.1,
    seed: int = 1,
    until_complete: bool = False,
) -> Session:
    """Serve the page for pairs, and return the session when the server has ended.

    Args:
        pairs: Pairs in the order in which they are shown.
        directory: Directory of the journal and of the preference file.
        access: Who may send requests.
        bound: Socket of ``rlhf.web.server.bind``.
        overlap: Share of the pairs that every annotator labels.
        seed: Seed of the sides on which responses are shown.
        until_complete: End when every pair has been labeled or skipped.

    Raises:
        ConfigError: There are no pairs, or another process uses the directory.
    """
    # Imported here: training needs no server.
    from rlhf.label.app import label_application
    from rlhf.web.server import serve

    if not pairs:
        raise ConfigError("There are no pairs to label.", "Set command.pairs=<file>")
    console = Console(highlight=False, soft_wrap=True)
    with locked(directory):
        session = Session(pairs, directory, overlap=overlap, seed=seed)
        progress = session.progress("")
        console.print(f"{progress['total']} pairs, {progress['labeled']} of them labeled. Open in a browser:")
        console.print(Text(f"  {access.url(bound.getsockname()[1])}"))
        is_done = (lambda: session.is_complete) if until_complete else None
        serve(label_application(session, access), bound, is_done=is_done)
        journal, preferences = printable(str(session.journal.path)), printable(str(session.preferences))
        console.print(Text(f"Every choice is in {journal}; the pairs that it decides are in\n  {preferences}"))
    return session
