"""Checks of the characters of a text: traces of damaged encodings, and control characters."""

import re

from rlhf.doctor.findings import WARNING, Collector, Finding, texts_of
from rlhf.doctor.forms import Split

SHOWN = 12  # characters of the text before and after what was found
# The bytes 80 to BF, which continue a character in UTF-8, as they appear if the text was decoded as Windows-1252.
_CONTINUATION = "".join({bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0xC0)})
_CONTINUATION = re.escape(_CONTINUATION + "".join(map(chr, range(0x80, 0xA0))))
PATTERNS = {
    "replacement": re.compile("\ufffd"),
    "control": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "bom": re.compile("\ufeff"),
    # Letters with accents have two bytes, punctuation such as quotes has three, emoji have four.
    "mojibake": re.compile(
        f"[\u00c2\u00c3][{_CONTINUATION}]|\u00e2\u20ac[{_CONTINUATION}]|\u00f0\u0178[{_CONTINUATION}]"
    ),
}
KINDS = {
    "replacement": (WARNING, "U+FFFD, which replaces bytes that were not valid", "Read the original data as UTF-8."),
    "control": (WARNING, "control characters", "Remove them, unless the model should learn them."),
    "bom": (WARNING, "a byte order mark (U+FEFF) within the text", "Remove it."),
    "mojibake": (WARNING, "UTF-8 that was decoded as Windows-1252", "Read the original data as UTF-8."),
}


def odd_characters(split: Split) -> list[Finding]:
    """Find texts with traces of a damaged encoding, one location per row and kind."""
    found = Collector(KINDS)
    for entry in split.entries:
        for kind, (name, shown) in kinds_in(texts_of(entry.record)).items():
            found.add(kind, f"{split.location(entry.number)} ({name}: {shown})")
    return found.findings()


def kinds_in(texts: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return each kind of odd characters in texts, with the field of the first text that has them and an excerpt."""
    found: dict[str, tuple[str, str]] = {}
    for name, text in texts.items():
        for kind, pattern in PATTERNS.items():
            if kind not in found and (match := pattern.search(text)):
                excerpt = text[max(0, match.start() - SHOWN) : match.end() + SHOWN].replace("\n", " ")
                found[kind] = name, f"'{excerpt}'"
    return found
