"""Progress bars for what passes over the data, where they were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from vivit_linop.bars import bar

Item = TypeVar("Item")


def shown(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield batches, behind a bar that goes away at the end.

    Args:
        items: The batches.
        what: What the pass is for.
        total: How many there are, 0 if that is not known.
    """
    with bar(items, desc=what, total=total or None, unit="batch", leave=False) as seen:
        yield from seen
