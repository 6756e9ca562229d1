"""V = Jᵀ B on some samples and parameters: pieces, made in passes or kept.

A column of V belongs to one sample, and its entries to one parameter. A :class:`Piece`
has those of consecutive samples, each parameter's in the structure of its layer; V is
one piece beside the other. :mod:`vivit_linop.net.column_passes` makes them.
:class:`StoredColumns` are pieces that are kept: V u and Vᵀ x are then one matrix
product for each layer, of the size of its forward pass, and nothing is pulled through
the net; but all cotangents are read. In floating-point operations, with f those of a
forward pass over all samples: at most f and the reading of the columns, against 2 f for
a product on the linearisation of the net. Getting the columns takes 2 R f once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Protocol, Self

import torch
from torch import Tensor

from vivit_linop.devices import fresh
from vivit_linop.net.columns.base import LayerColumns, merged
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.weighted import weighted
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.row_layout import RowLayout


class Cotangents(Protocol):
    """What is pulled back to columns: R vectors at the outputs of each sample.

    Attributes:
        risk: The risk.
        shape: Of V, ``[D, N·R]``.
        width: R; the largest where samples have different numbers.
        layout: Which columns belong to which sample.
    """

    risk: EmpiricalRisk
    shape: tuple[int, int]
    width: int
    layout: RowLayout

    def cotangents(self, batch: int) -> Tensor:
        """Return those of one batch of n samples, ``[n, C, R]``."""


@dataclass
class Piece:
    """V on some consecutive samples and some parameters.

    Attributes:
        place: Which columns of V they are.
        samples: Of which samples.
        columns: By parameter; a parameter that is missing has zero columns.
        sizes: The numbers of entries of all parameters, in the order of V's rows.
        number: Which part of this process's samples it is of.
    """

    place: slice
    samples: slice
    columns: dict[str, LayerColumns]
    sizes: Mapping[str, int]
    number: int = 0

    @cached_property
    def groups(self) -> list[list[str]]:
        """The parameters with the same cotangents, as those of a weight and a bias.

        Their signals are needed once, and the cotangents are kept once.
        """
        groups: dict[Hashable, list[str]] = {}
        for name, part in self.columns.items():
            groups.setdefault(part.cotangents_key, []).append(name)
        return list(groups.values())

    @cached_property
    def nbytes(self) -> int:
        """What the columns take."""
        total = 0
        for group in self.groups:
            largest = 0
            for name in group:
                largest = max(largest, self.columns[name].nbytes)
            total += largest
        return total

    def rows(self, names: Sequence[str], out: Tensor) -> Tensor:
        """Form the columns of some parameters, as rows ``[n·R, d]`` side by side."""
        parts = out.split([self.sizes[name] for name in names], dim=1)
        for name, part in zip(names, parts, strict=True):
            if name in self.columns:
                part.copy_(self.columns[name].rows())
            else:
                part.zero_()
        return out

    def combine(self, weights: Tensor, parts: Mapping[str, Tensor], add: bool) -> None:
        """Write combinations of the columns.

        Args:
            weights: ``[K, n·R]``.
            parts: By parameter where to, ``[K, numel]`` with contiguous rows.
            add: Whether to add to what is there.
        """
        for group in self.groups:
            first = self.columns[group[0]]
            shape = len(weights), first.num_samples, first.width
            signals = first.signals(weights.view(shape))
            for name in group:
                self.columns[name].combine(signals, parts[name], add)
        if not add:
            for name in parts.keys() - self.columns.keys():
                parts[name].zero_()

    def components(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the components of K vectors, ``[K, numel]`` each, as ``[K, n·R]``."""
        some = next(iter(parts.values()))
        total = some.new_zeros(len(some), self.place.stop - self.place.start)
        for group in self.groups:
            first = self.columns[group[0]]
            images = first.images(parts[group[0]])
            for name in group[1:]:
                images += self.columns[name].images(parts[name])
            total += first.components(images).flatten(1)
        return total

    def weighted(self, weights: Tensor) -> Piece:
        """Return the columns with a weight for each entry, ``[D]``.

        Parameters without any weight have zero columns.
        """
        parts = weights.split(list(self.sizes.values()))
        of = dict(zip(self.sizes, parts, strict=True))
        columns = {
            name: weighted(part, of[name])
            for name, part in self.columns.items()
            if of[name].any()
        }
        return Piece(self.place, self.samples, columns, self.sizes)

    def pairs(
        self, other: Piece, names: Sequence[str]
    ) -> list[tuple[LayerColumns, LayerColumns]]:
        """Return columns and others whose inner products add up over parameters."""
        pairs = []
        for name in names:
            if name in self.columns and name in other.columns:
                pairs.append((self.columns[name], other.columns[name]))
        return merged(pairs)

    def can_be_followed_by(self, other: Piece) -> bool:
        """Whether columns of other samples are of the same structure."""
        mine, theirs = self.columns, other.columns
        return mine.keys() == theirs.keys() and all(
            theirs[name].continues(part) for name, part in mine.items()
        )

    def followed_by(self, others: Sequence[Piece]) -> Piece:
        """Return one piece of these samples and of others, whose columns it takes away.

        There is never more than one parameter's part twice.
        """
        ends = (self, *others)[-1]
        place = slice(self.place.start, ends.place.stop)
        samples = slice(self.samples.start, ends.samples.stop)
        columns: dict[str, LayerColumns] = {}
        for group in self.groups:
            whole: LayerColumns | None = None
            for name in group:
                part, *more = (piece.columns.pop(name) for piece in (self, *others))
                joined = part.followed_by(more)
                if isinstance(whole, KhatriRaoColumns):
                    whole.share_cotangents(joined)
                columns[name] = whole = joined
        return Piece(place, samples, columns, self.sizes, self.number)


class StoredColumns:
    """V in pieces that are kept, and products with it.

    Attributes:
        pieces: The pieces, of all samples, in order.
        nbytes: What they take.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces, self._sizes = list(pieces), pieces[0].sizes
        self._first = self.pieces[0].place.start
        self.nbytes = sum(map(attrgetter("nbytes"), self.pieces))

    @classmethod
    def kept_on(cls, device: torch.device, pieces: Sequence[Piece]) -> Self:
        """Keep pieces of all samples, in order, whose columns are taken away.

        On a GPU as one where they can be: there each would take launches of its own.
        """
        first, *others = pieces
        alike = device.type != "cpu" and all(map(first.can_be_followed_by, others))
        return cls([first.followed_by(others)] if alike else pieces)

    def multiply(self, X: Tensor) -> Tensor:
        """Combine the columns, ``[N·R, K] -> [D, K]``."""
        rows = X.T.contiguous()
        result = fresh(X, len(rows), sum(self._sizes.values()))
        parts = split_rows(result, self._sizes)
        for index, piece in enumerate(self.pieces):
            own = rows[:, counted_from(self._first, piece.place)]
            piece.combine(own, parts, add=index > 0)
        return result.T

    def multiply_adjoint(self, X: Tensor) -> Tensor:
        """Return the components along all columns, ``[D, K] -> [N·R, K]``."""
        parts = split_rows(X.T, self._sizes)
        components = [piece.components(parts) for piece in self.pieces]
        return torch.cat(components, dim=1).T


def counted_from(first: int, place: slice) -> slice:
    """Return a place, counted from another one's first."""
    return slice(place.start - first, place.stop - first)


def split_rows(rows: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Cut ``[K, D]`` into the parts of the parameters."""
    parts = rows.split(list(sizes.values()), dim=1)
    return dict(zip(sizes, parts, strict=True))
