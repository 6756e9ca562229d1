"""The rules of a GGN whose loss is not convex: JᵀHJ with an indefinite H, without V.

What is linear in H is a difference, G = Jᵀ H₊ J − Jᵀ H₋ J, and both parts have factors,
in the structure of the layers. All eigenvalues come from the dense G; a few pairs by
:mod:`vivit_linop.curvature.routes`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vivit_linop.arguments import Scalar
from vivit_linop.curvature.ggn import GGN
from vivit_linop.curvature.routes import IndefiniteDecomposition
from vivit_linop.linalg.decompositions import LowRankDecomposition
from vivit_linop.linalg.eigen import eigenvalues_of_low_rank
from vivit_linop.linalg.inverse import damped_inverse_of_low_rank, inverse_of_low_rank
from vivit_linop.linalg.logdets import (
    damped_logdet_of_low_rank,
    damped_logdet_of_operator,
    damped_logdets_of_low_rank,
    damped_logdets_of_operator,
    logdet_of_low_rank,
    logdet_of_operator,
)
from vivit_linop.linalg.reductions import diagonal_of_low_rank, matrix_of_low_rank
from vivit_linop.linalg.roots import damped_root_of_low_rank, root_of_low_rank
from vivit_linop.linalg.traces import trace_of_low_rank
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.eigenpairs import Eigendecomposition
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.symmetric import symmetric_eigenvalues
from vivit_linop.operators.verbs import (
    damped_inv,
    damped_logdet,
    damped_logdets,
    damped_sqrt,
    diagonal,
    eigendecomposition,
    eigvalsh,
    inv,
    logdet,
    sqrt,
    to_dense,
    trace,
)

# What is linear in H ----------------------------------------------------------------


def _by_parts(op: GGN, rule: Callable[[LowRank], Tensor]) -> Tensor:
    """Apply a rule for c V Vᵀ, to both parts where H is indefinite."""
    if op.semidefinite:
        return rule(op)
    positive, negative = map(rule, op.parts)
    return op.scale * (positive - negative)


@to_dense.register
def matrix_of_ggn(op: GGN) -> Tensor:
    return _by_parts(op, matrix_of_low_rank)


@diagonal.register
def diagonal_of_ggn(op: GGN) -> Tensor:
    return _by_parts(op, diagonal_of_low_rank)


@trace.register
def trace_of_ggn(op: GGN) -> Tensor:
    return _by_parts(op, trace_of_low_rank)


# Eigenvalues ------------------------------------------------------------------------


@eigvalsh.register
def eigenvalues_of_ggn(op: GGN) -> Tensor:
    """All D of an indefinite one."""
    if op.semidefinite:
        return eigenvalues_of_low_rank(op)
    return symmetric_eigenvalues(to_dense(op))


@eigendecomposition.register
def decomposition_of_ggn(op: GGN) -> Eigendecomposition:
    if op.semidefinite:
        return LowRankDecomposition(op)
    return IndefiniteDecomposition(op)


@logdet.register
def logdet_of_ggn(op: GGN) -> Tensor:
    rule = logdet_of_low_rank if op.semidefinite else logdet_of_operator
    return rule(op)


@damped_logdet.register
def damped_logdet_of_ggn(op: GGN, damping: Scalar) -> Tensor:
    if op.semidefinite:
        return damped_logdet_of_low_rank(op, damping)
    return damped_logdet_of_operator(op, damping)


@damped_logdets.register
def damped_logdets_of_ggn(op: GGN, dampings: Tensor) -> Tensor:
    rule = damped_logdets_of_low_rank if op.semidefinite else damped_logdets_of_operator
    return rule(op, dampings)


# What needs V -----------------------------------------------------------------------


def _factored(op: GGN) -> GGN:
    """Return the operator, or say why it has no V."""
    if not op.semidefinite:
        op.factor.root.check()
    return op


@inv.register
def inverse_of_ggn(op: GGN) -> TorchLinearOperator:
    return inverse_of_low_rank(_factored(op))


@damped_inv.register
def damped_inverse_of_ggn(op: GGN, damping: Scalar) -> TorchLinearOperator:
    return damped_inverse_of_low_rank(_factored(op), damping)


@sqrt.register
def root_of_ggn(op: GGN) -> TorchLinearOperator:
    return root_of_low_rank(_factored(op))


@damped_sqrt.register
def damped_root_of_ggn(op: GGN, damping: Scalar) -> TorchLinearOperator:
    return damped_root_of_low_rank(_factored(op), damping)
