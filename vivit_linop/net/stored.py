"""Products with a pullback from stored columns, where that is the cheaper way.

With the columns of V = Jᵀ S kept in the structure of their layers, V u and Vᵀ x are one
matrix product for each layer, of the size of its forward pass, and nothing is pulled
through the net; but all cotangents are read. In floating-point operations, with f those
of a forward pass over all samples: at most f and the reading of the columns, against
2 f for a product on the linearisation of the net. Getting the columns takes 2 R f once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vivit_linop.net.blocks import Columns, Cotangents, Piece, memory_budget
from vivit_linop.net.columns.base import LayerColumns

# How much of a matrix to copy at a time.
_COPIED_BYTES = 16 * 2**20


class StoredColumns:
    """The columns of all samples of a factor.

    Args:
        sizes: The numbers of entries of the parameters, by name.
        width: The number of columns a sample.
        pieces: The columns, piece by piece.

    Attributes:
        pieces: The pieces.
        nbytes: What they take.
    """

    def __init__(
        self, sizes: Mapping[str, int], width: int, pieces: Sequence[Piece]
    ) -> None:
        self.pieces = list(pieces)
        self.nbytes = sum(piece.nbytes for piece in self.pieces)
        self._sizes, self._width = dict(sizes), width
        # A weight and a bias have the same cotangents: their signals are needed once.
        self._groups = [list(_groups(piece.columns)) for piece in self.pieces]

    @classmethod
    def of(cls, factor: Cotangents, pieces: Sequence[Piece]) -> StoredColumns:
        """Return those of a factor."""
        sizes = {name: p.numel() for name, p in factor.risk.params.items()}
        return cls(sizes, factor.width, pieces)

    def multiply(self, X: Tensor) -> Tensor:
        """Combine the columns, ``[N·R, K] -> [D, K]``."""
        rows = X.T.contiguous()
        result = X.new_empty(len(rows), sum(self._sizes.values()))
        parts = self._split(result)
        for index, (piece, groups) in enumerate(
            zip(self.pieces, self._groups, strict=True)
        ):
            weights = rows[:, piece.place].view(len(rows), -1, self._width)
            for group in groups:
                signals = piece.columns[group[0]].signals(weights)
                for name in group:
                    piece.columns[name].combine(signals, parts[name], add=index > 0)
            if index == 0:
                for name in parts.keys() - piece.columns.keys():
                    parts[name].zero_()
        return result.T

    def multiply_adjoint(self, X: Tensor) -> Tensor:
        """Return the components along all columns, ``[D, K] -> [N·R, K]``."""
        # Some columns at a time: memory that is used again is faster than fresh memory.
        chunk = max(1, _COPIED_BYTES // (len(X) * X.element_size()))
        return torch.cat(
            [self._components(part.T.contiguous()) for part in X.split(chunk, dim=1)]
        ).T

    def _components(self, rows: Tensor) -> Tensor:
        """``[K, D] -> [K, N·R]``."""
        parts = self._split(rows)
        components = []
        for piece, groups in zip(self.pieces, self._groups, strict=True):
            height = piece.place.stop - piece.place.start
            total = rows.new_zeros(len(rows), height // self._width, self._width)
            for group in groups:
                images = piece.columns[group[0]].images(parts[group[0]])
                for name in group[1:]:
                    images += piece.columns[name].images(parts[name])
                total += piece.columns[group[0]].components(images)
            components.append(total.flatten(1))
        return torch.cat(components, dim=1)

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        parts = rows.split(list(self._sizes.values()), dim=1)
        return dict(zip(self._sizes, parts, strict=True))


class StreamedColumns:
    """The columns of all samples of a factor, made anew for each product.

    Args:
        factor: The factor.
    """

    def __init__(self, factor: Cotangents) -> None:
        self._factor = factor

    def multiply_adjoint(self, X: Tensor) -> Tensor:
        """Return the components along all columns, ``[D, K] -> [N·R, K]``."""
        factor = self._factor
        names, budget = list(factor.risk.params), memory_budget(factor.risk)
        components = [
            StoredColumns.of(factor, [piece]).multiply_adjoint(X)
            for (piece,) in Columns([factor], names, budget).pieces()
        ]
        return torch.cat(components)


def _groups(columns: dict[str, LayerColumns]) -> Iterable[list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, part in columns.items():
        groups.setdefault(part.cotangents_key, []).append(name)
    return groups.values()
