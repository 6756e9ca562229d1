"""The directive ``tree``: what a notebook shows of an operator that a page has made.

The Python blocks above it run, and what stands behind its name is evaluated.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Tree(SphinxDirective):
    """Put in the tree of an expression, as HTML."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.doc2path(self.env.docname))
        above = "\n".join(path.read_text(encoding="utf-8").split("\n")[: self.lineno])
        namespace: dict[str, Any] = {"__name__": path.stem}
        with contextlib.redirect_stdout(io.StringIO()):
            for block in BLOCK.findall(above):
                exec(block, namespace)
        tree = eval(self.arguments[0], namespace)._repr_html_()
        code = f"<code>{self.arguments[0]}</code>"
        page = f'<div class="notebook">{code}{tree}</div>'
        return [nodes.raw("", page, format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("tree", Tree)
    return {"parallel_read_safe": True}
