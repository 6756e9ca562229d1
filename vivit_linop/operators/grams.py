"""Gram and outer products of factors: the rules of these verbs.

The rules for what is pulled back through a Jacobian stand in
:mod:`vivit_linop.curvature.column_sums`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import WeightedRows
from vivit_linop.operators.elementary import Adjoint, Dense, Product, Scaled
from vivit_linop.operators.kronecker import KhatriRao
from vivit_linop.operators.lowrank import Centered, Gram
from vivit_linop.operators.parts import HStack


@verbs.gram.register
def gram_of_operator(factor: Op) -> Gram:
    return Gram(factor, factor)


@verbs.gram_matrix.register
def gram_matrix_of_operator(left: Op, right: Op) -> Tensor:
    return left.T.apply(right.to_dense())


@verbs.gram_matrix.register
def gram_matrix_of_adjoint(left: Adjoint, right: Op) -> Tensor:
    """(Aᵀ)ᵀ Aᵀ = A Aᵀ."""
    if right is left:
        return verbs.outer_matrix(left.parent)
    return gram_matrix_of_operator(left, right)


@verbs.gram_matrix.register
def gram_matrix_of_dense(left: Dense, right: Op) -> Tensor:
    """By products with the other factor: not formed, where that is none."""
    if isinstance(right, Dense):
        dtype = torch.promote_types(left.torch_dtype, right.torch_dtype)
        return left.matrix.T.to(dtype) @ right.matrix.to(dtype)
    return right.T.apply(left.matrix).T


@verbs.gram_matrix.register
def gram_matrix_of_khatri_rao(left: KhatriRao, right: Op) -> Tensor:
    if not isinstance(right, KhatriRao) or not aligned(left, right):
        return left.T.apply(right.to_dense())
    return (left.left.T @ right.left) * (left.right.T @ right.right)


@verbs.gram_matrix.register
def gram_matrix_of_product(left: Product, right: Op) -> Tensor:
    """(A B)ᵀ (A B) = Bᵀ (AᵀA) B, where A has fewer columns than rows."""
    A = left.factors[0]
    if len(left.factors) == 1:
        return verbs.gram_matrix(A, A if right is left else right)
    if right is not left or A.shape[1] >= A.shape[0]:
        return gram_matrix_of_operator(left, right)
    B = Product(*left.factors[1:])
    return B.T.apply(B.T.apply(verbs.gram(A).to_dense()).T)


@verbs.gram_matrix.register
@verbs.weighted_gram_matrix.register
def gram_matrix_of_centered(
    left: Centered, right: Op, weights: Tensor | None = None
) -> Tensor:
    """(A C)ᵀ B = C AᵀB, with C = I − 1 1ᵀ/R; also on the other side."""
    inner = right.factor if isinstance(right, Centered) else right
    if weights is None:
        K = verbs.matmul(left.factor.T, inner).to_dense()
    else:
        K = verbs.weighted_gram_matrix(left.factor, inner, weights)
    K = K - K.mean(0, keepdim=True)
    return K - K.mean(1, keepdim=True) if isinstance(right, Centered) else K


@verbs.gram_matrix.register
@verbs.weighted_gram_matrix.register
def gram_matrix_of_stack(
    left: HStack, right: Op, weights: Tensor | None = None
) -> Tensor:
    """[A B]ᵀ [C D] from its blocks; those on the diagonal are kept by the parts."""
    parts = right.parts if isinstance(right, HStack) else (right,)
    dtype = torch.promote_types(left.torch_dtype, right.torch_dtype)
    K = torch.empty(left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    start = 0
    for i, A in enumerate(left.parts):
        rows, first = slice(start, start + A.shape[1]), 0
        for j, B in enumerate(parts):
            columns = slice(first, first + B.shape[1])
            known = left is right and j < i
            K[rows, columns] = K[columns, rows].T if known else _block(A, B, weights)
            first = columns.stop
        start = rows.stop
    return K


@verbs.gram_matrix.register
@verbs.weighted_gram_matrix.register
def gram_matrix_of_scaled(
    left: Scaled, right: Op, weights: Tensor | None = None
) -> Tensor:
    """What is kept of the factor serves all its multiples."""
    if isinstance(right, Scaled):
        block = right.factor * _block(left.operator, right.operator, weights)
    else:
        block = _block(left.operator, right, weights)
    return left.factor * block


def _block(A: Op, B: Op, weights: Tensor | None) -> Tensor:
    if weights is not None:
        return verbs.weighted_gram_matrix(A, B, weights)
    return verbs.gram(A).to_dense() if A is B else verbs.gram_matrix(A, B)


@verbs.inner_product.register
def inner_product_of_operator(factor: Op, X: Tensor) -> Tensor:
    return factor.T.apply(factor.apply(X))


@verbs.weighted_gram_matrix.register
def weighted_gram_matrix_of_operator(left: Op, right: Op, weights: Tensor) -> Tensor:
    pieces = verbs.column_pieces(right)
    return torch.cat([left.T.apply(weights[:, None] * X) for _, X in pieces], dim=1)


@verbs.weighted_gram_matrix.register
def weighted_gram_matrix_of_dense(left: Dense, right: Op, weights: Tensor) -> Tensor:
    return verbs.gram_matrix(Dense(weights[:, None] * left.matrix), right)


@verbs.gram_matrix.register
@verbs.weighted_gram_matrix.register
def gram_matrix_of_weighted_rows(
    left: WeightedRows, right: Op, weights: Tensor | None = None
) -> Tensor:
    """(D V)ᵀ (E W) = Vᵀ (D E) W."""
    all_weights = left.weights if weights is None else weights * left.weights
    if isinstance(right, WeightedRows):
        all_weights, right = all_weights * right.weights, right.factor
    return verbs.weighted_gram_matrix(left.factor, right, all_weights)


@verbs.outer_matrix.register
def outer_matrix_of_operator(factor: Op) -> Tensor:
    dense = factor.to_dense()
    return dense @ dense.T


@verbs.outer_product.register
def outer_product_of_operator(factor: Op, X: Tensor) -> Tensor:
    return factor.apply(factor.T.apply(X))


def aligned(A: KhatriRao, B: KhatriRao) -> bool:
    """Whether factors have as many rows each, and one dtype."""
    shapes = [(K.left.shape[0], K.right.shape[0]) for K in (A, B)]
    return shapes[0] == shapes[1] and A._own_dtype == B._own_dtype
