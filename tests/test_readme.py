"""The Python blocks of the Markdown pages run and print what the pages say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.host("shows what the CPU prints")

ROOT = Path(__file__).parents[1]
# index.md is made of parts of the README.
PAGES = [
    ROOT / "README.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "index.md"}),
    *sorted((ROOT / "docs" / "extending").glob("*.md")),
    *sorted((ROOT / "docs" / "tutorial").glob("*.md")),
]
# A block of Python, and a block of text if nothing but white space is between them.
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
# What the documentation shows as a notebook would.
TREE = re.compile(r"^```\{tree\} (.+)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_print_what_the_page_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python"), "a block is not closed"
    namespace: dict[str, object] = {"__name__": page.stem}  # one for the whole page
    for block in blocks:
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        expected = block["output"] or ""
        assert printed.getvalue() == expected, f"{page.name}, line {line + 1}"
    for expression in TREE.findall(text):
        assert "<details open>" in eval(expression, namespace)._repr_html_()


def test_pages_have_blocks_with_output() -> None:
    """The pattern above finds something."""
    for page in PAGES:
        blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
        assert any(block["output"] for block in blocks), page.name
