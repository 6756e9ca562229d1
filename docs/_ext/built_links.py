"""Looks at all links of the built pages: files and places in them that are not there.

What is wrong is a warning, and with ``-W`` an error. Links to other sites are left to
``sphinx -b linkcheck``.
"""

from __future__ import annotations

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


class Page(HTMLParser):
    """The links of a page, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def check(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.name != "html":
        return
    read = cache(Page)
    folder = Path(app.outdir)
    for path in sorted(folder.rglob("*.html")):
        if "_static" in path.parts:
            continue
        for link in read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)) if parts.path else path
            place = unquote(parts.fragment)
            there = target.exists()
            if there and place and target.suffix == ".html":
                there = place in read(target.resolve()).places
            if not there:
                logger.warning("%s: %s leads nowhere", path.relative_to(folder), link)


def setup(app: Sphinx) -> dict[str, bool]:
    # After what copies files at the end.
    app.connect("build-finished", check, priority=900)
    return {"parallel_read_safe": True}
