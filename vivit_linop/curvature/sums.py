"""Sums over the columns of pullbacks: Gram matrices, outer products, row norms.

A Gram matrix is a sum over layers of products that need no column formed. If the
columns of all samples fit into memory in the structure of their layers, one pass over
the data is enough: a forward pass, and as many backward passes without weight
gradients as a sample has columns. Else those that fit are held, and the data are
passed over once more for each such part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from vivit_linop.capture.layers import merged, mirror
from vivit_linop.curvature.columns import Columns, Piece, memory_budget
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.curvature.stored import StoredColumns, is_small
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.verbs import (
    gram_matrix,
    outer_matrix,
    row_norms_squared,
    to_dense,
)
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.memory import free_memory


class Total(ABC):
    """Something that is summed over pairs of columns, or over columns.

    Attributes:
        names: The parameters that it is over.
        formed: How many entries of each column it forms.
        in_pairs: Whether it needs pairs of different pieces.
    """

    names: Sequence[str]
    formed: int = 0
    in_pairs: bool = False

    @abstractmethod
    def add(self, left: Piece, right: Piece) -> None:
        """Add a pair of pieces; each single piece comes once, paired with itself."""


class GramTotal(Total):
    """The matrix of (left columns)ᵀ (right columns) over some parameters.

    Args:
        left: Jᵀ A, ``[D, R]``.
        right: Jᵀ B, ``[D, Q]``.
        names: The parameters.

    Attributes:
        matrix: ``[R, Q]``.
    """

    in_pairs = True

    def __init__(self, left: Pullback, right: Pullback, names: Sequence[str]) -> None:
        self.names, self._symmetric = names, left is right
        self._memory = memory_budget(left.risk)
        check_fits(left, right)
        self.matrix = torch.zeros(
            left.shape[1], right.shape[1], dtype=left.torch_dtype, device=left.device
        )

    def add(self, left: Piece, right: Piece) -> None:
        """Add the inner products, layer by layer."""
        block = self.matrix[left.place, right.place]
        pairs = [
            (left.columns[name], right.columns[name])
            for name in self.names
            if name in left.columns and name in right.columns
        ]
        for part, other in merged(pairs):
            part.add_gram(block, other, self._memory)
        if self._symmetric and left is right:
            mirror(block)
        elif self._symmetric:
            self.matrix[right.place, left.place] = block.T


def check_fits(left: Pullback, right: Pullback) -> None:
    """Raise an error if a Gram matrix does not fit into the memory that is free.

    Raises:
        MemoryError: It says what would fit.
    """
    itemsize = torch.finfo(left.torch_dtype).bits // 8
    rows, columns = left.shape[1], right.shape[1]
    needed, free = rows * columns * itemsize, free_memory(left.device)
    if needed <= free:
        return
    fitting = int((free / itemsize) ** 0.5)
    width = max(left.width, right.width)
    raise MemoryError(
        f"The Gram matrix [{rows}, {columns}] takes {needed / 1e9:.3g} GB, and "
        f"{free / 1e9:.3g} GB are free on {left.device}. What fits: "
        f"risk.subset(indices) of up to {fitting // width} samples, mc_samples= up to "
        f"{fitting // left.risk.num_samples}, or what needs products only: "
        "G.eigh(k=...) and scipy.sparse.linalg.cg(G + delta * Identity(D), b)."
    )


class OuterTotal(Total):
    """The matrix Σ v vᵀ over all columns v, restricted to some parameters.

    Args:
        factor: Jᵀ B.
        names: The parameters, d entries together.

    Attributes:
        matrix: ``[d, d]``.
    """

    def __init__(self, factor: Pullback, names: Sequence[str]) -> None:
        self.names, self._risk = names, factor.risk
        self.formed = sum(factor.risk.params[name].numel() for name in names)
        self.matrix = torch.zeros(
            self.formed, self.formed, dtype=factor.torch_dtype, device=factor.device
        )

    def add(self, left: Piece, right: Piece) -> None:
        """Add the outer products of the columns of a piece."""
        rows = left.rows(self.names, self._risk)
        self.matrix.addmm_(rows.T, rows)


class RowNorms(Total):
    """The squared norms of the rows, over some parameters.

    Args:
        factor: Jᵀ B.
        names: The parameters, d entries together.

    Attributes:
        norms: ``[d]``.
    """

    def __init__(self, factor: Pullback, names: Sequence[str]) -> None:
        self.names, self._risk = names, factor.risk
        self.formed = max(factor.risk.params[name].numel() for name in names)
        sizes = [factor.risk.params[name].numel() for name in names]
        self.norms = torch.zeros(
            sum(sizes), dtype=factor.torch_dtype, device=factor.device
        )
        self._parts = dict(zip(names, self.norms.split(sizes), strict=True))

    def add(self, left: Piece, right: Piece) -> None:
        """Add the squares of the columns of a piece, parameter by parameter."""
        for name in self.names:
            if name in left.columns:
                self._parts[name] += left.columns[name].rows().square().sum(0)


def sum_columns(factor: Pullback, totals: Sequence[Total]) -> None:
    """Compute several sums over the columns of one pullback together."""
    columns = _columns([factor], totals)
    paired = [total for total in totals if total.in_pairs]
    if not paired:
        for (piece,) in columns.pieces():
            for total in totals:
                total.add(piece, piece)
        return
    stored = factor.stored
    whole = [[[piece] for piece in stored.pieces]] if stored else columns.held()
    for held in whole:
        for index, (left,) in enumerate(held):
            for total in totals:
                total.add(left, left)
            for (right,) in held[index + 1 :]:
                for total in paired:
                    total.add(left, right)
        end = held[-1][0].place.stop
        if end == factor.shape[1]:
            _keep(factor, held, columns)
            return
        for (right,) in columns.pieces(end // factor.width):
            for (left,) in held:
                for total in paired:
                    total.add(left, right)


def _keep(factor: Pullback, held: list[list[Piece]], columns: Columns) -> None:
    """Keep columns that are small, for products, if they are all there."""
    if held[0][0].place.start == 0 and columns.names == set(factor.risk.params):
        pieces = StoredColumns(factor, [piece for (piece,) in held])
        if is_small(pieces.nbytes, factor):
            factor.stored = pieces


def cross_gram(left: Pullback, right: Pullback) -> Tensor:
    """Return (left columns)ᵀ (right columns) of two pullbacks, ``[R, Q]``."""
    _check_same_parameters(left.risk, right.risk)
    total = GramTotal(left, right, list(left.risk.params))
    if left.risk is not right.risk:
        for held in _columns([left], [total]).held():
            for (b,) in _columns([right], [total]).pieces():
                for (a,) in held:
                    total.add(a, b)
        return total.matrix
    for held in _columns([left, right], [total]).held():
        for a, _ in held:
            for _, b in held:
                total.add(a, b)
        places = {(b.place.start, b.place.stop) for _, b in held}
        covered = sum(stop - start for start, stop in places)
        if covered == right.shape[1]:
            break
        for (b,) in _columns([right], [total]).pieces():
            if not _inside(b.place, held):
                for a, _ in held:
                    total.add(a, b)
    return total.matrix


def _inside(place: slice, held: Sequence[Sequence[Piece]]) -> bool:
    first, last = held[0][1].place.start, held[-1][1].place.stop
    return bool(first <= place.start and place.stop <= last)


def _columns(pullbacks: Sequence[Pullback], totals: Sequence[Total]) -> Columns:
    risk = pullbacks[0].risk
    names = list(dict.fromkeys(name for total in totals for name in total.names))
    formed = max(total.formed for total in totals)
    return Columns(pullbacks, names, memory_budget(risk), formed)


def _check_same_parameters(left: EmpiricalRisk, right: EmpiricalRisk) -> None:
    if left is right:
        return
    shapes = [{n: tuple(p.shape) for n, p in r.params.items()} for r in (left, right)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        raise ValueError(
            "Factors of risks with different parameters have no cross-Gram matrix: "
            f"{shapes[0]} and {shapes[1]}."
        )


@gram_matrix.register
def _(left: Pullback, right: TorchLinearOperator) -> Tensor:
    if not isinstance(right, Pullback):
        return left.T.apply(to_dense(right))
    if left is not right:
        return cross_gram(left, right)
    total = GramTotal(left, right, list(left.risk.params))
    sum_columns(left, [total])
    return total.matrix


@outer_matrix.register
def _(factor: Pullback) -> Tensor:
    total = OuterTotal(factor, list(factor.risk.params))
    sum_columns(factor, [total])
    return total.matrix


@row_norms_squared.register
def _(op: Pullback) -> Tensor:
    total = RowNorms(op, list(op.risk.params))
    sum_columns(op, [total])
    return total.norms


@to_dense.register
def _(op: Pullback) -> Tensor:
    names = list(op.risk.params)
    result = torch.empty(op.shape, dtype=op.torch_dtype, device=op.device)
    columns = Columns([op], names, memory_budget(op.risk), formed=op.shape[0])
    for (piece,) in columns.pieces():
        result[:, piece.place] = piece.rows(names, op.risk).T
    return result
