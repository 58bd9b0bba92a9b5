"""Reads a report as a browser does: elements, tables and embedded JSON."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "input", "br", "wbr", "img", "link"}


@dataclass
class Page:
    """What a report contains.

    Args:
        tables: Rows of each table by its identifier; a cell is its text and its exact value, if it is a number.
        data: Embedded JSON by the identifier of its element.
        elements: Tag and attributes of every element.
        text: All text outside of scripts and style sheets.
    """

    tables: dict[str, list[list[tuple[str, float | None]]]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    text: str = ""

    def values(self, table: str) -> dict[str, list[float | None]]:
        """Return the values of each row by the text of its first cell."""
        return {row[0][0]: [value for _, value in row[1:]] for row in self.tables[table]}


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.inside: list[tuple[str, dict[str, str | None]]] = []
        self.table = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.page.elements.append((tag, attributes))
        if tag not in VOID:
            self.inside.append((tag, attributes))
        if tag == "table":
            self.table = str(attributes.get("id"))
            self.page.tables[self.table] = []
        elif tag == "tr" and any(name == "tbody" for name, _ in self.inside):
            self.page.tables[self.table].append([])
        elif tag == "td":
            value = attributes.get("data-value")
            self.page.tables[self.table][-1].append(("", None if value is None else float(value)))

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, attributes = self.inside[-1] if self.inside else ("", {})
        if tag == "script":
            if attributes.get("type") == "application/json":
                self.page.data[str(attributes["id"])] = json.loads(data)
            else:
                self.page.scripts.append(data)
        elif tag != "style":
            self.page.text += data
            if any(name == "td" for name, _ in self.inside) and not any(
                "detail" in str(own.get("class")) for _, own in self.inside
            ):
                row = self.page.tables[self.table][-1]
                row[-1] = (row[-1][0] + data.strip(), row[-1][1])


def read_page(path: Path) -> Page:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.page
