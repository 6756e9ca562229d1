"""Sums over the columns Jᵀ B: Gram matrices, norms, outer products, layer by layer.

Rules of the verbs for pullbacks. Each takes one pass over the data, or none where the
columns are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.linalg.sandwiches import gram_blocks_of_operator
from vivit_linop.modes import as_guest
from vivit_linop.net.column_passes import Pass, accumulate
from vivit_linop.net.cross_grams import cross_gram, cross_sample_grams, own_gram_rows
from vivit_linop.net.totals import (
    ColumnNorms,
    EntrySums,
    GramTotal,
    OuterTotal,
    RowNorms,
    Rows,
    SampleGrams,
    Total,
)
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import WeightedRows
from vivit_linop.operators.elementary import Dense, Scaled
from vivit_linop.operators.grams import weighted_gram_matrix_of_operator
from vivit_linop.operators.lowrank import Centered
from vivit_linop.operators.parts import HStack
from vivit_linop.ranks.alone import RankRows

Sums = TypeVar("Sums", bound=Total)
# Factors that are made of others, and know what to do with these.
_COMPOSED = (Dense, Scaled, Centered, HStack, WeightedRows)


def sum_columns(factor: Pullback, total: Sums, *others: Total) -> Sums:
    """Return a sum over the columns of a pullback; others come with it."""
    columns = accumulate(factor, [total, *others], factor.stored)
    if columns is not None:
        factor.offer(columns)
    return total


@verbs.gram_matrix.register
def gram_matrix_of_pullback(left: Pullback, right: Op) -> Tensor:
    """Layer by layer, between factors; else by products."""
    if isinstance(right, _COMPOSED):
        return verbs.gram_matrix(right, left).T
    if not isinstance(right, Pullback):
        return left.T.apply(verbs.to_dense(right))
    if left is not right:
        return cross_gram(left, right)
    return sum_columns(left, GramTotal(left, right, list(left.risk.params))).matrix


@verbs.gram_rows.register
def gram_rows_of_pullback(left: Pullback, right: Op) -> RankRows | None:
    """Over several processes, by pairs of pieces that go round."""
    if not isinstance(right, Pullback) or not left.ranks.is_many:
        return None
    return RankRows(left.ranks, own_gram_rows(left, right), left.layout.before)


@verbs.as_factor.register
def pullback_as_factor(op: Pullback) -> Pullback:
    """Itself: Gram matrices need no column."""
    return op


@verbs.weighted_gram_matrix.register
def weighted_gram_matrix_of_pullback(
    left: Pullback, right: Op, weights: Tensor
) -> Tensor:
    """As the Gram matrix, with weights in the columns of the layers."""
    if isinstance(right, _COMPOSED):
        return verbs.weighted_gram_matrix(right, left, weights).T
    if not isinstance(right, Pullback):
        return weighted_gram_matrix_of_operator(left, right, weights)
    if left is not right:
        return cross_gram(left, right, weights)

    def total_of(weights: Tensor) -> Tensor:
        total = GramTotal(left, left, list(left.risk.params), weights)
        return sum_columns(left, total).matrix

    return _signed(total_of, weights)


@verbs.gram_blocks.register
def gram_blocks_of_pullback(
    left: Pullback, right: Op, size: int, weights: Tensor | None = None
) -> Tensor:
    """From the columns of each sample alone, layer by layer."""
    if (
        not isinstance(right, Pullback)
        or right.risk is not left.risk
        or right.layout != left.layout
        or not left.layout.is_uniform
        or left.width % size
    ):
        return gram_blocks_of_operator(left, right, size, weights)
    if right is left and size == 1 and weights is None:
        return verbs.column_norms_squared(left).reshape(-1, 1, 1)

    def total_of(weights: Tensor | None) -> Tensor:
        return sum_columns(left, SampleGrams(left, left, weights)).matrices

    if right is not left:
        grams = cross_sample_grams(left, right, weights)
    else:
        grams = total_of(None) if weights is None else _signed(total_of, weights)
    return blocks_of_samples(grams, size)


def blocks_of_samples(grams: Tensor, size: int) -> Tensor:
    """Return the blocks on diagonals, ``[N, R, R] -> [N·R/s, s, s]``."""
    blocks = grams.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


def _signed(of: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """Return what is linear in weights and known for those that have roots."""
    if (weights >= 0.0).all():
        return of(weights)
    return of(weights.clamp(min=0.0)) - of((-weights).clamp(min=0.0))


@verbs.outer_matrix.register
def outer_matrix_of_pullback(factor: Pullback) -> Tensor:
    """From formed columns, some samples at a time."""
    return sum_columns(factor, OuterTotal(factor, list(factor.risk.params))).matrix


@verbs.row_norms_squared.register
def row_norms_of_pullback(op: Pullback) -> Tensor:
    """In the structure of the layers."""
    return sum_columns(op, RowNorms(op, list(op.risk.params))).entries


@verbs.column_norms_squared.register
def column_norms_of_pullback(op: Pullback) -> Tensor:
    """Without the columns."""
    total = ColumnNorms(op, [list(op.risk.params)])
    return sum_columns(op, total).norms.squeeze(1)


@verbs.centered_row_norms_squared.register
def centered_row_norms_of_pullback(op: Pullback) -> Tensor:
    """Σ_n g_n² − N ḡ²: both sums from one pass."""
    names = list(op.risk.params)
    sums = EntrySums(op, names)
    squares = sum_columns(op, RowNorms(op, names), sums)
    centred = squares.entries - sums.entries.square() / op.shape[1]
    return centred.clamp(min=0.0)


@verbs.column_pieces.register
def column_pieces_of_pullback(op: Pullback) -> Iterator[tuple[slice, Tensor]]:
    """Formed, from the stored columns or from one pass over the data."""
    return formed_pieces(op, list(op.risk.params))


def formed_pieces(
    factor: Pullback, names: Sequence[str]
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of some parameters, of some columns at a time."""
    return factor.ranks.in_turn(_own_formed_pieces(factor, names))


def _own_formed_pieces(
    factor: Pullback, names: Sequence[str]
) -> Iterator[tuple[slice, Tensor]]:
    whole, stored = Rows(factor, names), factor.stored
    made = iter(stored.pieces) if stored else Pass([factor], [whole]).single()
    while True:
        # Left before the columns are given away.
        with as_guest(factor.risk.device):
            piece = next(made, None)
            if piece is None:
                return
            whole.add(piece, piece)
        yield piece.place, whole.rows.T
