"""Rules for ``outline``: what products with the operators of a risk cost.

A gradient is a forward pass and a backward pass of twice its arithmetic.
"""

from __future__ import annotations

from fractions import Fraction

from vivit_linop.curvature.blocks import FactorRows
from vivit_linop.curvature.hessian import HessianBlock
from vivit_linop.curvature.hessian_products import HessianProducts
from vivit_linop.curvature.jacobian import Jacobian, Pullback
from vivit_linop.curvature.loss_hessian import LossHessianSqrt
from vivit_linop.curvature.output_space import OutputOperator
from vivit_linop.operators.outline import Cost, Outline, outline, total

# J x and Jᵀ u: a tangent or a transposed pass along a linearisation that is kept.
_PASS = Cost(Fraction(2, 3))
# A backward pass through a gradient's graph: each of its three products of matrices
# becomes two.
_SECOND_DERIVATIVES = Cost(Fraction(2))


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
def outline_of_factor_rows(op: FactorRows) -> Outline:
    return Outline("rows of JᵀB", (), total([op.partition.factor]))


@outline.register
def outline_of_hessian(op: HessianProducts) -> Outline:
    return Outline("", (), _SECOND_DERIVATIVES)


@outline.register
def outline_of_hessian_block(op: HessianBlock) -> Outline:
    return Outline("", (), _SECOND_DERIVATIVES)
