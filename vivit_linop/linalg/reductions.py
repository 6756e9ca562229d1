"""Columns, matrices, diagonals, norms: the rules of the verbs that read entries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from typing import cast

import torch
from torch import Tensor

from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import Damped
from vivit_linop.operators.elementary import (
    Adjoint,
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
)
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    KhatriRao,
    Kronecker,
)
from vivit_linop.operators.lowrank import Centered, Gram, LowRank
from vivit_linop.operators.parts import HStack
from vivit_linop.operators.random_projection import RandomProjection
from vivit_linop.operators.sandwich import LowRankForm, low_rank_form

# Columns that are multiplied at a time: enough to batch, few enough to fit.
CHUNK = 256

# Columns, some at a time ---------------------------------------------------------


@verbs.column_pieces.register
def column_pieces_of_operator(op: Op) -> Iterator[tuple[slice, Tensor]]:
    """By products with the identity's columns."""
    n = op.shape[1]
    for start in range(0, n, CHUNK):
        place = slice(start, min(start + CHUNK, n))
        size = place.stop - start
        unit = torch.zeros(n, size, dtype=op.torch_dtype, device=op.device)
        unit[place].fill_diagonal_(1.0)
        yield place, op.apply(unit)


@verbs.column_pieces.register
def column_pieces_of_dense(op: Dense) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the matrix."""
    for start in range(0, op.shape[1], CHUNK):
        place = slice(start, min(start + CHUNK, op.shape[1]))
        yield place, op.matrix[:, place]


@verbs.column_pieces.register
def column_pieces_of_random_projection(
    op: RandomProjection,
) -> Iterator[tuple[slice, Tensor]]:
    """The blocks that its products make."""
    for place, block in op.blocks(op.torch_dtype, op.device):
        yield place, block.T


@verbs.column_pieces.register
def column_pieces_of_scaled(op: Scaled) -> Iterator[tuple[slice, Tensor]]:
    for place, columns in verbs.column_pieces(op.operator):
        yield place, op.factor * columns


@verbs.column_pieces.register
def column_pieces_of_product(op: Product) -> Iterator[tuple[slice, Tensor]]:
    """A times the columns of B, whatever these are made by."""
    for place, columns in verbs.column_pieces(op.factors[-1]):
        for factor in reversed(op.factors[:-1]):
            columns = factor.apply(columns)
        yield place, columns


@verbs.column_pieces.register
def column_pieces_of_stack(op: HStack) -> Iterator[tuple[slice, Tensor]]:
    """Those of one part after the other."""
    start = 0
    for part in op.parts:
        for place, columns in verbs.column_pieces(part):
            yield slice(start + place.start, start + place.stop), columns
        start += part.shape[1]


def columns_at(op: Op, places: Tensor) -> Tensor:
    """Some columns of an operator, ``[m, k]``, by as many products."""
    shape = op.shape[1], len(places)
    unit = torch.zeros(shape, dtype=op.torch_dtype, device=places.device)
    return op.apply(unit.scatter_(0, places.unsqueeze(0), 1.0))


def entries_on_diagonal(op: Op, places: Tensor) -> Tensor:
    """Some entries of the diagonal ``[k]``, by as many products."""
    return columns_at(op, places)[places].diagonal()


# Dense matrices -----------------------------------------------------------------


@verbs.to_dense.register
def matrix_of_operator(op: Op) -> Tensor:
    result = torch.empty(op.shape, dtype=op.torch_dtype, device=op.device)
    for place, columns in verbs.column_pieces(op):
        result[:, place] = columns
    return result


@verbs.to_dense.register
def matrix_of_product(op: Product) -> Tensor:
    """By products with the columns, or with the rows where these are fewer."""
    if op.shape[0] < op.shape[1]:
        return matrix_of_operator(op.T).T
    return matrix_of_operator(op)


@verbs.to_dense.register
def matrix_of_dense(op: Dense | Gram) -> Tensor:
    return op.matrix.clone()


@verbs.to_dense.register
def matrix_of_diagonal(op: Diagonal) -> Tensor:
    return torch.diag(op.entries)


@verbs.to_dense.register
def matrix_of_damped(op: Damped) -> Tensor:
    unit = torch.eye(op.shape[0], dtype=op.torch_dtype, device=op.device)
    return verbs.to_dense(op.operator) + op.damping * unit


@verbs.to_dense.register
def matrix_of_khatri_rao(op: KhatriRao) -> Tensor:
    product = op.left[:, None, :] * op.right[None, :, :]
    return product.reshape(op.shape)


@verbs.to_dense.register
def matrix_of_low_rank(op: LowRank) -> Tensor:
    return op.scale * verbs.outer_matrix(op.factor)


@verbs.to_dense.register
def matrix_of_dense_inverse(op: DenseInverse) -> Tensor:
    """Symmetric where the inverted matrix is."""
    inverse = op.apply(torch.eye(op.shape[0], dtype=op.torch_dtype, device=op.device))
    return (inverse + inverse.T) / 2 if op.self_adjoint else inverse


# Diagonals ------------------------------------------------------------------------


@verbs.diagonal.register
def diagonal_of_operator(op: Op) -> Tensor:
    """Costs n products, in chunks; no n × n array."""
    pieces = column_pieces_of_operator(op)
    return torch.cat([part[place].diagonal() for place, part in pieces])


@verbs.diagonal.register
def diagonal_of_identity(op: Identity) -> Tensor:
    return torch.ones(op.shape[0], dtype=op.torch_dtype, device=op.device)


@verbs.diagonal.register
def diagonal_of_dense(op: Dense) -> Tensor:
    return op.matrix.diagonal().clone()


@verbs.diagonal.register
def diagonal_of_diagonal(op: Diagonal) -> Tensor:
    return op.entries.clone()


@verbs.diagonal.register
def diagonal_of_product(op: Product) -> Tensor:
    """(A B)_ii = Σ_k A_ik B_ki, where A and B meet in fewer than n entries."""
    inner = [factor.shape[1] for factor in op.factors[:-1]]
    if not inner:
        return verbs.diagonal(op.factors[0])
    if min(inner) >= op.shape[0]:
        first, *between, last = op.factors
        if isinstance(first, Diagonal):
            return first.entries * verbs.diagonal(
                reduce(verbs.matmul, (*between, last))
            )
        if isinstance(last, Diagonal):
            return (
                verbs.diagonal(reduce(verbs.matmul, (first, *between))) * last.entries
            )
        if (known := _diagonal_in_eigenbasis(op)) is not None:
            return known
        if (found := narrowest_low_rank(op)) is None:
            return _diagonal_of_square_factors(op)
        at, low_rank = found
        V = low_rank.factor
        narrow = *op.factors[:at], V, V.T, *op.factors[at + 1 :]
        return low_rank.scale * diagonal_of_product(Product(*narrow))
    if op.self_adjoint and len(inner) == 2:
        # Aᵀ S A: columns of an inverse S may be far larger than what Aᵀ leaves of them,
        # and so is their rounding. Not so those of S A.
        return verbs.diagonal_blocks(op, 1).flatten()
    at = 1 + inner.index(min(inner))
    A, B = Product(*op.factors[:at]), Product(*op.factors[at:])
    pieces = map(column_pieces_of_operator, (A, B.T))
    pairs = zip(*pieces, strict=True)
    return reduce(add, ((left * right).sum(1) for (_, left), (_, right) in pairs))


def _diagonal_in_eigenbasis(op: Product) -> Tensor | None:
    """That of two Kronecker products, one or both with eigenvalues of their own."""
    if len(op.factors) != 2 or op.requires_grad:
        return None
    A, B = op.factors
    if not isinstance(B, CorrectedKronecker):  # the diagonal of the transpose
        A, B = B.T, A.T
    if not isinstance(B, CorrectedKronecker):
        return None
    Q = [vectors for _, vectors in B.factor_eigenpairs]
    if isinstance(A, CorrectedKronecker):
        P = [vectors for _, vectors in A.factor_eigenpairs]
        if len(P) != 2 or [*map(len, P)] != [*map(len, Q)]:
            return None
        return _diagonal_of_two_bases(P, A.eigenvalues, Q, B.eigenvalues)
    if not isinstance(A, Kronecker) or [f.shape for f in A.factors] != [
        q.shape for q in Q
    ]:
        return None
    # (M Q ∘ Q) λ, a Kronecker product too.
    shares = (f.apply(q) * q for f, q in zip(A.factors, Q, strict=True))
    return Kronecker(*shares).apply(B.eigenvalues.unsqueeze(1)).squeeze(1)


def _diagonal_of_two_bases(
    P: Sequence[Tensor], mu: Tensor, Q: Sequence[Tensor], lambdas: Tensor
) -> Tensor:
    """That of P diag(μ) PᵀQ diag(λ) Qᵀ with P = P₁ ⊗ P₂ and Q = Q₁ ⊗ Q₂.

    Row by row of P₁ and Q₁: b a³ + a b³ operations, with no matrix of a b rows.
    """
    T = [p.T @ q for p, q in zip(P, Q, strict=True)]
    shape = len(P[0]), len(P[1])
    mu, lambdas = mu.view(shape), lambdas.view(shape)
    if shape[0] > shape[1]:  # as few rows as possible
        found = _diagonal_of_two_bases(
            (P[1], P[0]), mu.T.flatten(), (Q[1], Q[0]), lambdas.T.flatten()
        )
        return found.view(shape[::-1]).T.flatten()
    rows = []
    for p, q in zip(P[0], Q[0], strict=True):
        inner = (mu.T * p) @ T[0] @ (q[:, None] * lambdas)
        rows.append(((P[1] @ (T[1] * inner)) * Q[1]).sum(1))
    return torch.cat(rows)


def _diagonal_of_square_factors(op: Product) -> Tensor:
    """By that of the factors a I + V M Vᵀ which has the fewest columns.

    A low-rank node of more columns than rows is a matrix. Entries that lose more than
    half of the digits come from products.
    """
    if op.requires_grad or (found := narrowest_form(op)) is None:
        return verbs.diagonal_blocks(_with_matrices(op), 1).flatten()
    at, form = found
    V, before, after = form.factor, op.factors[:at], op.factors[at + 1 :]
    assert V is not None
    scales = () if form.weights is None else (Diagonal(form.weights),)
    unit = torch.eye(V.shape[1], dtype=op.torch_dtype, device=op.device)
    inner = Dense(form.multiply(unit).to(unit))
    narrow = Product(*before, *scales, V, inner, V.T, *scales, *after)
    rest = reduce(verbs.matmul, (*before, *scales, *after))
    shifted = form.shift * verbs.diagonal(rest)
    result = shifted + diagonal_of_product(narrow)
    lost = result.abs() < torch.finfo(result.dtype).eps ** 0.5 * shifted.abs()
    for part in lost.nonzero().squeeze(1).split(CHUNK):
        result[part] = entries_on_diagonal(op, part)
    return result


def _with_matrices(op: Product) -> Product:
    """The product with matrices in place of nodes V Vᵀ with many columns, if they fit.

    Each product with such a node is one with V, which may be one through a net.
    """
    found: dict[int, Op] = {}
    for factor in op.factors:
        if not isinstance(factor, LowRank) or factor.requires_grad:
            continue
        if factor.factor.shape[1] >= factor.shape[0] and id(factor) not in found:
            with contextlib.suppress(MemoryError):
                found[id(factor)] = Dense(verbs.to_dense(factor))
    return Product(*(found.get(id(factor), factor) for factor in op.factors))


def narrowest_form(op: Product, kind: type[Op] = Op) -> tuple[int, LowRankForm] | None:
    """Return which factor is an a D + D V M Vᵀ D with the fewest columns in V.

    None where V has as many as there are rows, or gradients flow to it.

    Args:
        op: The product.
        kind: Of the factors that are looked at.
    """
    forms: dict[int, tuple[int, LowRankForm]] = {}
    for at, factor in enumerate(op.factors):
        form = low_rank_form(factor) if isinstance(factor, kind) else None
        if form is not None and (V := form.factor) is not None and not V.requires_grad:
            forms[V.shape[1]] = at, form
    least = min(forms, default=op.shape[0])
    return forms[least] if least < op.shape[0] else None


def narrowest_low_rank(op: Product) -> tuple[int, LowRank] | None:
    """Return which factor is a c V Vᵀ with the fewest columns in V, likewise."""
    found = narrowest_form(op, LowRank)
    return found and (found[0], cast(LowRank, op.factors[found[0]]))


@verbs.diagonal.register
def diagonal_of_damped(op: Damped) -> Tensor:
    return verbs.diagonal(op.operator) + op.damping


@verbs.diagonal.register
def diagonal_of_low_rank(op: LowRank) -> Tensor:
    """The squared row norms of V."""
    return op.scale * verbs.row_norms_squared(op.factor)


@verbs.diagonal.register
def diagonal_of_gram(op: Gram) -> Tensor:
    """The squared norms of the columns, unless the matrix is known."""
    if op.left is op.right and not op.known:
        return verbs.column_norms_squared(op.left)
    return op.matrix.diagonal().clone()


@verbs.diagonal.register
def diagonal_of_block_diagonal(op: BlockDiagonal) -> Tensor:
    if not op.has_square_blocks:
        return verbs.to_dense(op).diagonal().clone()
    return op.join([verbs.diagonal(block) for block in op.blocks]).to(op.torch_dtype)


@verbs.diagonal.register
def diagonal_of_kronecker(op: Kronecker) -> Tensor:
    if any(factor.shape[0] != factor.shape[1] for factor in op.factors):
        return verbs.to_dense(op).diagonal().clone()
    result = verbs.diagonal(op.factors[0])
    for factor in op.factors[1:]:
        result = torch.outer(result, verbs.diagonal(factor)).reshape(-1)
    return result.to(op.torch_dtype)


@verbs.diagonal.register
def diagonal_of_corrected_kronecker(op: CorrectedKronecker) -> Tensor:
    """The squared entries of Q, themselves a Kronecker product, times eigenvalues."""
    squares = Kronecker(*(evecs.square() for _, evecs in op.factor_eigenpairs))
    return squares.apply(op.eigenvalues.unsqueeze(1)).squeeze(1)


# Norms of rows and columns ----------------------------------------------------------


@verbs.row_norms_squared.register
def row_norms_of_operator(op: Op) -> Tensor:
    """Sum the squares of the columns, a chunk at a time."""
    return reduce(add, (X.square().sum(1) for _, X in verbs.column_pieces(op)))


@verbs.row_norms_squared.register
def row_norms_of_adjoint(op: Adjoint) -> Tensor:
    return verbs.column_norms_squared(op.parent)


@verbs.row_norms_squared.register
def row_norms_of_centered(op: Centered) -> Tensor:
    return verbs.centered_row_norms_squared(op.factor)


@verbs.column_norms_squared.register
def column_norms_of_operator(op: Op) -> Tensor:
    return torch.cat([X.square().sum(0) for _, X in verbs.column_pieces(op)])


@verbs.column_norms_squared.register
def column_norms_of_stack(op: HStack) -> Tensor:
    """Those of one part after the other."""
    return torch.cat([verbs.column_norms_squared(part) for part in op.parts])


@verbs.column_norms_squared.register
def column_norms_of_adjoint(op: Adjoint) -> Tensor:
    return verbs.row_norms_squared(op.parent)


@verbs.centered_row_norms_squared.register
def centered_row_norms_of_operator(op: Op) -> Tensor:
    """By products with the columns less their mean: no digits cancel."""
    return row_norms_of_operator(Centered(op))
