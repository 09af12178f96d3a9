"""Reading a report page without a browser, and what a browser is asked about one."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page: (tag, attributes) in order, and the texts of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> ends {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if self.open and self.open[-1] in ("script", "style", "title"):
            self.texts.append((tag, attributes, data))

    @property
    def data(self) -> dict[str, Any]:
        """What the page holds of its runs."""
        texts = [text for _, attributes, text in self.texts if attributes.get("id") == "data"]
        return json.loads("".join(texts))


LOW_CONTRAST = (Path(__file__).parent / "report" / "contrast.js").read_text()
"""Function body for a browser: texts whose contrast with their background is too low."""
