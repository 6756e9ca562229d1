"""Bars on stderr, for whoever waits; in a log a line from time to time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

# In a log, seconds until the first line, and between lines.
_LOG_SECONDS = 10.0
Item = TypeVar("Item")


def is_log() -> bool:
    """Whether stderr is neither a terminal nor a notebook's."""
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    return not (in_notebook or sys.stderr.isatty())


def bar(*items: Any, **given: Any) -> tqdm:
    """Return a bar of tqdm, which in a log says something every ten seconds at most."""
    if is_log():
        given |= {"delay": _LOG_SECONDS, "mininterval": _LOG_SECONDS}
    return tqdm(*items, **given)


def shown(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield batches, ``total`` or 0 if unknown, behind a bar that goes away at the end.

    It says what they are for.
    """
    with bar(items, desc=what, total=total or None, unit="batch", leave=False) as seen:
        yield from seen
