"""Sums over the columns of factors Jᵀ B: Gram matrices, outer products, row norms.

A Gram matrix is a sum over layers of products that need no column formed. If the
columns of all samples fit into memory in the structure of their layers, one pass over
the data is enough: a forward pass, and as many backward passes without weight
gradients as a sample has columns. Else those that fit are held, and the data are
passed over once more for each such part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from vivit_linop.modes import as_guest
from vivit_linop.net.columns.base import LayerColumns, mirror
from vivit_linop.net.columns.samples import sample_grams
from vivit_linop.net.pieces import (
    Cotangents,
    Pass,
    Piece,
    StoredColumns,
    Total,
    num_columns,
    split_rows,
)
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.memory import free_memory


class GramTotal(Total):
    """The matrix of (left columns)ᵀ (right columns) over some parameters.

    Args:
        left: Jᵀ A, ``[D, R]``.
        right: Jᵀ B, ``[D, Q]``.
        names: The parameters.
        weights: w, ``[D]``, for (left columns)ᵀ diag(w) (right columns); not negative
            where left is right.

    Attributes:
        matrix: ``[R, Q]``.
    """

    takes = "pairs"

    def __init__(
        self,
        left: Cotangents,
        right: Cotangents,
        names: Sequence[str],
        weights: Tensor | None = None,
    ) -> None:
        self.names, self._symmetric = names, left is right
        self._weights = Weights(weights, self._symmetric)
        check_fits(left, right)
        sides = num_columns(left), num_columns(right)
        self.matrix = torch.zeros(
            *sides, dtype=left.risk.dtype, device=left.risk.device
        )

    def add(self, left: Piece, right: Piece) -> None:
        """Add the inner products, layer by layer."""
        block = self.matrix[left.place, right.place]
        left, right = self._weights.inside(left, right)
        for part, other in left.pairs(right, self.names):
            part.add_gram(block, other, self.memory)
        if self._symmetric and left is right:
            mirror(block)
        elif self._symmetric:
            self.matrix[right.place, left.place] = block.T


class Weights:
    """What stands between left and right columns, entry by entry.

    Args:
        entries: w, ``[D]``; None for ones.
        symmetric: Whether left columns are the right ones: both get the roots of w.
    """

    def __init__(self, entries: Tensor | None, symmetric: bool) -> None:
        self._symmetric = symmetric
        self._entries = entries
        if entries is not None and symmetric:
            self._entries = entries.sqrt()

    def inside(self, left: Piece, right: Piece) -> tuple[Piece, Piece]:
        """Return pieces whose inner products have the weights."""
        if self._entries is None:
            return left, right
        first = left.weighted(self._entries)
        if not self._symmetric:
            return first, right
        return first, first if right is left else right.weighted(self._entries)


def check_fits(left: Cotangents, right: Cotangents) -> None:
    """Raise an error if a Gram matrix does not fit into the memory that is free.

    Raises:
        MemoryError: It says what would fit.
    """
    device, itemsize = left.risk.device, torch.finfo(left.risk.dtype).bits // 8
    rows, columns = num_columns(left), num_columns(right)
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
    """The columns of a piece, formed as rows.

    Args:
        factor: Jᵀ B.
        names: The parameters, d entries together; all by default.

    Attributes:
        rows: Those of the last piece, ``[n·R, d]``.
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
    """The matrix Σ v vᵀ over all columns v, restricted to some parameters.

    Args:
        factor: Jᵀ B.
        names: The parameters, d entries together.

    Attributes:
        matrix: ``[d, d]``.
    """

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


class AllColumns(Total):
    """All columns, kept.

    Args:
        factor: V.

    Attributes:
        pieces: Its pieces.
    """

    def __init__(self, factor: Cotangents) -> None:
        self.names, self.pieces = list(factor.risk.params), list[Piece]()

    def add(self, left: Piece, right: Piece) -> None:
        """Keep a piece."""
        self.pieces.append(left)


class Components(Total):
    """Vᵀ X, from columns that are let go.

    Args:
        factor: V.
        X: ``[D, K]``.

    Attributes:
        parts: Its rows, piece by piece, ``[K, n·R]``.
    """

    def __init__(self, factor: Cotangents, X: Tensor) -> None:
        params = factor.risk.params
        sizes = {name: p.numel() for name, p in params.items()}
        self.names, self.parts = list(params), list[Tensor]()
        self._rows = split_rows(X.T.contiguous(), sizes)

    def add(self, left: Piece, right: Piece) -> None:
        """Add the components along a piece's columns."""
        self.parts.append(left.components(self._rows))


class EntrySums(Total):
    """A vector with an entry for each parameter entry, summed over all columns.

    Args:
        factor: Jᵀ B.
        names: The parameters, d entries together.

    Attributes:
        entries: ``[d]``.
    """

    takes = "stream"

    def __init__(self, factor: Cotangents, names: Sequence[str]) -> None:
        self.names = names
        sizes = [factor.risk.params[name].numel() for name in names]
        self.entries = torch.zeros(
            sum(sizes), dtype=factor.risk.dtype, device=factor.risk.device
        )
        self._parts = dict(zip(names, self.entries.split(sizes), strict=True))

    def add(self, left: Piece, right: Piece) -> None:
        """Add the columns of a piece, parameter by parameter."""
        for name in self.names:
            if name in left.columns:
                self._parts[name] += self._of(left.columns[name])

    def _of(self, columns: LayerColumns) -> Tensor:
        return columns.entry_sums()


class RowNorms(EntrySums):
    """The squared norms of the rows, from the structure of the layers."""

    def _of(self, columns: LayerColumns) -> Tensor:
        return columns.entry_squares(self.memory)


class SampleRowNorms(Total):
    """The squared norms of the rows, of each sample's columns alone.

    Args:
        factor: Jᵀ B.

    Attributes:
        norms: ``[N, D]``.
    """

    takes = "stream"

    def __init__(self, factor: Cotangents) -> None:
        risk = factor.risk
        self.names = list(risk.params)
        self.norms = torch.zeros(
            risk.num_samples, risk.num_params, dtype=risk.dtype, device=risk.device
        )
        parts = self.norms.split(risk.sizes, dim=1)
        self._parts = dict(zip(self.names, parts, strict=True))

    def add(self, left: Piece, right: Piece) -> None:
        """Add to the samples of a piece."""
        for name, part in self._parts.items():
            if name in left.columns:
                squares = left.columns[name].sample_entry_squares(self.memory)
                part[left.samples] += squares


class SampleGrams(Total):
    """The inner products between the columns of each sample alone.

    Args:
        left: Jᵀ A.
        right: Jᵀ B of the same risk.
        weights: As for :class:`GramTotal`.

    Attributes:
        matrices: ``[N, R, Q]``.
    """

    def __init__(
        self, left: Cotangents, right: Cotangents, weights: Tensor | None = None
    ) -> None:
        risk = left.risk
        self.names = list(risk.params)
        self._weights = Weights(weights, left is right)
        shape = risk.num_samples, left.width, right.width
        self.matrices = torch.zeros(shape, dtype=risk.dtype, device=risk.device)

    def add(self, left: Piece, right: Piece) -> None:
        """Fill in the samples of a piece, layer by layer."""
        left, right = self._weights.inside(left, right)
        for part, other in left.pairs(right, self.names):
            self.matrices[left.samples] += sample_grams(part, other, self.memory)


class ColumnNorms(Total):
    """The squared norms of the columns, restricted to groups of parameters.

    Args:
        factor: Jᵀ B, ``[D, N·R]``.
        groups: Names of parameters.

    Attributes:
        norms: ``[N·R, B]`` for B groups.
    """

    def __init__(self, factor: Cotangents, groups: Sequence[Sequence[str]]) -> None:
        self.names = [name for group in groups for name in group]
        self._groups = groups
        # Else a piece would have to say which column of a sample it has.
        self.takes = "stream" if factor.width == 1 else "columns"
        self.norms = torch.zeros(
            num_columns(factor),
            len(groups),
            dtype=factor.risk.dtype,
            device=factor.risk.device,
        )

    def add(self, left: Piece, right: Piece) -> None:
        """Fill in the columns of a piece."""
        for number, group in enumerate(self._groups):
            for name in group:
                if name in left.columns:
                    squared = left.columns[name].squared_norms(self.memory)
                    self.norms[left.place, number] += squared


def accumulate(
    factor: Cotangents, totals: Sequence[Total], stored: StoredColumns | None = None
) -> StoredColumns | None:
    """Compute several sums over the columns of one factor together.

    Args:
        factor: Jᵀ B.
        totals: What is summed.
        stored: The columns, if they are there already.

    Returns:
        All columns, if they have been in memory together.
    """
    columns = Pass([factor], totals)
    stored = None if columns.takes == "factors" else stored
    with as_guest(factor.risk.device):
        if columns.takes != "pairs":
            for piece in stored.pieces if stored else _single(columns):
                for total in totals:
                    total.add(piece, piece)
            return None
        return _accumulate_pairs(columns, factor, totals, stored)


def _accumulate_pairs(
    columns: Pass,
    factor: Cotangents,
    totals: Sequence[Total],
    stored: StoredColumns | None,
) -> StoredColumns | None:
    """Hold as many pieces as fit; all others pass by, once for each such part."""
    paired = [total for total in totals if total.takes == "pairs"]
    whole: Iterable[list[list[Piece]]] = columns.held()
    if stored is not None:
        whole = [[[piece] for piece in stored.pieces]]
    for held in whole:
        for index, (left,) in enumerate(held):
            for total in totals:
                total.add(left, left)
            for (right,) in held[index + 1 :]:
                for total in paired:
                    total.add(left, right)
        end = held[-1][0].place.stop
        if end == num_columns(factor):
            if held[0][0].place.start or columns.names != set(factor.risk.params):
                return None
            return stored or StoredColumns([piece for (piece,) in held])
        for (right,) in columns.pieces(held[-1][0].samples.stop):
            for (left,) in held:
                for total in paired:
                    total.add(left, right)
    return None


def formed_pieces(
    factor: Cotangents, stored: StoredColumns | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some columns at a time, formed: which they are, and ``[D, n·R]``.

    Args:
        factor: V.
        stored: The columns, if they are there already.
    """
    whole = Rows(factor)
    made = iter(stored.pieces) if stored else _single(Pass([factor], [whole]))
    while True:
        # Left before the columns are given away.
        with as_guest(factor.risk.device):
            piece = next(made, None)
            if piece is None:
                return
            whole.add(piece, piece)
        yield piece.place, whole.rows.T


def _single(columns: Pass) -> Iterator[Piece]:
    for (piece,) in columns.pieces():
        yield piece


def cross_gram(
    left: Cotangents, right: Cotangents, weights: Tensor | None = None
) -> Tensor:
    """Return (left columns)ᵀ diag(w) (right columns) of two factors, ``[R, Q]``."""
    _check_same_parameters(left.risk, right.risk)
    total = GramTotal(left, right, list(left.risk.params), weights)
    with as_guest(left.risk.device):
        if left.risk is right.risk:
            _add_of_one_risk(total, left, right)
            return total.matrix
        for held in Pass([left], [total]).held():
            for (b,) in Pass([right], [total]).pieces():
                for (a,) in held:
                    total.add(a, b)
    return total.matrix


def _add_of_one_risk(total: GramTotal, left: Cotangents, right: Cotangents) -> None:
    """Make the columns of both factors of a sample together."""
    columns = Pass([left, right], [total])
    for held in columns.held():
        for a, _ in held:
            for _, b in held:
                total.add(a, b)
        places = {(b.place.start, b.place.stop) for _, b in held}
        covered = sum(stop - start for start, stop in places)
        if covered == num_columns(right):
            return
        # Cut alike, a piece is among those held or has no sample of them.
        for (b,) in columns.only(right).pieces():
            if not _inside(b.place, held):
                for a, _ in held:
                    total.add(a, b)


def cross_sample_grams(
    left: Cotangents, right: Cotangents, weights: Tensor | None = None
) -> Tensor:
    """Return the inner products of each sample's columns of two factors, ``[N, R, Q]``.

    Args:
        left: Jᵀ A.
        right: Jᵀ B of the same risk.
        weights: w, ``[D]``, between the columns, or None.
    """
    total = SampleGrams(left, right, weights)
    with as_guest(left.risk.device):
        for a, b in Pass([left, right], [total]).pieces():
            total.add(a, b)
    return total.matrices


def _inside(place: slice, held: Sequence[Sequence[Piece]]) -> bool:
    first, last = held[0][1].place.start, held[-1][1].place.stop
    return bool(first <= place.start and place.stop <= last)


def _check_same_parameters(left: EmpiricalRisk, right: EmpiricalRisk) -> None:
    if left is right:
        return
    shapes = [{n: tuple(p.shape) for n, p in r.params.items()} for r in (left, right)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        raise ValueError(
            "Factors of risks with different parameters have no cross-Gram matrix: "
            f"{shapes[0]} and {shapes[1]}."
        )
