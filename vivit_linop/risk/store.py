"""What a risk keeps for all operators of it: one store, one lock and one budget.

Linearisations, the structure of the net, costs and columns are made once, at the first
product that needs them. None of them may refer to the risk: it would not be freed with
the last reference. They hold graphs, so they do not travel: a copy makes them anew.
What is the same at all parameters (the structure of the net, costs) belongs to all
risks of the same data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from vivit_linop.devices import free_memory

Value = TypeVar("Value")

# First words of keys: what belongs to a net, whatever the data are.
_OF_THE_NET = "structure", "sample sizes"
# What blocks that can be formed again may take.
_SMALL = 2**24


class Store:
    """What has been made once.

    Args:
        memory: The bytes that it may take, None for a share of what is free.
        device: Where it is.

    Attributes:
        making: The lock of what is made, for all threads.
        values: What is kept, by key.
        everywhere: What is the same at all parameters, by key; shared by risks of the
            same data.
        nbytes: What they take, where they say so.
    """

    def __init__(self, memory: int | None, device: torch.device) -> None:
        self._memory, self._device = memory, device
        self.drop()

    def drop(self) -> None:
        """Let go of everything."""
        self.making = threading.RLock()
        self.values: dict[Hashable, Any] = {}
        self.everywhere: dict[Hashable, Any] = {}
        self.nbytes = 0.0

    def elsewhere(self) -> Store:
        """Return a store for other parameters, with what is the same there."""
        kept = Store(self._memory, self._device)
        kept.everywhere = self.everywhere
        return kept

    def structures(self) -> dict[Hashable, Any]:
        """Return what is the same for other data too, as far as it is known."""
        return {
            key: value
            for key, value in self.everywhere.items()
            if isinstance(key, tuple) and key[0] in _OF_THE_NET
        }

    def drop_list(self, key: Hashable) -> None:
        """Let go of a list of what says how many bytes it takes."""
        with self.making:
            self.nbytes -= sum(item.kept_bytes for item in self.values.pop(key, []))

    def budget(self, share: int) -> int:
        """Return the bytes that may be taken: what the user said, or a share of all.

        Args:
            share: Into how many parts free memory is divided otherwise.
        """
        if self._memory is not None:
            return self._memory
        return free_memory(self._device) // share

    @property
    def small_budget(self) -> int:
        """The bytes that an operator may keep of what can be formed again."""
        return _SMALL if self._memory is None else min(self._memory, _SMALL)

    def get(self, key: Hashable, make: Callable[..., Value], *arguments: Any) -> Value:
        """Return a value, which is made at the first call.

        Args:
            key: What it is.
            make: Makes it; by one thread, the others wait.
            *arguments: What it is made of.
        """
        if key not in self.values:
            with self.making:
                if key not in self.values:
                    self.put(key, make(*arguments))
        value: Value = self.values[key]
        return value

    def get_everywhere(
        self, key: Hashable, make: Callable[..., Value], *arguments: Any
    ) -> Value:
        """Likewise for a value that is the same at all parameters."""
        if key not in self.everywhere:
            with self.making:
                # Risks at other parameters have other locks: the first value stays.
                if key not in self.everywhere:
                    self.everywhere.setdefault(key, make(*arguments))
        value: Value = self.everywhere[key]
        return value

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value, in place of what was kept before, and count its ``nbytes``."""
        with self.making:
            before = self.values.get(key)
            self.nbytes += getattr(value, "nbytes", 0) - getattr(before, "nbytes", 0)
            self.values[key] = value

    def __getstate__(self) -> dict[str, Any]:
        """What travels: the budget."""
        return {"_memory": self._memory, "_device": self._device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive, with nothing."""
        self.__dict__.update(state)
        self.drop()
