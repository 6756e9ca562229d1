"""The rules of what is summed over the columns of factors Jᵀ B.

Gram and outer products, norms of rows and of columns, and the columns themselves: one
pass over the data each, layer by layer (:mod:`vivit_linop.net.sums`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.linalg.reductions import matrix_of_operator
from vivit_linop.linalg.sandwiches import gram_blocks_of_operator
from vivit_linop.net.blocks import Columns, memory_budget
from vivit_linop.net.sums import (
    ColumnNorms,
    EntrySums,
    GramTotal,
    OuterTotal,
    RowNorms,
    SampleGrams,
    Total,
    accumulate,
    cross_gram,
    cross_sample_grams,
)
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.elementary import Dense
from vivit_linop.operators.lowrank import Centered
from vivit_linop.operators.verbs import (
    as_factor,
    centered_row_norms_squared,
    column_norms_squared,
    column_pieces,
    gram_blocks,
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
    if isinstance(right, (Dense, Centered)):
        return gram_matrix(right, left).T
    if not isinstance(right, Pullback):
        return left.T.apply(to_dense(right))
    if left is not right:
        return cross_gram(left, right)
    total = GramTotal(left, right, list(left.risk.params))
    sum_columns(left, [total])
    return total.matrix


@as_factor.register
def pullback_as_factor(op: Pullback) -> Pullback:
    """Itself: Gram matrices need no column."""
    return op


@gram_blocks.register
def gram_blocks_of_pullback(
    left: Pullback, right: TorchLinearOperator, size: int
) -> Tensor:
    """From the columns of each sample alone, layer by layer."""
    if (
        not isinstance(right, Pullback)
        or right.risk is not left.risk
        or right.width != left.width
        or left.width % size
    ):
        return gram_blocks_of_operator(left, right, size)
    if right is left:
        total = SampleGrams(left, left)
        sum_columns(left, [total])
        grams = total.matrices
    else:
        grams = cross_sample_grams(left, right)
    blocks = grams.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


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
