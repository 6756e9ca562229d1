"""Rules for the operators of a risk: how products are rewritten, what they cost.

Two Jacobians are the same if they are those of one risk. A gradient is a forward pass
and a backward pass of twice its arithmetic.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from vivit_linop.curvature.fisher import PerSampleGradients
from vivit_linop.curvature.ggn import GGN, GGNFactor
from vivit_linop.curvature.hessian import HessianBlock
from vivit_linop.curvature.hessian_products import HessianProducts
from vivit_linop.curvature.jacobian import Jacobian, Pullback
from vivit_linop.curvature.loss_hessian import (
    LossGradient,
    LossHessian,
    LossHessianSqrt,
)
from vivit_linop.curvature.output_space import (
    FactoredOutputOperator,
    Outer,
    OutputOperator,
)
from vivit_linop.devices import check_matrix_fits
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.elementary import Adjoint
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.operators.outline import Cost, Outline, outline, total

# J x and Jᵀ u: a tangent or a transposed pass along a linearisation that is kept.
_PASS = Cost(Fraction(2, 3))
# A backward pass through a gradient's graph: each of its three products of matrices
# becomes two.
_SECOND_DERIVATIVES = Cost(Fraction(2))


# Rewriting ---------------------------------------------------------------------------


@verbs.adjoint.register
def adjoint_of_jacobian(op: Jacobian) -> Op:
    """Jᵀ, the pullback that it keeps."""
    return op.pullback


@verbs.adjoint.register
def adjoint_of_pullback(op: Pullback) -> Op:
    """(Jᵀ)ᵀ = J."""
    return op.jacobian if op.is_plain else Adjoint(op)


@verbs.matmul.rule(LossHessianSqrt, Adjoint)
def product_of_root_and_adjoint(S: LossHessianSqrt, B: Adjoint) -> Op:
    """S Sᵀ = H."""
    return S.outer() if B.parent is S else NotImplemented


@verbs.matmul.rule(Pullback, OutputOperator)
def product_of_pullback_and_output_operator(A: Pullback, B: OutputOperator) -> Op:
    """Jᵀ S = V, Jᵀ ∇ℓ = U, Jᵀ B is a pullback."""
    if not A.is_plain or A.risk is not B.risk:
        return NotImplemented
    if isinstance(B, LossHessianSqrt):
        return GGNFactor.through(A.jacobian, B)
    if isinstance(B, LossGradient):
        return PerSampleGradients.through(A.jacobian, B)
    return Pullback(A.jacobian, B)


@verbs.matmul.rule(OutputOperator, Jacobian)
def product_of_output_operator_and_jacobian(B: OutputOperator, J: Jacobian) -> Op:
    """B J = (Jᵀ Bᵀ)ᵀ for a symmetric B."""
    return Pullback(J, B).T if B.self_adjoint and B.risk is J.risk else NotImplemented


@verbs.matmul.rule(Adjoint, Jacobian)
def product_of_adjoint_and_jacobian(B: Adjoint, J: Jacobian) -> Op:
    """Bᵀ J = (Jᵀ B)ᵀ."""
    if not isinstance(B.parent, OutputOperator):
        return NotImplemented
    return verbs.adjoint(verbs.matmul(J.pullback, B.parent))


@verbs.matmul.rule(Pullback, Jacobian)
def product_of_pullback_and_jacobian(A: Pullback, J: Jacobian) -> Op:
    """(Jᵀ H) J = G, Jᵀ J is low-rank."""
    return _outer(A, J.pullback)


@verbs.matmul.rule(Pullback, Adjoint)
def product_of_pullback_and_adjoint(A: Pullback, B: Adjoint) -> Op:
    """V Vᵀ = G, Jᵀ (H J) = G."""
    return _outer(A, B.parent) if isinstance(B.parent, Pullback) else NotImplemented


@verbs.matmul.rule(Jacobian, Pullback)
def product_of_jacobian_and_pullback(J: Jacobian, B: Pullback) -> Op:
    """J Jᵀ and J V are Gram operators."""
    return _gram(J.pullback, B)


@verbs.matmul.rule(Adjoint, Pullback)
def product_of_adjoint_and_pullback(A: Adjoint, B: Pullback) -> Op:
    """VᵀV and UᵀV are Gram operators, also for the data of different risks."""
    return _gram(A.parent, B) if isinstance(A.parent, Pullback) else NotImplemented


@verbs.to_dense.register
def dense_of_jacobian(op: Jacobian) -> Tensor:
    """The columns of Jᵀ."""
    return verbs.to_dense(op.pullback).T


@verbs.to_dense.register
def dense_of_output_operator(op: OutputOperator) -> Tensor:
    """The blocks of all samples on the diagonal."""
    name = type(op).__name__
    check_matrix_fits(name, op.shape, op.torch_dtype, op.device)
    return op.ranks.listed(op.own_dense_rows)


@verbs.diagonal.register
def diagonal_of_loss_hessian(op: LossHessian) -> Tensor:
    """In closed form for the losses that have one; no block is formed."""
    return op.ranks.listed(op.own_diagonal)


@verbs.diagonal.register
def diagonal_of_outer(op: Outer) -> Tensor:
    """The squared norms of the rows."""
    return verbs.row_norms_squared(op.root)


@verbs.sqrt.register
def root_of_loss_hessian(op: LossHessian) -> Op:
    """The exact root, with the checks of ``H.sqrt()``."""
    return op.sqrt()


@verbs.sqrt.register
def root_of_outer(op: Outer) -> Op:
    return op.root


@verbs.row_norms_squared.register
def row_norms_of_jacobian(op: Jacobian) -> Tensor:
    """Those of the columns of Jᵀ."""
    return verbs.column_norms_squared(op.pullback)


@verbs.column_norms_squared.register
def column_norms_of_jacobian(op: Jacobian) -> Tensor:
    """Those of the rows of Jᵀ."""
    return verbs.row_norms_squared(op.pullback)


@verbs.row_norms_squared.register
def row_norms_of_output_factor(op: FactoredOutputOperator) -> Tensor:
    """Of the blocks, position by position."""

    def own_norms() -> Tensor:
        batches = range(len(op.risk.batch_sizes))
        return torch.cat([op.blocks(b).square().sum(2).reshape(-1) for b in batches])

    return op.risk.ranks.listed(own_norms)


def _outer(A: Pullback, B: Pullback) -> Op:
    """(Jᵀ A)(Jᵀ B)ᵀ = Jᵀ (A Bᵀ) J."""
    if A.risk is not B.risk:
        return NotImplemented
    if verbs.same(A, B):
        return GGN.of(A) if isinstance(A, GGNFactor) else LowRank(A)
    hessian = B.output if A.is_plain else A.output
    if isinstance(hessian, LossHessian) and (A.is_plain or B.is_plain):
        root = LossHessianSqrt(hessian)
        return GGN.of(GGNFactor.through(A.jacobian, root))
    return NotImplemented


def _gram(A: Pullback, B: Pullback) -> Op:
    return B.gram if verbs.same(A, B) else Gram(A, B)


@verbs.same.register
def same_jacobian(left: Jacobian, right: Op) -> bool:
    """Those of one risk."""
    return isinstance(right, Jacobian) and left.risk is right.risk


@verbs.same.register
def same_pullback(left: Pullback, right: Op) -> bool:
    """Those of one risk and of the same operator in output space."""
    if not isinstance(right, Pullback) or left.risk is not right.risk:
        return False
    A, B = left.output, right.output
    return A is B or (type(A) is type(B) and A.determined and B.determined)


# What products cost ------------------------------------------------------------------


@outline.register
def outline_of_jacobian(op: Jacobian) -> Outline:
    return Outline("J", (), _PASS)


@outline.register
def outline_of_pullback(op: Pullback) -> Outline:
    if op.is_plain:
        return Outline("Jᵀ", (), _PASS)
    root = "S" if isinstance(op.output, LossHessianSqrt) else "B"
    parts = [("J", op.jacobian), (root, op.output)]
    return Outline(f"Jᵀ{root}", parts, total([op.jacobian, op.output]))


@outline.register
def outline_of_output_operator(op: OutputOperator) -> Outline:
    # That of dense blocks, which closed forms are below of.
    blocks = f"{op.risk.num_samples} blocks"
    return Outline(blocks, (), Cost(flops=2.0 * op.shape[0] * op.width))


@outline.register
def outline_of_hessian(op: HessianProducts | HessianBlock) -> Outline:
    return Outline("", (), _SECOND_DERIVATIVES)
