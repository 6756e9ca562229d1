"""Traces: of what has few rows on one side, by that side.

A trace does not see where a product begins, tr(A B) = tr(B A). So with A = a I + V M Vᵀ

    tr(A B) = a tr(B) + tr(M Vᵀ B V),

and all that is left to do with D rows is tr(B) and the products of B with V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import islice

import torch
from torch import Tensor

from vivit_linop.arguments import Scalar
from vivit_linop.linalg.reductions import narrowest_form, narrowest_low_rank
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import Damped, DampedInverse
from vivit_linop.operators.elementary import (
    Diagonal,
    Product,
    Sum,
    as_multiple,
    mirrored,
)
from vivit_linop.operators.kronecker import BlockDiagonal, CorrectedKronecker, Kronecker
from vivit_linop.operators.lowrank import DampedRoot, LowRank, Woodbury
from vivit_linop.operators.sandwich import low_rank_form

# Products of sums of more terms have a diagonal that takes less.
_MOST_TERMS = 32


@verbs.trace.register
def trace_of_operator(op: Op) -> Tensor:
    return verbs.diagonal(op).sum()


@verbs.trace.register
def trace_of_low_rank(op: LowRank) -> Tensor:
    """That of the smaller side, tr(V Vᵀ) = tr(VᵀV), where its matrix is known."""
    if op.kept.matrix is not None:
        return op.scale * op.kept.matrix.trace()
    return trace_of_operator(op)


@verbs.trace.register
def trace_of_block_diagonal(op: BlockDiagonal) -> Tensor:
    """The sum of those of the blocks."""
    if not op.has_square_blocks:
        return trace_of_operator(op)
    return torch.stack([*map(verbs.trace, op.blocks)]).sum().to(op.torch_dtype)


@verbs.trace.register
def trace_of_corrected_kronecker(op: CorrectedKronecker) -> Tensor:
    return op.eigenvalues.sum()


@verbs.trace.register
def trace_of_damped(op: Damped) -> Tensor:
    return verbs.trace(op.operator) + op.shape[0] * op.damping


@verbs.trace.register
def trace_of_woodbury(op: Woodbury) -> Tensor:
    """The sum of 1/(λ + δ), the zeros of V Vᵀ included.

    Where the eigenvalues are not known, the squares of L⁻ᵀ with δ I + c K = L Lᵀ.
    """
    low_rank = op.operator
    if low_rank.kept.has_eigenvalues:
        evals = low_rank.nonnegative_eigenvalues
        known, total = len(evals), (1.0 / (low_rank.scale * evals + op.damping)).sum()
    else:
        known = low_rank.small_rows
        parts = [columns.square_().sum() for columns in op.root_columns()]
        total = torch.stack(parts).sum()
    return total + (op.shape[0] - known) / op.damping


@verbs.trace.register
def trace_by_eigenvalues(op: DampedInverse | DampedRoot) -> Tensor:
    """The sum of 1/(λ + δ), of the roots, or of 1 over these; A may be unsymmetric."""
    return verbs.eigvalsh(op).sum() if op.self_adjoint else trace_of_operator(op)


# Sums and products ----------------------------------------------------------------


@verbs.trace.register
def trace_of_product(op: Product) -> Tensor:
    """On the small side of a factor; the effective dimension tr(G (G + δ I)⁻¹) too."""
    factors = op.factors
    # Sandwiches have diagonals of their own.
    plain = type(op) is Product and len(factors) > 1
    if not plain or any(f.shape != op.shape for f in factors):
        return trace_of_operator(op)
    if (found := _in_eigenbasis(op)) is not None:
        return found
    if (found := _by_columns(op)) is not None:
        return found
    # Powers of G + δ I have many terms.
    by_terms = any(isinstance(factor, (Damped, Sum)) for factor in factors)
    if by_terms and not all(map(low_rank_form, factors)):
        return _trace_by_terms(op)
    for at, factor in enumerate(factors):
        if isinstance(factor, Diagonal):
            rest = verbs.diagonal(reduce(verbs.matmul, _after(op, at)))
            return (factor.entries * rest).sum()
    return _trace_by_forms(op)


def _in_eigenbasis(op: Product) -> Tensor | None:
    """The trace of two Kronecker products, one or both with eigenvalues of their own.

    In float64, as their eigenvectors are computed: terms of differences cancel.
    """
    if len(op.factors) != 2 or op.requires_grad:
        return None
    A, B = op.factors
    if isinstance(A, Sum) and len(A.terms) == 2 and A.self_adjoint and mirrored(A, B):
        first, second = A.terms
        if isinstance(second, CorrectedKronecker):
            first, second = second, first
        if isinstance(first, CorrectedKronecker):
            return _norm_in_eigenbasis(first, second)
        return _norm_of_two(first, second)
    if not isinstance(A, CorrectedKronecker):
        A, B = B, A
    if not isinstance(A, CorrectedKronecker):
        return None
    return _inner_product(A, B)


def _inner_product(A: CorrectedKronecker, B: Op) -> Tensor | None:
    """tr(Q Λ Qᵀ B) = λᵀ diag(Qᵀ B Q)."""
    Q, evals = _vectors(A), A.eigenvalues.double()
    if isinstance(B, CorrectedKronecker) and (P := _vectors(B)):
        if [*map(len, P)] != [*map(len, Q)]:
            return None
        squares = Kronecker(*((q.T @ p).square() for q, p in zip(Q, P, strict=True)))
        in_basis = squares.apply(B.eigenvalues.double().unsqueeze(1)).squeeze(1)
    elif (matrices := _matrices(B, Q)) is not None:
        in_basis = _outer([M.diagonal() for M in matrices])
    else:
        return None
    return (evals @ in_basis).to(A.torch_dtype)


def _norm_in_eigenbasis(first: CorrectedKronecker, second: Op) -> Tensor | None:
    """|Q Λ Qᵀ + B|² for a self-adjoint B, without terms that cancel.

    On the diagonal in the basis Q are sums, and beside it is B alone.
    """
    matrices = _matrices(second, _vectors(first))
    if matrices is None:
        return None
    on = [M.diagonal() for M in matrices]
    beside = [M - torch.diag(d) for M, d in zip(matrices, on, strict=True)]
    total = (first.eigenvalues.double() + _outer(on)).square().sum()
    # Of the entries beside the diagonal, those that are so in a factor, and on it in
    # all factors before.
    for at, part in enumerate(beside):
        sizes = [*(d.square().sum() for d in on[:at]), part.square().sum()]
        sizes += [M.square().sum() for M in matrices[at + 1 :]]
        total = total + torch.stack(sizes).prod()
    return total.to(first.torch_dtype)


def _norm_of_two(first: Op, second: Op) -> Tensor | None:
    """|B ⊗ A + D ⊗ C|² as that of (B + D) ⊗ A + D ⊗ (C − A): small if both are."""
    left, right = _matrices(first), _matrices(second)
    if left is None or right is None or not len(left) == len(right) == 2:
        return None
    (B, A), (D, C) = left, right
    if A.shape != C.shape:
        return None
    P, R = B + D, C - A
    ends = [P.square().sum() * A.square().sum(), D.square().sum() * R.square().sum()]
    total = ends[0] + 2 * (P * D).sum() * (A * R).sum() + ends[1]
    if total < torch.finfo(total.dtype).eps ** 0.5 * (ends[0] + ends[1]):
        return None
    return total.to(first.torch_dtype)


def _vectors(op: CorrectedKronecker) -> list[Tensor]:
    return [vectors.double() for _, vectors in op.factor_eigenpairs]


def _matrices(op: Op, Q: Sequence[Tensor] = ()) -> list[Tensor] | None:
    """The factors of a Kronecker product in another basis, None where it is none.

    Args:
        op: The Kronecker product, or a multiple of one.
        Q: The basis, a matrix for each factor; that in which they are by default.
    """
    of, scaled = as_multiple(op)
    if not isinstance(of, Kronecker):
        return None
    found = [verbs.to_dense(factor).double() for factor in of.factors]
    if Q:
        if [M.shape for M in found] != [q.shape for q in Q]:
            return None
        found = [q.T @ M @ q for q, M in zip(Q, found, strict=True)]
    return [scaled * found[0], *found[1:]]


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of vectors."""
    return reduce(lambda a, b: torch.outer(a, b).reshape(-1), vectors)


def _by_columns(op: Product) -> Tensor | None:
    """tr(V Vᵀ A) = tr(Vᵀ A V), where V has few columns or A leaves V its structure."""
    found = narrowest_low_rank(op)
    for at, factor in [found] if found else enumerate(op.factors):
        if not isinstance(factor, LowRank) or factor.requires_grad:
            continue
        V = factor.factor
        inner = reduce(verbs.matmul, (V.T, *_after(op, at), V))
        of, _ = as_multiple(inner)
        if found or (type(of) is not Product and not isinstance(of, (Damped, Sum))):
            return factor.scale * verbs.trace(inner)
    return None


def _trace_by_terms(op: Product) -> Tensor:
    """The sum of the traces of all terms of a product of sums.

    Where these cancel to less than half of the digits, or are many, by the diagonal.
    """
    terms = [*islice(_terms(op), _MOST_TERMS + 1)]
    if len(terms) > _MOST_TERMS:
        return trace_of_operator(op)
    traces = torch.stack([weight * verbs.trace(term) for weight, term in terms])
    total, size = traces.sum(), traces.detach().abs().sum()
    if total.detach().abs() >= torch.finfo(traces.dtype).eps ** 0.5 * size:
        return total
    return trace_of_operator(op)


def _terms(op: Op) -> Iterator[tuple[Scalar, Op]]:
    """A B and δ times B, A₁ B and A₂ B, whose traces add up; terms of B are others."""
    if isinstance(op, Sum):
        for term in op.terms:
            yield from _terms(term)
        return
    if not isinstance(op, Product) or any(f.shape != op.shape for f in op.factors):
        yield 1.0, op
        return
    for at, factor in enumerate(op.factors):
        if not isinstance(factor, (Damped, Sum)):
            continue
        rest = reduce(verbs.matmul, _after(op, at))
        if isinstance(factor, Damped):
            yield from _terms(verbs.matmul(factor.operator, rest))
            for weight, term in _terms(rest):
                yield factor.damping * weight, term
        else:
            for term in factor.terms:
                yield from _terms(verbs.matmul(term, rest))
        return
    yield 1.0, op


def _after(op: Product, at: int) -> tuple[Op, ...]:
    """The factors that come after one of them, those before it last."""
    return (*op.factors[at + 1 :], *op.factors[:at])


def _trace_by_forms(op: Product) -> Tensor:
    """By that of the factors a I + V M Vᵀ which has the fewest columns.

    Where the two terms cancel to less than half of the digits, by the diagonal.
    """
    if (found := narrowest_form(op)) is None:
        return trace_of_operator(op)
    at, form = found
    V, rest = form.factor, reduce(verbs.matmul, _after(op, at))
    assert V is not None
    shifted = form.shift * verbs.trace(rest)
    if form.weights is not None:
        weights = Diagonal(form.weights)
        shifted = form.shift * (form.weights * verbs.diagonal(rest)).sum()
        rest = reduce(verbs.matmul, (weights, rest, weights))
    inner = verbs.to_dense(reduce(verbs.matmul, (V.T, rest, V)))
    result = shifted + form.multiply(inner).diagonal().sum()
    if result.abs() > torch.finfo(result.dtype).eps ** 0.5 * shifted.abs():
        return result
    return trace_of_operator(op)
