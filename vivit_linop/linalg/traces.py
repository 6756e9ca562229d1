"""Traces: of what has few rows on one side, by that side.

A trace does not see where a product begins, tr(A B) = tr(B A). So with A = a I + V M Vᵀ

    tr(A B) = a tr(B) + tr(M Vᵀ B V),

and all that is left to do with D rows is tr(B) and the products of B with V.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from vivit_linop.linalg.reductions import narrowest_low_rank
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.damped import Damped, DampedInverse
from vivit_linop.operators.elementary import Diagonal, Product, Scaled, Sum
from vivit_linop.operators.kronecker import CorrectedKronecker
from vivit_linop.operators.lowrank import DampedRoot, LowRank, Woodbury
from vivit_linop.operators.sandwich import LowRankForm, low_rank_form
from vivit_linop.operators.verbs import (
    adjoint,
    diagonal,
    eigvalsh,
    matmul,
    row_norms_squared,
    to_dense,
    trace,
)


@trace.register
def trace_of_operator(op: TorchLinearOperator) -> Tensor:
    return diagonal(op).sum()


@trace.register
def trace_of_low_rank(op: LowRank) -> Tensor:
    """The trace of the smaller side: tr(V Vᵀ) = tr(VᵀV)."""
    return op.scale * row_norms_squared(op.factor).sum()


@trace.register
def trace_of_corrected_kronecker(op: CorrectedKronecker) -> Tensor:
    return op.eigenvalues.sum()


@trace.register
def trace_of_damped(op: Damped) -> Tensor:
    return trace(op.operator) + op.shape[0] * op.damping


@trace.register
def trace_of_damped_inverse(op: DampedInverse) -> Tensor:
    """The sum of 1/(λ + δ)."""
    return eigvalsh(op).sum()


@trace.register
def trace_of_woodbury(op: Woodbury) -> Tensor:
    """The sum of 1/(λ + δ), the zeros of V Vᵀ included.

    Where the eigenvalues are not known, the squares of L⁻ᵀ with δ I + c K = L Lᵀ.
    """
    low_rank = op.operator
    if low_rank.has_eigenvalues:
        evals = low_rank.nonnegative_eigenvalues
        known, total = len(evals), (1.0 / (low_rank.scale * evals + op.damping)).sum()
    else:
        known = low_rank.small_rows
        parts = [columns.square_().sum() for columns in op.root_columns()]
        total = torch.stack(parts).sum()
    return total + (op.shape[0] - known) / op.damping


@trace.register
def trace_of_damped_root(op: DampedRoot) -> Tensor:
    """The sum of the roots, or of 1 over these."""
    return eigvalsh(op).sum()


# Sums and products ----------------------------------------------------------------


@trace.register
def trace_of_scaled(op: Scaled) -> Tensor:
    return op.factor * trace(op.operator)


@trace.register
def trace_of_sum(op: Sum) -> Tensor:
    return torch.stack([trace(term) for term in op.terms]).sum()


@trace.register
def trace_of_product(op: Product) -> Tensor:
    """On the small side of a factor; the effective dimension tr(G (G + δ I)⁻¹) too."""
    factors = op.factors
    if len(factors) == 1 or any(f.shape != op.shape for f in factors):
        return trace_of_operator(op)
    if (found := narrowest_low_rank(op)) is not None:
        at, low_rank = found
        V, between = low_rank.factor, _after(op, at)
        return low_rank.scale * trace(reduce(matmul, (adjoint(V), *between, V)))
    for at, factor in enumerate(factors):
        if isinstance(factor, (Damped, Sum)):
            return _trace_by_terms(factor, reduce(matmul, _after(op, at)))
        if isinstance(factor, Diagonal):
            rest = diagonal(reduce(matmul, _after(op, at)))
            return (factor.entries * rest).sum()
    return _trace_by_forms(op)


def _trace_by_terms(op: Damped | Sum, rest: TorchLinearOperator) -> Tensor:
    """tr(A B + δ B), or tr(A₁ B) + tr(A₂ B)."""
    if isinstance(op, Damped):
        return trace(matmul(op.operator, rest)) + op.damping * trace(rest)
    return torch.stack([trace(matmul(term, rest)) for term in op.terms]).sum()


def _after(op: Product, at: int) -> tuple[TorchLinearOperator, ...]:
    """The factors that come after one of them, those before it last."""
    return (*op.factors[at + 1 :], *op.factors[:at])


def _trace_by_forms(op: Product) -> Tensor:
    """By that of the factors a I + V M Vᵀ which has the fewest columns.

    Where the two terms cancel to less than half of the digits, by the diagonal.
    """
    forms = [(at, low_rank_form(factor)) for at, factor in enumerate(op.factors)]
    narrow = [(at, form) for at, form in forms if form is not None and _serves(form)]
    if not narrow:
        return trace_of_operator(op)
    at, form = min(narrow, key=lambda pair: _columns(pair[1]))
    V, between = form.factor, _after(op, at)
    assert V is not None
    inner = to_dense(reduce(matmul, (adjoint(V), *between, V)))
    shifted = form.shift * trace(reduce(matmul, between))
    result = shifted + form.multiply(inner).diagonal().sum()
    if result.abs() > torch.finfo(result.dtype).eps ** 0.5 * shifted.abs():
        return result
    return trace_of_operator(op)


def _columns(form: LowRankForm) -> int:
    return 0 if form.factor is None else form.factor.shape[1]


def _serves(form: LowRankForm) -> bool:
    V = form.factor
    return (
        V is not None
        and form.weights is None
        and V.shape[1] < V.shape[0]
        and not V.requires_grad
    )
