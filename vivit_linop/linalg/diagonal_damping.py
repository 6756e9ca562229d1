"""Inverses, roots and determinants of c V Vᵀ + P with a diagonal P."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vivit_linop.modes import ordinary_mode
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import (
    DiagonallyDamped,
    DiagonalWoodbury,
)
from vivit_linop.operators.dispatch import no_eigenpairs
from vivit_linop.operators.eigenpairs import Eigendecomposition
from vivit_linop.operators.elementary import Diagonal, Product, dense_over
from vivit_linop.operators.lowrank import Woodbury


@verbs.inv.register
def inverse_of_diagonally_damped(op: DiagonallyDamped) -> Op:
    """Through the smaller side, as Woodbury's identity."""
    if not op.low_rank.by_gram:
        return verbs.inv(_on_the_smaller_side(op))
    _check_positive(op.damping.entries, "inv")
    return DiagonalWoodbury(op, Woodbury(op.whitened, 1.0))


@verbs.inv.register
def inverse_of_diagonal_woodbury(op: DiagonalWoodbury) -> Op:
    return op.operator


@verbs.logdet.register
def logdet_of_diagonally_damped(op: DiagonallyDamped) -> Tensor:
    """Log det P + log det(I + c WᵀW)."""
    if not op.low_rank.by_gram:
        return verbs.logdet(_on_the_smaller_side(op))
    entries = op.damping.entries
    _check_positive(entries, "logdet")
    if entries.requires_grad:
        at_value = DiagonallyDamped(op.low_rank, Diagonal(entries.detach()))
        return LogDet.apply(entries, at_value)
    return entries.log().sum() + verbs.damped_logdet(op.whitened, 1.0)


@verbs.logdet.register
def logdet_of_diagonal_woodbury(op: DiagonalWoodbury) -> Tensor:
    return -verbs.logdet(op.operator)


@verbs.sqrt.register
def root_of_diagonally_damped(op: DiagonallyDamped) -> Op:
    """P^½ (c W Wᵀ + I)^½."""
    if not op.low_rank.by_gram:
        return verbs.sqrt(_on_the_smaller_side(op))
    _check_constant(op, "sqrt")
    _check_positive(op.damping.entries, "sqrt")
    roots = Diagonal(op.damping.entries.sqrt())
    return Product(roots, verbs.damped_sqrt(op.whitened, 1.0))


@verbs.sqrt.register
def root_of_diagonal_woodbury(op: DiagonalWoodbury) -> Op:
    """P^−½ (c W Wᵀ + I)^−½."""
    _check_constant(op, "sqrt")
    return Product(Diagonal(op.weights), verbs.sqrt(op.woodbury))


@verbs.eigendecomposition.register
def decomposition_of_diagonally_damped(op: DiagonallyDamped) -> Eigendecomposition:
    """Of the D × D side, where that is the smaller one."""
    if op.low_rank.by_gram:
        raise no_eigenpairs(op)
    return verbs.eigendecomposition(_on_the_smaller_side(op))


@verbs.diagonal.register
def diagonal_of_diagonal_woodbury(op: DiagonalWoodbury) -> Tensor:
    _check_constant(op, "diagonal")
    return op.weights.square() * verbs.diagonal(op.woodbury)


# Derivatives ------------------------------------------------------------------------


class LogDet(torch.autograd.Function):
    """log det(A + diag p), whose derivative in p is the diagonal of the inverse.

    Called as ``LogDet.apply(p, op)`` with the operator at the value of p.
    """

    @staticmethod
    def forward(ctx: Any, entries: Tensor, op: Op) -> Tensor:
        """The operator's own determinant."""
        ctx.op = op
        ctx.save_for_backward(entries)
        return verbs.logdet(op)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """With an inverse that is made here."""
        (entries,) = ctx.saved_tensors
        return gradients[0] * InverseDiagonal.apply(entries, ctx.op), None


class InverseDiagonal(torch.autograd.Function):
    """The diagonal of (A + diag p)⁻¹, without a derivative in p.

    Torch's ``once_differentiable`` would take it for a constant where what it is
    multiplied by requires no grad.
    """

    @staticmethod
    def forward(ctx: Any, entries: Tensor, op: Op) -> Tensor:
        """That of the operator at the value of p."""
        with ordinary_mode():
            return verbs.diagonal(verbs.inv(op))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        """Refuse."""
        raise TypeError(
            "logdet: second derivatives in the entries of the damping are not there. "
            "Take torch.logdet(op.to_dense()) if it is small."
        )


def _on_the_smaller_side(op: DiagonallyDamped) -> Op:
    """What all entries have counts as one number does, also where it is small."""
    entries = op.damping.entries
    least = entries.min().item()
    least = least if 0.0 < least < math.inf else 0.0
    matrix = op.low_rank.small_side + torch.diag(entries - least)
    return verbs.damp(dense_over(op.ranks, matrix), least)


def _check_constant(op: DiagonallyDamped | DiagonalWoodbury, verb: str) -> None:
    if op.requires_grad:
        raise TypeError(
            f"{verb}: derivatives in the entries of the damping are not there. Pass "
            "them .detach()ed, or take Dense(op.to_dense()) if it is small."
        )


def _check_positive(entries: Tensor, verb: str) -> None:
    if not (entries > 0.0).all():
        least = int(entries.argmin())
        raise ValueError(
            f"{verb}: a low-rank operator + Diagonal(p) needs entries p > 0, entry "
            f"{least} is {entries[least].item():.3g}. Restrict the operator to the "
            "entries that are damped, or damp all of them."
        )
