"""What a risk keeps for all operators of it: one store, one lock and one budget.

Linearisations, the structure of the net, costs and columns are made once, at the first
product that needs them. None of them may refer to the risk: it would not be freed with
the last reference. They hold graphs, so they do not travel: a copy makes them anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from vivit_linop.risk.memory import free_memory

Value = TypeVar("Value")


class Kept:
    """What has been made once.

    Args:
        memory: The bytes that it may take, None for a share of what is free.
        device: Where it is.

    Attributes:
        making: The lock of what is made, for all threads.
        nbytes: What is kept by :meth:`add`.
    """

    def __init__(self, memory: int | None, device: torch.device) -> None:
        self._memory, self._device = memory, device
        self.drop()

    def drop(self) -> None:
        """Let go of everything."""
        self.making = threading.RLock()
        self._values: dict[Hashable, Any] = {}
        self.nbytes = 0.0

    def budget(self, share: int) -> int:
        """Return the bytes that may be taken: what the user said, or a share of all.

        Args:
            share: Into how many parts free memory is divided otherwise.
        """
        if self._memory is not None:
            return self._memory
        return free_memory(self._device) // share

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return a value, which is made at the first call; small ones are not counted.

        Args:
            key: What it is.
            make: Makes it; by one thread, the others wait.
        """
        if key not in self._values:
            with self.making:
                if key not in self._values:
                    self._values[key] = make()
        value: Value = self._values[key]
        return value

    def find(self, key: Hashable) -> Any | None:
        """Return a value if it is kept, else None."""
        return self._values.get(key)

    def add(self, key: Hashable, value: Any, nbytes: float) -> None:
        """Keep a value, and count what it takes."""
        with self.making:
            self._values[key] = value
            self.nbytes += nbytes

    def __getstate__(self) -> dict[str, Any]:
        """What travels: the budget."""
        return {"_memory": self._memory, "_device": self._device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive, with nothing."""
        self.__dict__.update(state)
        self.drop()
