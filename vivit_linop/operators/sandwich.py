"""Sandwiches Aᵀ S B: what users compose with inverses and roots of curvature.

With S = f(c V Vᵀ + δ I) = a I + V M Vᵀ and A, B of as many rows as V,

    Aᵀ S B = a AᵀB + (VᵀA)ᵀ M (VᵀB),

so that three Gram matrices are all it takes: nothing has as many rows as A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, singledispatch
from typing import Any, cast

import torch
from torch import Tensor

from vivit_linop.arguments import Scalar, as_float
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import Damped, DampedInverse, DiagonalWoodbury
from vivit_linop.operators.elementary import Adjoint, Dense, Diagonal, Product, Scaled
from vivit_linop.operators.lowrank import Centered, DampedRoot, LowRank, Woodbury
from vivit_linop.operators.parts import HStack, Rows


class Sandwich(Product):
    """The product Aᵀ S B of two factors, with a function of a low-rank node inside.

    Its matrix and its diagonal come from Gram matrices of the factors with V, and the
    diagonal needs no other entry of AᵀB. The absolute error of an entry is a few eps
    ‖a‖ ‖b‖ / δ for S = (c V Vᵀ + δ I)⁻¹. Entries that lose more than half of the digits
    by that are computed from products with S instead.

    Args:
        left: Aᵀ, ``[p, D]``.
        middle: S, ``[D, D]``; :func:`low_rank_form` knows it.
        right: B, ``[D, q]``.

    Example:
        >>> import torch, vivit_linop as vl
        >>> V, A = vl.Dense(torch.rand(1000, 3)), vl.Dense(torch.rand(1000, 2))
        >>> S = (V @ V.T + 0.1 * vl.Identity(1000)).inv()
        >>> A.T @ S @ A
        <2x2 Sandwich, torch.float32, cpu>
    """

    @cached_property
    def factor(self) -> Op:
        """A, as a factor."""
        return cast(Op, verbs.as_factor(self.factors[0].T))

    @cached_property
    def other(self) -> Op:
        """B, as a factor; A itself if it is the same."""
        if self.self_adjoint:
            return self.factor
        return cast(Op, verbs.as_factor(self.factors[2]))

    @property
    def form(self) -> LowRankForm:
        """S, as what knows its small side."""
        return cast(LowRankForm, low_rank_form(self.factors[1]))


@dataclass(frozen=True)
class LowRankForm:
    """An operator a D + D V M Vᵀ D with a diagonal D, such as f(c V Vᵀ + δ I).

    Attributes:
        shift: a.
        factor: V, ``[D, R]``, with fewer columns than rows; None if there is none.
        multiply: M times columns, ``[R, K]``.
        on_range: N times columns, where S V = V N, or with D: S V = D V N.
        weights: The diagonal of D; None for ones.
        condition: λ_max/δ if the two terms cancel, else 1.
        norm: That of the Gram matrix of D^½ V, where they cancel.
    """

    shift: Scalar
    factor: Op | None = None
    multiply: Callable[[Tensor], Tensor] = torch.Tensor.clone
    on_range: Callable[[Tensor], Tensor] = torch.Tensor.clone
    weights: Tensor | None = None
    condition: float = 1.0
    norm: float = 0.0


@singledispatch
def low_rank_form(op: Any) -> LowRankForm | None:
    """Return an operator as a I + V M Vᵀ, or None where it has no such form.

    A rule for a node of one's own makes sandwiches with it.
    """
    return None


@low_rank_form.register
def form_of_woodbury(op: Woodbury) -> LowRankForm | None:
    """I/δ − V (c/δ) (δ I + c K)⁻¹ Vᵀ."""
    low_rank, delta = op.operator, op.damping
    if not low_rank.by_gram:
        return None
    quotient = -low_rank.scale / delta
    return LowRankForm(
        1.0 / delta,
        low_rank.factor,
        lambda Y: quotient * op.solve_small(Y),
        op.solve_small,
        condition=op.norm / delta,
        norm=op.norm / low_rank.scale,
    )


@low_rank_form.register
def form_of_damped_inverse(op: DampedInverse) -> LowRankForm | None:
    """By the eigenpairs Q, κ of K: functions of δ that derivatives pass through."""
    low_rank, delta = op.operator, op.damping
    form = low_rank_form(op.inverse)
    if form is None or not isinstance(low_rank, LowRank):
        return None

    @cache
    def eigenpairs() -> tuple[Tensor, Tensor]:
        evals, vectors = low_rank.small.eigenpairs
        return 1.0 / (delta + low_rank.scale * evals.clamp(min=0.0)), vectors

    def on_range(Y: Tensor) -> Tensor:
        inverse, vectors = eigenpairs()
        return vectors @ (inverse[:, None] * (vectors.T @ Y))

    return replace(
        form,
        shift=1.0 / delta,
        multiply=lambda Y: -low_rank.scale / delta * on_range(Y),
        on_range=on_range,
    )


@low_rank_form.register
def form_of_damped_root(op: DampedRoot) -> LowRankForm | None:
    """As DampedRoot has it."""
    low_rank, shift = op.operator, op.shift
    if not low_rank.by_gram:
        return None
    K = low_rank.gram.matrix
    norm = torch.linalg.matrix_norm(K).item()
    return LowRankForm(
        shift,
        low_rank.factor,
        op.multiply_small,
        lambda Y: op.multiply_small(K @ Y) + shift * Y,
        condition=low_rank.scale * norm / as_float(op.damping) if op.inverse else 1.0,
        norm=norm,
    )


@low_rank_form.register
def form_of_low_rank(op: LowRank | Damped) -> LowRankForm | None:
    """Itself, damped or not."""
    A, damping = (op.operator, op.damping) if isinstance(op, Damped) else (op, 0.0)
    if not isinstance(A, LowRank) or not (A.by_gram and A.semidefinite):
        return None
    low_rank, scale = A, A.scale

    def on_range(Y: Tensor) -> Tensor:
        return scale * (low_rank.gram.matrix @ Y) + damping * Y

    return LowRankForm(damping, low_rank.factor, lambda Y: scale * Y, on_range)


@low_rank_form.register
def form_of_diagonal(op: Diagonal) -> LowRankForm:
    """D itself."""
    return LowRankForm(1.0, weights=op.entries)


@low_rank_form.register
def form_of_diagonal_woodbury(op: DiagonalWoodbury) -> LowRankForm | None:
    """P⁻¹ − P⁻¹ V c (I + c VᵀP⁻¹V)⁻¹ VᵀP⁻¹; derivatives in P take products."""
    form = form_of_woodbury(op.woodbury)
    if form is None or op.requires_grad:
        return None
    V, weights = op.operator.low_rank.factor, op.weights.square()
    return replace(form, factor=V, weights=weights)


# What is a factor -------------------------------------------------------------------


@verbs.as_factor.register
def dense_as_factor(op: Dense) -> Op:
    """Itself."""
    return op


@verbs.as_factor.register
def adjoint_as_factor(op: Adjoint) -> Op | None:
    """Of a dense matrix, a dense one."""
    return Dense(op.parent.matrix.T) if isinstance(op.parent, Dense) else None


@verbs.as_factor.register
def composite_as_factor(op: Centered | Scaled | HStack | Rows) -> Op | None:
    """If all operators that it is made of are factors."""
    parts = [part for part in op._made_of() if isinstance(part, Op)]
    return op if all(verbs.as_factor(part) is part for part in parts) else None


# Rules ------------------------------------------------------------------------------


@verbs.matmul.rule(Product, Op)
def product_of_product_and_factor(A: Product, B: Op) -> Op:
    """(Aᵀ S) B."""
    return _sandwich(*A.factors, B) if len(A.factors) == 2 else NotImplemented


@verbs.matmul.rule(Op, Product)
def product_of_factor_and_product(A: Op, B: Product) -> Op:
    """Aᵀ (S B)."""
    return _sandwich(A, *B.factors) if len(B.factors) == 2 else NotImplemented


def _sandwich(left: Op, middle: Op, right: Op) -> Op:
    # Of what requires grad, only a damping has rules here.
    inner = middle
    if isinstance(middle, (DampedInverse, DampedRoot)):
        inner = middle.operator
    if any(part.requires_grad for part in (left, inner, right)):
        return NotImplemented
    if verbs.as_factor(right) is None or verbs.as_factor(left.T) is None:
        return NotImplemented
    form = low_rank_form(middle)
    # Of A D Aᵀ with a small diagonal D, that is the small side.
    if form is None or (form.factor is None and left.shape[0] > left.shape[1]):
        return NotImplemented
    return Sandwich(left, middle, right)


@verbs.adjoint.register
def adjoint_of_sandwich(op: Sandwich) -> Op:
    """Bᵀ S A, with S symmetric."""
    if op.self_adjoint:
        return op
    left, middle, right = op.factors
    return Sandwich(right.T, middle, left.T)
