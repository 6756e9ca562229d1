"""Square roots: the rules of ``sqrt``, for sampling and for factors.

A square root of A is an R with A = R Rᵀ, unique up to an orthogonal mixing of its
columns: ``R @ noise`` with standard normal noise is a sample of N(0, A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    Kronecker,
)
from vivit_linop.operators.lowrank import (
    Damped,
    DampedRoot,
    Gram,
    LowRank,
    Woodbury,
)
from vivit_linop.operators.structure import (
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
)
from vivit_linop.operators.verbs import adjoint, damped_sqrt, scale, sqrt, to_dense

Op = TorchLinearOperator

# Relative to the largest eigenvalue: what rounding may do to a zero.
_TOLERANCE = 1e3


@sqrt.register
def _(op: Identity) -> Op:
    return op


@sqrt.register
def _(op: Diagonal) -> Op:
    return Diagonal(_roots(op.entries))


@sqrt.register
def _(op: Dense) -> Op:
    """Q √Λ."""
    op._check_self_adjoint("sqrt")
    evals, evecs = torch.linalg.eigh(op.matrix)
    return Dense(evecs * _roots(evals))


@sqrt.register
def _(op: DenseInverse) -> Op:
    return sqrt(Dense(to_dense(op)))


@sqrt.register
def _(op: Gram) -> Op:
    """VᵀV = Vᵀ (Vᵀ)ᵀ."""
    op._check_self_adjoint("sqrt")
    return adjoint(op.left)


@sqrt.register
def _(op: LowRank) -> Op:
    """√c V."""
    return scale(op.factor, op.scale**0.5)


@sqrt.register
def _(op: Scaled) -> Op:
    if op.factor < 0.0:
        raise ValueError(f"sqrt: the operator is scaled by {op.factor}, below 0.")
    return scale(sqrt(op.operator), op.factor**0.5)


@sqrt.register
def _(op: Product) -> Op:
    """√(A B Aᵀ) = A √B, as in eigendecompositions Q Λ Qᵀ."""
    op._check_self_adjoint("sqrt")
    half = len(op.factors) // 2
    if len(op.factors) % 2 == 0:
        return Product(*op.factors[:half])
    return Product(*op.factors[:half], sqrt(op.factors[half]))


@sqrt.register
def _(op: BlockDiagonal) -> Op:
    """Block by block; roots need not be square, then they follow each other."""
    roots = [block.sqrt() for block in op.blocks]
    square = all(root.shape[0] == root.shape[1] for root in roots)
    if op.indices is not None and not square:
        raise TypeError(
            "sqrt: blocks at scattered places have low-rank roots. Take the roots of "
            "op.blocks one by one."
        )
    return op.like(roots)


@sqrt.register
def _(op: Kronecker) -> Op:
    """√(A ⊗ B) = √A ⊗ √B, from the factors' eigendecompositions."""
    op._check_self_adjoint("sqrt")
    return Kronecker(
        *(Dense(evecs * _roots(evals)) for evals, evecs in op.factor_eigenpairs)
    )


@sqrt.register
def _(op: CorrectedKronecker) -> Op:
    return damped_sqrt(op, 0.0)


@sqrt.register
def _(op: Damped) -> Op:
    return damped_sqrt(op.operator, op.damping)


@sqrt.register
def _(op: Woodbury) -> Op:
    """The inverse of the root of what it inverts."""
    return damped_sqrt(op.operator, op.damping).inv()


# √(A + δ I) by what A is ------------------------------------------------------------


@damped_sqrt.register
def _(op: Dense, damping: float) -> Op:
    op._check_self_adjoint("sqrt")
    evals, evecs = torch.linalg.eigh(op.matrix)
    return Dense(evecs * _roots(evals + damping))


@damped_sqrt.register
def _(op: Gram, damping: float) -> Op:
    return damped_sqrt(Dense(op.matrix), damping)


@damped_sqrt.register
def _(op: LowRank, damping: float) -> Op:
    """Symmetric; through the eigenpairs of the smaller side."""
    if op.by_gram:
        return DampedRoot(op, damping)
    evals, evecs = torch.linalg.eigh(op.small_side)
    return Dense((evecs * _roots(evals + damping)) @ evecs.T)


@damped_sqrt.register
def _(op: Diagonal, damping: float) -> Op:
    return Diagonal(_roots(op.entries + damping))


@damped_sqrt.register
def _(op: BlockDiagonal, damping: float) -> Op:
    return sqrt(op.like([Damped(block, damping) for block in op.blocks]))


@damped_sqrt.register
def _(op: Kronecker | CorrectedKronecker, damping: float) -> Op:
    """Q (Λ + δ I)^½, with the Kronecker products of the factors' eigenpairs."""
    op._check_self_adjoint("sqrt")
    return Product(op.eigenvectors, Diagonal(_roots(op.eigenvalues + damping)))


def _roots(values: Tensor) -> Tensor:
    """Roots of eigenvalues, of which rounding may have made zeros negative."""
    limit = -_TOLERANCE * torch.finfo(values.dtype).eps * values.abs().max()
    if values.min() < limit:
        raise ValueError(
            f"sqrt: the operator is not positive semi-definite, it has the eigenvalue "
            f"{values.min():.3g}."
        )
    return values.clamp(min=0.0).sqrt()
