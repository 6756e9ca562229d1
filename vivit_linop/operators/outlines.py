"""Rules for ``outline``: how the nodes of the algebra are written, and what they cost.

A product of an m × n matrix with a vector counts 2 m n operations.
"""

from __future__ import annotations

from collections.abc import Iterable

from vivit_linop.arguments import Scalar, as_float
from vivit_linop.operators.damped import (
    Damped,
    DampedInverse,
    DiagonalWoodbury,
)
from vivit_linop.operators.dispatch import Operator
from vivit_linop.operators.elementary import (
    Adjoint,
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
    Sum,
)
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    KhatriRao,
    Kronecker,
)
from vivit_linop.operators.lowrank import DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.outline import Cost, Outline, outline, total
from vivit_linop.operators.random_projection import RandomProjection


def _entries(op: Operator) -> float:
    return float(op.shape[0]) * op.shape[1]


def _numbered(parts: Iterable[Operator]) -> list[tuple[str, Operator]]:
    below = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    return [(f"A{i}".translate(below), part) for i, part in enumerate(parts, start=1)]


def _number(value: Scalar) -> str:
    return f"{as_float(value):.4g}"


def _joined(parts: list[tuple[str, Operator]], sign: str) -> str:
    names = [name for name, _ in parts]
    if len(names) > 4:
        names = [*names[:2], "…", names[-1]]
    return sign.join(names)


# Leaves -----------------------------------------------------------------------------


@outline.register
def outline_of_identity(op: Identity) -> Outline:
    return Outline("I", (), Cost())


@outline.register
def outline_of_dense(op: Dense | RandomProjection) -> Outline:
    return Outline("", (), Cost(flops=2 * _entries(op)))


@outline.register
def outline_of_diagonal(op: Diagonal) -> Outline:
    return Outline("", (), Cost(flops=op.shape[0]))


@outline.register
def outline_of_khatri_rao(op: KhatriRao) -> Outline:
    # The adjoint contracts with one of the two matrices after the other.
    return Outline("", (), Cost(flops=2 * (_entries(op) + op.right.numel())))


# Expressions ------------------------------------------------------------------------


@outline.register
def outline_of_adjoint(op: Adjoint) -> Outline:
    return Outline("Aᵀ", [("A", op.parent)], total([op.parent]))


@outline.register
def outline_of_scaled(op: Scaled) -> Outline:
    cost = total([op.operator], flops=op.shape[0])
    return Outline(f"{_number(op.factor)} A", [("A", op.operator)], cost)


@outline.register
def outline_of_sum(op: Sum) -> Outline:
    parts = _numbered(op.terms)
    cost = total(op.terms, flops=(len(op.terms) - 1) * op.shape[0])
    return Outline(_joined(parts, " + "), parts, cost)


@outline.register
def outline_of_product(op: Product) -> Outline:
    parts = _numbered(op.factors)
    return Outline(_joined(parts, " "), parts, total(op.factors))


@outline.register
def outline_of_damped(op: Damped) -> Outline:
    cost = total([op.operator], flops=2 * op.shape[0])
    return Outline(f"A + δ I, δ = {_number(op.damping)}", [("A", op.operator)], cost)


@outline.register
def outline_of_dense_inverse(op: DenseInverse) -> Outline:
    formula, cost = "A⁻¹", Cost(flops=2 * _entries(op))
    if op.damping:
        formula = f"(A + δ I)⁻¹, δ = {_number(op.damping)}"
    return Outline(formula, [("A", op.operator)], cost)


@outline.register
def outline_of_damped_inverse(op: DampedInverse) -> Outline:
    formula = f"(A + δ I)⁻¹, δ = {_number(op.damping)}"
    return Outline(formula, [("A", op.operator)], total([op.inverse]))


@outline.register
def outline_of_kronecker(op: Kronecker) -> Outline:
    parts, cost, size = _numbered(op.factors), Cost(), op.shape[1]
    for factor in reversed(op.factors):
        of_factor = outline(factor).cost
        if of_factor is None:
            return Outline(_joined(parts, " ⊗ "), parts, None)
        columns = size // factor.shape[1]
        cost, size = cost + columns * of_factor, columns * factor.shape[0]
    return Outline(_joined(parts, " ⊗ "), parts, cost)


@outline.register
def outline_of_corrected_kronecker(op: CorrectedKronecker) -> Outline:
    cost = total([op.basis], times=2, flops=op.shape[0])
    return Outline("Q diag(λ) Qᵀ", [("Q", op.basis)], cost)


@outline.register
def outline_of_block_diagonal(op: BlockDiagonal) -> Outline:
    parts = _numbered(op.blocks)
    return Outline(f"diag({_joined(parts, ', ')})", parts, total(op.blocks))


# Low rank ---------------------------------------------------------------------------


@outline.register
def outline_of_low_rank(op: LowRank) -> Outline:
    scale = "" if op.scale == 1.0 else f"{_number(op.scale)} "
    cost = total([op.factor], times=2)
    return Outline(f"{scale}V Vᵀ", [("V", op.factor)], cost)


@outline.register
def outline_of_gram(op: Gram) -> Outline:
    same = op.left is op.right
    cost = total([op.left, op.right])
    if op.known:
        cost = Cost(flops=2 * _entries(op))
    known = ", its matrix is known" if op.known else ""
    if same:
        return Outline(f"VᵀV{known}", [("V", op.right)], cost)
    return Outline(f"AᵀB{known}", [("A", op.left), ("B", op.right)], cost)


@outline.register
def outline_of_woodbury(op: Woodbury | DampedRoot) -> Outline:
    inner, small = op.operator, 2.0 * op.operator.small_rows**2
    power, times = "⁻¹", 2
    if isinstance(op, DampedRoot):
        power, small = "^(−½)" if op.inverse else "^½", 2.0 * small
    elif op.refines:
        times = 4
    cost = total([inner.factor], times, small) if inner.by_gram else Cost(flops=small)
    return Outline(f"(A + δ I){power}, δ = {_number(op.damping)}", [("A", inner)], cost)


@outline.register
def outline_of_diagonal_woodbury(op: DiagonalWoodbury) -> Outline:
    cost = total([op.woodbury], flops=2 * op.shape[0])
    parts = [("A", op.operator.low_rank), ("P", op.operator.damping)]
    return Outline("(A + P)⁻¹", parts, cost)
