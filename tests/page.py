"""A reader of the HTML pages, for the tests of them."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "rect", "path"}


class Page(HTMLParser):
    """A page that was read: its text, its pictures' alt texts, and every attribute that could load something."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.text, self.alts, self.loads, self.open, self.tags = "", [], [], [], set()
        self.feed(Path(path).read_text())
        assert self.open == [], "tags left open"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.loads += [values[name] for name in ("src", "href", "srcset", "data", "action") if name in values]
        if tag == "img":
            assert values["alt"]
            self.alts.append(values["alt"])
        if tag == "html":
            assert values["lang"] == "en"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f" {data}"

    def assert_self_contained(self) -> None:
        assert not self.tags & {"script", "link", "iframe", "object", "a", "i"}
        assert all(str(load).startswith("data:image/") for load in self.loads)
