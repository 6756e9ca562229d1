"""The rules of what is summed over the columns of factors Jᵀ B.

Gram and outer products, norms of rows and of columns, and the columns themselves: one
pass over the data each, layer by layer (:mod:`vivit_linop.net.sums`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.linalg.reductions import matrix_of_operator
from vivit_linop.net.blocks import Columns, memory_budget
from vivit_linop.net.sums import (
    ColumnNorms,
    EntrySums,
    GramTotal,
    OuterTotal,
    RowNorms,
    Total,
    accumulate,
    cross_gram,
)
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.verbs import (
    centered_row_norms_squared,
    column_norms_squared,
    column_pieces,
    gram_matrix,
    outer_matrix,
    row_norms_squared,
    to_dense,
)
from vivit_linop.risk.memory import check_matrix_fits


def sum_columns(factor: Pullback, totals: Sequence[Total]) -> None:
    """Compute several sums over the columns of one pullback together."""
    columns = accumulate(factor, totals, factor.stored)
    if columns is not None:
        factor.offer(columns)


@gram_matrix.register
def gram_matrix_of_pullback(left: Pullback, right: TorchLinearOperator) -> Tensor:
    """Layer by layer, between factors; else by products."""
    if not isinstance(right, Pullback):
        return left.T.apply(to_dense(right))
    if left is not right:
        return cross_gram(left, right)
    total = GramTotal(left, right, list(left.risk.params))
    sum_columns(left, [total])
    return total.matrix


@outer_matrix.register
def outer_matrix_of_pullback(factor: Pullback) -> Tensor:
    """From formed columns, some samples at a time."""
    total = OuterTotal(factor, list(factor.risk.params))
    sum_columns(factor, [total])
    return total.matrix


@row_norms_squared.register
def row_norms_of_pullback(op: Pullback) -> Tensor:
    """In the structure of the layers."""
    total = RowNorms(op, list(op.risk.params))
    sum_columns(op, [total])
    return total.entries


@column_norms_squared.register
def column_norms_of_pullback(op: Pullback) -> Tensor:
    """Without the columns."""
    total = ColumnNorms(op, [list(op.risk.params)])
    sum_columns(op, [total])
    return total.norms.squeeze(1)


@centered_row_norms_squared.register
def centered_row_norms_of_pullback(op: Pullback) -> Tensor:
    """Σ_n g_n² − N ḡ²: both sums from one pass."""
    names = list(op.risk.params)
    squares, sums = RowNorms(op, names), EntrySums(op, names)
    sum_columns(op, [squares, sums])
    centred = squares.entries - sums.entries.square() / op.shape[1]
    return centred.clamp(min=0.0)


@column_pieces.register
def column_pieces_of_pullback(op: Pullback) -> Iterator[tuple[slice, Tensor]]:
    """Formed, from the stored columns or from one pass over the data."""
    names = list(op.risk.params)
    columns = Columns([op], names, memory_budget(op.risk), formed=op.shape[0])
    stored = op.stored
    for piece in stored.pieces if stored else (p for (p,) in columns.pieces()):
        yield piece.place, piece.rows(names, op.risk).T


@to_dense.register
def dense_of_pullback(op: Pullback) -> Tensor:
    """The columns, formed."""
    name = "Jacobian" if op.is_plain else type(op).__name__
    check_matrix_fits(name, op.shape, op.torch_dtype, op.device)
    return matrix_of_operator(op)
