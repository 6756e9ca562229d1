"""Warnings of torch that are expected, and do not concern who calls."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

_FILTERING, _ignored = threading.RLock(), Counter[Any]()


@contextlib.contextmanager
def ignoring(message: str = "", kind: type[Warning] = Warning) -> Iterator[None]:
    """Ignore warnings of a kind that begin so, in all threads while one is inside.

    Where two threads overlap, ``warnings.catch_warnings`` leaves the filters of one.
    """
    entry = "ignore", re.compile(message, re.I) if message else None, kind, None, 0
    with _FILTERING:
        if not _ignored[entry]:
            filters: Any = warnings.filters
            filters.insert(0, entry)
        _ignored[entry] += 1
    try:
        yield
    finally:
        with _FILTERING:
            _ignored[entry] -= 1
            if not _ignored[entry]:
                filters = warnings.filters
                # Another thread may have put others in the place of all.
                with contextlib.suppress(ValueError):
                    filters.remove(entry)
