"""Readers of the files that `detect.py` writes."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """Parser of a page: its elements, and the JSON in its script elements.

    Attributes:
        elements: name and attributes of each, in order.
        data: content of its JSON.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: dict[str | None, str] = {}
        self._script: tuple[str | None] | None = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.data: dict[str, Any] = json.loads(self._texts["data"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = (dict(attrs).get("id"),) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self._texts[self._script[0]] = self._texts.get(self._script[0], "") + data
