"""What is summed over the columns of a factor Jᵀ B: inner and outer products, norms.

Each says what it is, how it takes columns, and what a piece of them adds.
:mod:`vivit_linop.net.column_passes` passes over the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from vivit_linop.devices import free_memory
from vivit_linop.net.capture import Takes
from vivit_linop.net.columns.base import LayerColumns, mirror
from vivit_linop.net.pieces import Cotangents, Piece, counted_from, split_rows
from vivit_linop.ranks.alone import Ranks


class Total(ABC):
    """Something that is summed over columns, or over pairs of columns.

    Attributes:
        names: The parameters that it is over.
        takes: How it takes columns, as in :data:`vivit_linop.net.capture.Takes`.
        memory: The bytes that temporaries may take; a pass sets it.
    """

    names: Sequence[str]
    takes: Takes = "columns"
    memory: int = 0

    @abstractmethod
    def add(self, left: Piece, right: Piece) -> None:
        """Add a pair of pieces; each single piece comes once, paired with itself."""

    def finish(self, ranks: Ranks) -> None:
        """Put together what processes have added, each of its own samples."""
        raise NotImplementedError(
            f"{type(self).__name__} is not summed over several processes."
        )


class GramTotal(Total):
    """The matrix of (left columns)ᵀ (right columns) over some parameters.

    Over several processes each has the rows of its own samples.

    Args:
        left: Jᵀ A, ``[D, R]``.
        right: Jᵀ B, ``[D, Q]``.
        names: The parameters.
        weights: w, ``[D]``, for (left columns)ᵀ diag(w) (right columns); not negative
            where left is right.

    Attributes:
        rows: Those of this process's samples; all in one process.
    """

    takes = "pairs"

    def __init__(
        self,
        left: Cotangents,
        right: Cotangents,
        names: Sequence[str],
        weights: Tensor | Weights | None = None,
    ) -> None:
        self.names, self._symmetric = names, left is right
        self._weights = Weights.of(weights, self._symmetric)
        check_fits(left, right)
        risk = left.risk
        self._ranks = risk.ranks
        self._first = left.layout.before
        sides = left.layout.total, right.shape[1]
        self.rows = torch.zeros(*sides, dtype=risk.dtype, device=risk.device)
        # How many entries are known, and which blocks other processes need transposed.
        self._known, self._others = 0, list[tuple[int, slice, slice]]()

    @property
    def matrix(self) -> Tensor:
        """The matrix, ``[R, Q]``, on all processes."""
        return self._ranks.listed(lambda: self.rows)

    def add(self, left: Piece, right: Piece) -> None:
        place = counted_from(self._first, left.place)
        block = self.rows[place, right.place]
        self._known += block.numel()
        if self._weights is not None:
            left, right = self._weights.inside(left, right)
        for part, other in left.pairs(right, self.names):
            part.add_gram(block, other, self.memory)
        if self._symmetric and left is right:
            mirror(block)
        elif self._symmetric:
            self._mirror(place, right, block)

    def _mirror(self, rows: slice, right: Piece, block: Tensor) -> None:
        """Fill in the transposed block, or remember to send it."""
        owner = self._ranks.owner(right.samples.start)
        if owner == self._ranks.rank:
            across = slice(rows.start + self._first, rows.stop + self._first)
            self.rows[counted_from(self._first, right.place), across] = block.T
            self._known += block.numel()
        else:
            self._others.append((owner, rows, right.place))

    def finish(self, ranks: Ranks) -> None:
        """Send transposed blocks to the ranks whose rows they are."""
        for distance in range(1, ranks.size // 2 + 1):
            peer = (ranks.rank + distance) % ranks.size
            blocks = [
                (place, rows.start + self._first, self.rows[rows, place].T)
                for owner, rows, place in self._others
                if owner == peer
            ]
            for place, start, block in ranks.swapped(blocks, distance):
                across = slice(start, start + block.shape[1])
                self.rows[counted_from(self._first, place), across] = block
                self._known += block.numel()
        with ranks.together("Gram matrix"):
            if self._known != self.rows.numel():
                raise RuntimeError(
                    f"Of {self.rows.numel()} entries of a Gram matrix on rank "
                    f"{ranks.rank} {self._known} were computed. Please report this."
                )


class Weights:
    """What stands between left and right columns, entry by entry.

    Args:
        entries: w, ``[D]``.
        symmetric: Whether left columns are the right ones: both get the roots of w.
    """

    def __init__(self, entries: Tensor, symmetric: bool) -> None:
        self._symmetric = symmetric
        self._entries = entries.sqrt() if symmetric else entries

    @classmethod
    def of(cls, given: Tensor | Weights | None, symmetric: bool) -> Weights | None:
        """Return weights as they are, those of entries from their tensor."""
        return cls(given, symmetric) if isinstance(given, Tensor) else given

    def inside(self, left: Piece, right: Piece) -> tuple[Piece, Piece]:
        """Return pieces whose inner products have the weights."""
        first = left.weighted(self._entries)
        if not self._symmetric:
            return first, right
        return first, first if right is left else right.weighted(self._entries)


def check_fits(left: Cotangents, right: Cotangents) -> None:
    """Raise a ``MemoryError`` if a Gram matrix does not fit into what is free.

    Over several processes, if the rows of this one's samples do not.
    """
    device, itemsize = left.risk.device, torch.finfo(left.risk.dtype).bits // 8
    rows, columns = left.layout.total, right.shape[1]
    needed, free = rows * columns * itemsize, free_memory(device)
    if needed <= free:
        return
    fitting = int((free / itemsize) ** 0.5)
    width = max(left.width, right.width)
    ways = [
        "what needs products only: G.eigh(k=...) and scipy.sparse.linalg.cg(G + "
        "delta * Identity(D), b)"
    ]
    if samples := min(fitting // left.risk.num_samples, width - 1):
        ways.insert(0, f"mc_samples= up to {samples}")
    if samples := fitting // width:
        ways.insert(0, f"risk.subset(indices) of up to {samples} samples")
    raise MemoryError(
        f"The Gram matrix [{rows}, {columns}] takes {needed / 1e9:.3g} GB, and "
        f"{free / 1e9:.3g} GB are free on {device}. What fits: {', '.join(ways)}."
    )


class Rows(Total):
    """The columns of the last piece, formed as rows ``[n·R, d]``.

    Of all parameters, or of some with d entries together.
    """

    takes = "rows"

    def __init__(self, factor: Cotangents, names: Sequence[str] | None = None) -> None:
        params = factor.risk.params
        self.names = list(params) if names is None else names
        self._numel = sum(params[name].numel() for name in self.names)
        self.rows = torch.empty(0, dtype=factor.risk.dtype, device=factor.risk.device)

    def add(self, left: Piece, right: Piece) -> None:
        """Form the columns of a piece."""
        height = left.place.stop - left.place.start
        self.rows = self.rows.new_empty(height, self._numel)
        left.rows(self.names, self.rows)


class OuterTotal(Rows):
    """The matrix Σ v vᵀ, ``[d, d]``, over all columns v of some parameters."""

    def __init__(self, factor: Cotangents, names: Sequence[str]) -> None:
        super().__init__(factor, names)
        d, risk = self._numel, factor.risk
        needed, free = d**2 * risk.dtype.itemsize, free_memory(risk.device)
        if needed > free:
            raise MemoryError(
                f"The matrix [{d}, {d}] over the parameters, here the smaller side of "
                f"a factor with {factor.width} columns for each sample, takes "
                f"{needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free on "
                f"{risk.device}. What fits: mc_samples=1 or a few more, and what needs "
                "products only, such as G.eigh(k=...)."
            )
        self.matrix = torch.zeros(d, d, dtype=risk.dtype, device=risk.device)

    def add(self, left: Piece, right: Piece) -> None:
        """Add the outer products of the columns of a piece."""
        super().add(left, right)
        self.matrix.addmm_(self.rows.T, self.rows)

    def finish(self, ranks: Ranks) -> None:
        """Add up."""
        self.matrix = ranks.total(self.matrix)


class AllColumns(Total):
    """All columns, kept in pieces."""

    def __init__(self, factor: Cotangents) -> None:
        self.names, self.pieces = list(factor.risk.params), list[Piece]()

    def add(self, left: Piece, right: Piece) -> None:
        self.pieces.append(left)


class Components(Total):
    """Vᵀ X for X ``[D, K]`` from columns that are let go, in parts ``[K, n·R]``."""

    def __init__(self, factor: Cotangents, X: Tensor) -> None:
        params = factor.risk.params
        sizes = {name: p.numel() for name, p in params.items()}
        self.names, self.parts = list(params), list[Tensor]()
        self._rows = split_rows(X.T.contiguous(), sizes)

    def add(self, left: Piece, right: Piece) -> None:
        self.parts.append(left.components(self._rows))


class EntrySums(Total):
    """The entries ``[d]`` of some parameters, summed over all columns."""

    takes = "stream"

    def __init__(self, factor: Cotangents, names: Sequence[str]) -> None:
        self.names = names
        sizes = [factor.risk.params[name].numel() for name in names]
        self.entries = torch.zeros(
            sum(sizes), dtype=factor.risk.dtype, device=factor.risk.device
        )
        self._parts = dict(zip(names, self.entries.split(sizes), strict=True))

    def add(self, left: Piece, right: Piece) -> None:
        for name in self.names:
            if name in left.columns:
                self._parts[name] += self._of(left.columns[name])

    def finish(self, ranks: Ranks) -> None:
        self.entries = ranks.total(self.entries)

    def _of(self, columns: LayerColumns) -> Tensor:
        return columns.entry_sums()


class RowNorms(EntrySums):
    """The squared norms of the rows, from the structure of the layers."""

    def _of(self, columns: LayerColumns) -> Tensor:
        return columns.entry_squares(self.memory)


class SampleRowNorms(Total):
    """The squared norms ``[N, D]`` of the rows, of each sample's columns alone."""

    takes = "stream"

    def __init__(self, factor: Cotangents) -> None:
        risk = factor.risk
        self.names, self._first = list(risk.params), risk.ranks.first
        shape = sum(risk.batch_sizes), risk.num_params
        self.norms = torch.zeros(shape, dtype=risk.dtype, device=risk.device)
        parts = self.norms.split(risk.sizes, dim=1)
        self._parts = dict(zip(self.names, parts, strict=True))

    def add(self, left: Piece, right: Piece) -> None:
        place = counted_from(self._first, left.samples)
        for name, part in self._parts.items():
            if name in left.columns:
                squares = left.columns[name].sample_entry_squares(self.memory)
                part[place] += squares

    def finish(self, ranks: Ranks) -> None:
        self.norms = ranks.listed(lambda: self.norms)


class SampleGrams(Total):
    """The matrices ``[N, R, Q]`` of inner products of each sample's columns alone.

    Of one risk; with weights as :class:`GramTotal`.
    """

    def __init__(
        self,
        left: Cotangents,
        right: Cotangents,
        weights: Tensor | Weights | None = None,
    ) -> None:
        risk = left.risk
        self.names, self._first = list(risk.params), risk.ranks.first
        self._weights = Weights.of(weights, left is right)
        shape = sum(risk.batch_sizes), left.width, right.width
        self.matrices = torch.zeros(shape, dtype=risk.dtype, device=risk.device)

    def add(self, left: Piece, right: Piece) -> None:
        place = counted_from(self._first, left.samples)
        if self._weights is not None:
            left, right = self._weights.inside(left, right)
        for part, other in left.pairs(right, self.names):
            self.matrices[place] += part.sample_grams(other, self.memory)

    def finish(self, ranks: Ranks) -> None:
        self.matrices = ranks.listed(lambda: self.matrices)


class ColumnNorms(Total):
    """The squared norms ``[N·R, B]`` of the columns, for B groups of parameters."""

    def __init__(self, factor: Cotangents, groups: Sequence[Sequence[str]]) -> None:
        self.names = [name for group in groups for name in group]
        self._groups = groups
        # Else a piece would have to say which column of a sample it has.
        self.takes = "stream" if factor.width == 1 else "columns"
        self._first = factor.layout.before
        self.norms = torch.zeros(
            factor.layout.total,
            len(groups),
            dtype=factor.risk.dtype,
            device=factor.risk.device,
        )

    def add(self, left: Piece, right: Piece) -> None:
        place = counted_from(self._first, left.place)
        for number, group in enumerate(self._groups):
            for name in group:
                if name in left.columns:
                    squared = left.columns[name].squared_norms(self.memory)
                    self.norms[place, number] += squared

    def finish(self, ranks: Ranks) -> None:
        self.norms = ranks.listed(lambda: self.norms)
