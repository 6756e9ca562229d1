"""Inputs of layers that are larger in the form that columns take: made when needed.

What a convolution sees at its positions has as many copies of an input as its kernel
has places. Sums over samples need those of a few at a time, which stay in the caches;
inner products of all samples need all, and keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor


class UnfoldedInputs:
    """The inputs a of a layer, ``[n, G, a, P]``, of samples as they are asked for.

    Args:
        X: The layer's input, ``[n, channels, …]``.
        of: Makes them of the input of some samples, from each channel by itself.
        channels: a.
    """

    def __init__(
        self, X: Tensor, of: Callable[[Tensor], Tensor], channels: int
    ) -> None:
        self._X, self._of, self.channels = X, of, channels

    def __getstate__(self) -> dict[str, Any]:
        """What travels: the inputs, not how they are made."""
        return {"whole": self.whole, "channels": self.channels}

    @cached_property
    def whole(self) -> Tensor:
        """Those of all samples, kept for all columns with them."""
        return self._of(self._X)

    def squared_norms(self, groups: int) -> Tensor:
        """|a_np|², ``[n, G, P]``; the input is squared, not its copies."""
        if "whole" in self.__dict__:
            return self.whole.square().sum(2)
        squares = self._X.square().unflatten(1, (groups, -1)).sum(2)
        return self._of(squares).sum(2)

    def some(self, part: slice) -> Tensor:
        """Those of some samples."""
        if "whole" in self.__dict__:
            return self.whole[part]
        return self._of(self._X[part])
