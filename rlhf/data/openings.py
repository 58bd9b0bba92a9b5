"""What a template does to a response: where it begins, how a sampled one begins, and whether its text is changed."""

SHOWN_CHARACTERS = 60


class Openings:
    """Finds where responses begin, and counts those that begin earlier in training than in sampling or are changed.

    The reason for the first is a template whose prompt ends with a text such as ``<think>`` that it does not write
    before a response of the data. The reason for the second is a template that removes the reasoning of a response, for
    example. Differences in white space do not count.

    Attributes:
        missing: Number of responses without a text with which sampled ones begin.
        text: The longest such text. A response that begins with the same characters has a shorter one.
        changed: Number of responses whose text is changed.
    """

    def __init__(self) -> None:
        self.missing = self.changed = 0
        self.text = ""

    def boundary(self, prompt: str, complete: str, response: str) -> int:
        """Return where the response begins.

        Args:
            prompt: The rendered prompt, up to the point where a response is sampled.
            complete: The same conversation with the response.
            response: The response.
        """
        is_changed = response.strip() not in complete and "".join(response.split()) not in "".join(complete.split())
        self.changed += is_changed
        if complete.startswith(prompt):
            return len(prompt)
        boundary = _common_prefix_length(prompt, complete)
        text = prompt[boundary:]
        if text.strip() and not is_changed:
            self.missing += 1
            self.text = max(self.text, text, key=len)
        return boundary

    @property
    def shown(self) -> str:
        """The text in quotes, for messages."""
        return repr(self.text if len(self.text) <= SHOWN_CHARACTERS else self.text[:SHOWN_CHARACTERS] + "...")


def _common_prefix_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
