"""Rewrite rules for Jacobians and what is pulled back through them.

Two Jacobians are the same if they are those of one risk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.curvature.fisher import PerSampleGradients
from vivit_linop.curvature.ggn import GGN, GGNFactor
from vivit_linop.curvature.jacobian import Jacobian, Pullback
from vivit_linop.curvature.output_space import (
    FactoredOutputOperator,
    LossGradient,
    LossHessian,
    LossHessianSqrt,
    Outer,
    OutputOperator,
)
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.elementary import Adjoint
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.operators.verbs import (
    adjoint,
    diagonal,
    matmul,
    row_norms_squared,
    to_dense,
)

Op = TorchLinearOperator


@adjoint.register
def _(op: Jacobian) -> Op:
    return op.pullback


@adjoint.register
def _(op: Pullback) -> Op:
    return op.jacobian if op.blocks is None else Adjoint(op)


@matmul.rule(LossHessianSqrt, Adjoint)
def _(S: LossHessianSqrt, B: Adjoint) -> Op:
    """S Sᵀ = H."""
    return S.outer() if B.parent is S else NotImplemented


@matmul.rule(Pullback, OutputOperator)
def _(A: Pullback, B: OutputOperator) -> Op:
    """Jᵀ S = V, Jᵀ ∇ℓ = U, Jᵀ B is a pullback."""
    if A.blocks is not None or A.risk is not B.risk:
        return NotImplemented
    if isinstance(B, LossHessianSqrt):
        return GGNFactor.through(A.jacobian, B)
    if isinstance(B, LossGradient):
        return PerSampleGradients.through(A.jacobian, B)
    return Pullback(A.jacobian, B)


@matmul.rule(OutputOperator, Jacobian)
def _(B: OutputOperator, J: Jacobian) -> Op:
    """B J = (Jᵀ Bᵀ)ᵀ for a symmetric B."""
    return Pullback(J, B).T if B.self_adjoint and B.risk is J.risk else NotImplemented


@matmul.rule(Adjoint, Jacobian)
def _(B: Adjoint, J: Jacobian) -> Op:
    """Bᵀ J = (Jᵀ B)ᵀ."""
    if not isinstance(B.parent, OutputOperator):
        return NotImplemented
    return adjoint(matmul(J.pullback, B.parent))


@matmul.rule(Pullback, Jacobian)
def _(A: Pullback, J: Jacobian) -> Op:
    """(Jᵀ H) J = G, Jᵀ J is low-rank."""
    return _outer(A, J.pullback)


@matmul.rule(Pullback, Adjoint)
def _(A: Pullback, B: Adjoint) -> Op:
    """V Vᵀ = G, Jᵀ (H J) = G."""
    return _outer(A, B.parent) if isinstance(B.parent, Pullback) else NotImplemented


@matmul.rule(Jacobian, Pullback)
def _(J: Jacobian, B: Pullback) -> Op:
    """J Jᵀ and J V are Gram operators."""
    return _gram(J.pullback, B)


@matmul.rule(Adjoint, Pullback)
def _(A: Adjoint, B: Pullback) -> Op:
    """VᵀV and UᵀV are Gram operators, also for the data of different risks."""
    return _gram(A.parent, B) if isinstance(A.parent, Pullback) else NotImplemented


@to_dense.register
def _(op: Jacobian) -> Tensor:
    return to_dense(op.pullback).T


@to_dense.register
def _(op: OutputOperator) -> Tensor:
    """The blocks of all samples on the diagonal."""
    return op.dense()


@diagonal.register
def _(op: LossHessian) -> Tensor:
    """In closed form for the losses that have one; no block is formed."""
    return op.diagonal_entries()


@diagonal.register
def _(op: Outer) -> Tensor:
    """The squared norms of the rows."""
    return row_norms_squared(op.root)


@row_norms_squared.register
def _(op: FactoredOutputOperator) -> Tensor:
    batches = range(len(op.risk.batch_sizes))
    return torch.cat([op.blocks(b).square().sum(2).reshape(-1) for b in batches])


def _outer(A: Pullback, B: Pullback) -> Op:
    """(Jᵀ A)(Jᵀ B)ᵀ = Jᵀ (A Bᵀ) J."""
    if A.risk is not B.risk:
        return NotImplemented
    if A.blocks is B.blocks:
        return GGN.of(A) if isinstance(A, GGNFactor) else LowRank(A)
    hessian = B.blocks if A.blocks is None else A.blocks
    if isinstance(hessian, LossHessian) and None in (A.blocks, B.blocks):
        root = LossHessianSqrt(hessian)
        return GGN.of(GGNFactor.through(A.jacobian, root))
    return NotImplemented


def _gram(A: Pullback, B: Pullback) -> Op:
    if A is B or (A.risk is B.risk and A.blocks is B.blocks):
        return B.gram
    return Gram(A, B)
