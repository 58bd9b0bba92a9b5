"""How a chat looks in the terminal: responses side by side or one below the other."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from rlhf.chat.session import Chat, Response, Turn
from rlhf.printable import printable

MIN_COLUMN = 36  # characters; narrower terminals show responses one below the other
GAP = 3  # characters between two columns


def render_turn(turn: Turn, width: int) -> RenderableType:
    """Return the responses of a turn as they are now.

    Args:
        turn: The turn.
        width: Width of the terminal, in characters.
    """
    responses = turn.responses
    best = best_response(responses)
    blocks = [_block(response, titled=len(responses) > 1, best=response is best) for response in responses]
    if len(blocks) == 1 or width < len(blocks) * (MIN_COLUMN + GAP) - GAP:
        return Group(*(part for block in blocks for part in (*block, Text())))
    table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    for _ in blocks:
        table.add_column(width=(width + GAP) // len(blocks) - GAP, overflow="fold")
    for row in zip(*blocks, strict=True):
        table.add_row(*row)
    return Group(table, Text())


def best_response(responses: Sequence[Response]) -> Response | None:
    """Return the response with the highest score; None if, to two decimals, another one has the same."""
    scored = [(round(response.reward, 2), response) for response in responses if response.reward is not None]
    ordered = sorted(scored, key=lambda pair: pair[0], reverse=True)
    return ordered[0][1] if len(ordered) > 1 and ordered[0][0] > ordered[1][0] else None


def _block(response: Response, *, titled: bool, best: bool) -> tuple[Text, ...]:
    """Return title, text and status of a response."""
    body = Text(printable(response.text), overflow="fold")
    if response.error:
        body = Text(printable(response.error), style="red", overflow="fold")
    title = (Text(printable(response.model), style="bold cyan"),) if titled else ()
    return (*title, body, _status(response, best=best))


def _status(response: Response, *, best: bool) -> Text:
    status = Text(style="dim")
    if response.reward is not None:
        status.append(f"score {response.reward:.2f}", style="not dim bold green" if best else "not dim")
        status.append(", ")
    count = len(response.response_ids)
    status.append(f"{count} token{'' if count == 1 else 's'}")
    if response.state == "truncated":
        status.append(", cut at max_new_tokens", style="yellow")
    elif response.state in ("stopped", "failed"):
        status.append(f", {response.state}", style="yellow")
    if response.prompt_cut:
        status.append(f"; the prompt was cut to its last {len(response.prompt_ids)} tokens", style="yellow")
    return status


class Tail:
    """The last lines of something that may be higher than the terminal.

    Args:
        content: What to show.
        height: Maximum number of lines.
    """

    def __init__(self, content: RenderableType, height: int) -> None:
        self.content, self.height = content, max(height, 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.content, options, pad=False)[-self.height :]:
            yield from line
            yield Segment.line()


def models_table(chat: Chat) -> Table:
    """Return the models of a chat, and how each of them gets its prompts."""
    table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, model in chat.models.items():
        style = "bold cyan" if name in chat.active else "dim"
        prompts = "conversation" if model.multi_turn else "single prompts"
        details = f"{model.parameters / 1e6:.1f}M parameters, {prompts}"
        if name not in chat.active:
            details += ", not used"
        path = "" if model.path == name else f"{printable(model.path)}: "
        table.add_row(Text(printable(name), style=style), Text(f"{path}{details}", overflow="fold"))
    if chat.scores is not None:
        table.add_row(Text("reward model"), Text(printable(chat.scores.path), overflow="fold"))
    for name in unscored(chat):
        note = f"{name} has a different vocabulary from the reward model and gets no score."
        table.add_row(Text(), Text(printable(note), style="yellow"))
    return table


def unscored(chat: Chat) -> list[str]:
    """Return the names of the models that the reward model cannot score."""
    if chat.scores is None:
        return []
    return [name for name, model in chat.models.items() if not chat.scores.can_score(model)]
