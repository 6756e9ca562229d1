"""Matrices of which each rank has the rows that belong to its samples."""

from __future__ import annotations

from torch import Tensor

from vivit_linop.ranks.alone import Ranks


class RankRows:
    """A matrix ``[N·R, Q]`` over the ranks.

    Args:
        ranks: The ranks.
        own: The rows of this one's samples, ``[n·R, Q]``.
        first: The number of the first of them.
    """

    def __init__(self, ranks: Ranks, own: Tensor, first: int) -> None:
        self._ranks, self.own, self._first = ranks, own, first

    def whole(self) -> Tensor:
        """Return the matrix on all ranks."""
        return self._ranks.listed(lambda: self.own)

    def on_leader(self) -> Tensor | None:
        """Return the matrix on the rank that leads, None on the others."""
        return self._ranks.to_leader(self.own)

    def norm(self) -> float:
        """Return the Frobenius norm of the matrix."""
        squares = self._ranks.total(self.own.square().sum()[None])
        return squares.sqrt().item()

    def multiply(self, X: Tensor) -> Tensor:
        """Return its product with a matrix that all ranks have, ``[N·R, K]``."""
        return self._ranks.listed(self._images, X)

    def _images(self, X: Tensor) -> Tensor:
        return self.own @ X

    def multiply_adjoint(self, X: Tensor) -> Tensor:
        """Return its adjoint's product, ``[Q, K]``."""
        return self._ranks.summed(self._adjoint_images, X)

    def _adjoint_images(self, X: Tensor) -> Tensor:
        return self.own.T @ X[self._first : self._first + len(self.own)]
