"""Links from sources back to the reference, also for names that two modules have.

``sphinx.ext.viewcode`` takes one module's name for all that a file defines. Here a name
that it gets wrong is looked up among those that the reference has.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


def mend(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    if not page.startswith("_modules/") or "body" not in context:
        return
    known = app.env.get_domain("py").objects
    own = [name for name, entry in known.items() if not entry.aliased]

    def mended(link: re.Match[str]) -> str:
        parts = link[2].split(".")
        for start in range(1, len(parts)):
            ending = "." + ".".join(parts[start:])
            found = [name for name in own if name.endswith(ending)]
            if link[2] not in known and len(found) == 1:
                return f'href="{link[1]}#{found[0]}"'
        return link[0]

    context["body"] = re.sub(r'href="([^"#]*)#([\w.]+)"', mended, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", mend)
    return {"parallel_read_safe": True}
