"""Inverses: the rules of ``inv``.

``inv(op)`` dispatches on the node; ``inv`` of a damped node on what is damped.
"""

from __future__ import annotations

import torch

from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    Kronecker,
)
from vivit_linop.operators.lowrank import Damped, DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.structure import (
    Adjoint,
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
)
from vivit_linop.operators.verbs import (
    adjoint,
    damped_inv,
    diagonal,
    inv,
    scale,
    to_dense,
)

Op = TorchLinearOperator


@inv.register
def _(op: Identity) -> Op:
    return op


@inv.register
def _(op: Dense) -> Op:
    return DenseInverse(op)


@inv.register
def _(op: Gram) -> Op:
    return DenseInverse(Dense(op.matrix))


@inv.register
def _(op: DenseInverse) -> Op:
    return op.operator


@inv.register
def _(op: Diagonal) -> Op:
    if (op.entries == 0).any():
        zero = int((op.entries == 0).nonzero()[0])
        raise ValueError(
            f"inv: the diagonal operator is singular, entry {zero} is 0. Add damping: "
            "(A + delta * Identity(n)).inv()."
        )
    return Diagonal(1.0 / op.entries)


@inv.register
def _(op: Adjoint) -> Op:
    return adjoint(inv(op.parent))


@inv.register
def _(op: Scaled) -> Op:
    if op.factor == 0.0:
        raise ValueError("inv: the operator is scaled by 0 and has no inverse.")
    return scale(inv(op.operator), 1.0 / op.factor)


@inv.register
def _(op: Product) -> Op:
    """(A B)⁻¹ = B⁻¹ A⁻¹ for square factors."""
    if any(factor.shape[0] != factor.shape[1] for factor in op.factors):
        raise TypeError(
            "inv: a product of rectangular operators has no closed-form inverse. "
            "Solve with scipy.sparse.linalg.cg(op, b)."
        )
    return Product(*(inv(factor) for factor in reversed(op.factors)))


@inv.register
def _(op: BlockDiagonal) -> Op:
    return op.like([block.inv() for block in op.blocks])


@inv.register
def _(op: Kronecker) -> Op:
    """(A ⊗ B)⁻¹ = A⁻¹ ⊗ B⁻¹."""
    return Kronecker(*(factor.inv() for factor in op.factors))


@inv.register
def _(op: CorrectedKronecker) -> Op:
    return damped_inv(op, 0.0)


@inv.register
def _(op: DampedRoot) -> Op:
    return DampedRoot(op.operator, op.damping, not op.inverse)


@inv.register
def _(op: LowRank) -> Op:
    raise ValueError(
        f"inv: a low-rank operator {tuple(op.shape)} with a factor of "
        f"{op.factor.shape[1]} columns is singular or close to it. Add damping: "
        "(G + delta * Identity(D)).inv()."
    )


@inv.register
def _(op: Damped) -> Op:
    return damped_inv(op.operator, op.damping)


@inv.register
def _(op: Woodbury) -> Op:
    return Damped(op.operator, op.damping)


# (A + δ I)⁻¹ by what A is -----------------------------------------------------------


@damped_inv.register
def _(op: Identity, damping: float) -> Op:
    return inv(scale(op, 1.0 + damping))


@damped_inv.register
def _(op: LowRank, damping: float) -> Op:
    return Woodbury(op, damping)


@damped_inv.register
def _(op: Gram, damping: float) -> Op:
    return damped_inv(Dense(op.matrix), damping)


@damped_inv.register
def _(op: Dense, damping: float) -> Op:
    unit = torch.eye(op.shape[0], dtype=op.torch_dtype, device=op.device)
    return DenseInverse(Dense(op.matrix + damping * unit))


@damped_inv.register
def _(op: Damped, damping: float) -> Op:
    return damped_inv(op.operator, op.damping + damping)


@damped_inv.register
def _(op: Diagonal, damping: float) -> Op:
    return inv(Diagonal(op.entries + damping))


@damped_inv.register
def _(op: Scaled, damping: float) -> Op:
    """(c A + δ I)⁻¹ = (A + δ/c I)⁻¹ / c."""
    if op.factor == 0.0:
        return scale(Identity(op.shape[0], op._own_dtype, op._own_device), 1 / damping)
    return scale(damped_inv(op.operator, damping / op.factor), 1.0 / op.factor)


@damped_inv.register
def _(op: BlockDiagonal, damping: float) -> Op:
    if not op.has_square_blocks:
        return damped_inv(Dense(to_dense(op)), damping)
    return op.like([damped_inv(block, damping) for block in op.blocks])


@damped_inv.register
def _(op: Kronecker, damping: float) -> Op:
    """Q (Λ + δ I)⁻¹ Qᵀ, with Q and Λ the Kronecker products of the factors'."""
    op._check_self_adjoint("inv of a damped Kronecker operator")
    evecs = op.eigenvectors
    middle = inv(Diagonal(op.eigenvalues + damping))
    return Product(evecs, middle, Adjoint(evecs))  # recognised as self-adjoint


@damped_inv.register
def _(op: CorrectedKronecker, damping: float) -> Op:
    inverse = inv(Diagonal(op.eigenvalues + damping))
    return CorrectedKronecker(op.basis, diagonal(inverse))
