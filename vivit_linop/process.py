"""What is one for the process: set by the first that needs it, put back by the last."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

Undo = list[Callable[[], object]]


class Shared:
    """What is one for the process: set by the first that enters, put back by the last.

    Args:
        set_for: Sets it for a device, and says how that is undone.

    Attributes:
        lock: Held while they change.
        undo: What is to be put back; empty while nothing had to be set.
    """

    def __init__(self, set_for: Callable[[torch.device | None, Undo], None]) -> None:
        self._set_for = set_for
        # Reentrant: a handler of signals may run a product in the middle of this.
        self.lock, self._inside = threading.RLock(), 0
        self.undo: Undo = []
        self._devices: set[torch.device | None] = set()

    def enter(self, device: torch.device | None = None) -> None:
        """Set the switches, unless another thread has for this device."""
        with self.lock:
            self._inside += 1
            if device in self._devices:
                return
            try:
                self._set_for(device, self.undo)
            except BaseException:
                self.leave()
                raise
            self._devices.add(device)

    @contextlib.contextmanager
    def inside(self, device: torch.device | None = None) -> Iterator[None]:
        """Enter and leave."""
        self.enter(device)
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Put the switches back, if nobody else is inside."""
        with self.lock:
            self._inside -= 1
            if self._inside:
                return
            self._devices.clear()
            while self.undo:
                self.undo.pop()()


def ignoring(
    message: str = "", kind: type[Warning] = Warning
) -> contextlib.AbstractContextManager[None]:
    """Ignore warnings of a kind that begin so, in all threads while one is inside.

    They are torch's, expected, and do not concern who calls. Where two threads overlap,
    ``warnings.catch_warnings`` leaves the filters of one.
    """
    entry = "ignore", re.compile(message, re.I) if message else None, kind, None, 0
    filtered = _FILTERS.setdefault(entry, Shared(functools.partial(_ignore, entry)))
    return filtered.inside()


_FILTERS: dict[Any, Shared] = {}


def _ignore(entry: Any, _: torch.device | None, undo: Undo) -> None:
    _filters().insert(0, entry)
    undo.append(functools.partial(_heed, entry))


def _heed(entry: Any) -> None:
    # Another thread may have put others in the place of all.
    with contextlib.suppress(ValueError):
        _filters().remove(entry)


def _filters() -> Any:
    return warnings.filters
