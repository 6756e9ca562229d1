"""Principal submatrices, and rows of factors: the rules of ``restrict``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import TypeGuard

import torch
from torch import Tensor

from vivit_linop.linalg.sandwiches import gram_blocks_of_operator
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import Damped
from vivit_linop.operators.elementary import (
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    as_dense,
)
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.lowrank import Gram, LowRank, Woodbury
from vivit_linop.operators.parts import Restricted, Rows, padded
from vivit_linop.operators.symmetric import symmetric_eigenpairs


@verbs.restrict.register
def restricted_operator(op: Op, index: Tensor) -> Op:
    return Restricted(op, index)


@verbs.restrict.register
def restricted_identity(op: Identity, index: Tensor) -> Op:
    return Identity(len(index), op._own_dtype, op._own_device)


@verbs.restrict.register
def restricted_dense(op: Dense, index: Tensor) -> Op:
    return op.like(op.matrix[index][:, index])


@verbs.restrict.register
def restricted_diagonal(op: Diagonal, index: Tensor) -> Op:
    return Diagonal(op.entries[index])


@verbs.restrict.register
def restricted_damped(op: Damped, index: Tensor) -> Op:
    return verbs.damp(verbs.restrict(op.operator, index), op.damping)


@verbs.restrict.register
def restricted_matrix(op: Gram | DenseInverse, index: Tensor) -> Op:
    if isinstance(op, Gram) and not op.known:
        return Restricted(op, index)
    return verbs.restrict(as_dense(op), index)


@verbs.restrict.register
def restricted_product(op: Product, index: Tensor) -> Op:
    """E (A B C) Eᵀ = (E A) B (E Cᵀ)ᵀ, which stays self-adjoint where C = Aᵀ."""
    if len(op.factors) < 2:
        return verbs.restrict(op.factors[0], index)
    left = Rows(op.factors[0], index)
    right = left if op.self_adjoint else Rows(op.factors[-1].T, index)
    return Product(left, *op.factors[1:-1], right.T)


@verbs.restrict.register
def restricted_low_rank(op: LowRank, index: Tensor) -> Op:
    """Of the rows of V."""
    if not op.semidefinite:
        return Restricted(op, index)
    return LowRank(Rows(op.factor, index), op.scale)


@verbs.restrict.register
def restricted_restricted(op: Restricted, index: Tensor) -> Op:
    return verbs.restrict(op.operator, op.index[index])


@verbs.restrict.register
def restricted_block_diagonal(op: BlockDiagonal, index: Tensor) -> Op:
    """Block by block; blocks without a row among them are left out."""
    if not op.has_square_blocks:
        return Restricted(op, index)
    # Where each row of the whole is among those that are wanted, −1 if it is not.
    place = torch.full((op.shape[0],), -1, device=index.device)
    place[index] = torch.arange(len(index), device=index.device)
    blocks, places = [], []
    for block, part in zip(op.blocks, op.split(place), strict=True):
        rows = (part >= 0).nonzero().squeeze(1)
        if len(rows):
            blocks.append(verbs.restrict(block, rows))
            places.append(part[rows])
    return BlockDiagonal(blocks, places)


# Rows of factors ----------------------------------------------------------------------


@verbs.column_pieces.register
def column_pieces_of_rows(op: Rows) -> Iterator[tuple[slice, Tensor]]:
    for place, columns in verbs.column_pieces(op.operator):
        yield place, columns[op.index]


@verbs.gram_matrix.register
@verbs.weighted_gram_matrix.register
def gram_matrix_of_rows(left: Rows, right: Op, weights: Tensor | None = None) -> Tensor:
    """As the whole, with weights of one for these rows, and of zero for others."""
    if not _same_rows(right, left):
        w = 1.0 if weights is None else weights[:, None]
        return left.T.apply(w * verbs.to_dense(right))
    whole = _of_all_rows(left, weights)
    return verbs.weighted_gram_matrix(left.operator, right.operator, whole)


@verbs.gram_blocks.register
def gram_blocks_of_rows(
    left: Rows, right: Op, size: int, weights: Tensor | None = None
) -> Tensor:
    if not _same_rows(right, left):
        return gram_blocks_of_operator(left, right, size, weights)
    whole = _of_all_rows(left, weights)
    return verbs.gram_blocks(left.operator, right.operator, size, whole)


@verbs.column_norms_squared.register
def column_norms_of_rows(op: Rows) -> Tensor:
    return verbs.gram_blocks(op, op, 1).flatten()


def _same_rows(right: Op, left: Rows) -> TypeGuard[Rows]:
    return right is left or (
        isinstance(right, Rows)
        and left.operator.shape[0] == right.operator.shape[0]
        and torch.equal(left.index, right.index)
    )


def _of_all_rows(op: Rows, weights: Tensor | None) -> Tensor:
    """Return weights, ones by default, with zeros for the other rows."""
    if weights is None:
        weights = torch.ones(op.shape[0], dtype=op.torch_dtype, device=op.device)
    return weights.new_zeros(op.operator.shape[0]).index_copy(0, op.index, weights)


@verbs.row_norms_squared.register
def row_norms_of_rows(op: Rows) -> Tensor:
    return verbs.row_norms_squared(op.operator)[op.index]


@verbs.outer_product.register
def outer_product_of_rows(factor: Rows, X: Tensor) -> Tensor:
    X = padded(X, factor.index, factor.operator.shape[0])
    return verbs.outer_product(factor.operator, X)[factor.index]


@verbs.outer_matrix.register
def outer_matrix_of_rows(factor: Rows) -> Tensor:
    """Some columns at a time."""
    return reduce(add, (X @ X.T for _, X in verbs.column_pieces(factor)))


# Of inverses -------------------------------------------------------------------------


@verbs.diagonal.register
def diagonal_of_restricted(op: Restricted) -> Tensor:
    return verbs.diagonal(op.operator)[op.index]


@verbs.sqrt.register
def root_of_restricted(op: Restricted) -> Op:
    """E A Eᵀ = (E R)(E R)ᵀ with A = R Rᵀ."""
    return Rows(verbs.sqrt(op.operator), op.index)


@verbs.inv.register
def inverse_of_restricted(op: Restricted) -> Op:
    """Of Woodbury's (c V Vᵀ + δ I)⁻¹: what is not among the rows is eliminated.

    By Schur's complement, (E (c V Vᵀ + δ I)⁻¹ Eᵀ)⁻¹ is the operator of the rows V_k
    with the others V' integrated out, δ I + c V_k (I + c V'ᵀV'/δ)⁻¹ V_kᵀ.
    """
    inner = op.operator
    if not isinstance(inner, Woodbury) or not inner.operator.by_gram:
        return verbs.inv(as_dense(op))
    low_rank, delta = inner.operator, inner.damping
    V = low_rank.factor
    ones = torch.ones(inner.shape[0], dtype=op.torch_dtype, device=op.device)
    # Made of these rows: a difference of Gram matrices loses digits, and δ is small.
    others = verbs.weighted_gram_matrix(V, V, ones.index_fill(0, op.index, 0.0))
    evals, evecs = low_rank.ranks.led(symmetric_eigenpairs, others.double())
    weights = (1.0 + low_rank.scale / delta * evals.clamp(min=0.0)).rsqrt()
    middle = Dense((evecs * weights).to(op.torch_dtype))
    rows = Product(Rows(V, op.index), middle)
    return verbs.damp(LowRank(rows, low_rank.scale), delta)


@verbs.logdet.register
def logdet_of_restricted(op: Restricted) -> Tensor:
    if isinstance(op.operator, Woodbury):
        return -verbs.logdet(verbs.inv(op))
    return verbs.logdet(as_dense(op))
