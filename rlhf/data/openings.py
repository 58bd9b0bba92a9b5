"""Where a response begins in a rendered conversation, and the text with which a template opens only sampled ones."""

SHOWN_CHARACTERS = 60


class Openings:
    """Finds where responses begin, and counts those that begin earlier in training than in sampling.

    The reason is a template whose prompt ends with a text such as ``<think>`` that it does not write before a response
    of the data. Differences in white space do not count.

    Attributes:
        missing: Number of responses without such a text.
        text: The longest such text. A response that begins with the same characters has a shorter one.
    """

    def __init__(self) -> None:
        self.missing = 0
        self.text = ""

    def boundary(self, prompt: str, complete: str) -> int:
        """Return where the response begins.

        Args:
            prompt: The rendered prompt, up to the point where a response is sampled.
            complete: The same conversation with the response.
        """
        if complete.startswith(prompt):
            return len(prompt)
        boundary = _common_prefix_length(prompt, complete)
        text = prompt[boundary:]
        if text.strip():
            self.missing += 1
            self.text = max(self.text, text, key=len)
        return boundary

    @property
    def shown(self) -> str:
        """The text in quotes, for messages."""
        return repr(self.text if len(self.text) <= SHOWN_CHARACTERS else self.text[:SHOWN_CHARACTERS] + "...")


def _common_prefix_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
