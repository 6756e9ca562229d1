"""Damping by a diagonal: c V Vᵀ + P, its inverse, and V with weighted rows.

With W = P^{−½} V,

    (c V Vᵀ + P)⁻¹ = P^{−½} (c W Wᵀ + I)⁻¹ P^{−½},

so that Woodbury's identity is all it takes, on the Gram matrix WᵀW = Vᵀ P⁻¹ V, whose
weights stand in the layers' columns.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.damped import solved
from vivit_linop.operators.elementary import Diagonal, Sum
from vivit_linop.operators.lowrank import LowRank, Woodbury


class WeightedRows(TorchLinearOperator):
    """The factor diag(w) V.

    Args:
        weights: w, ``[D]``.
        factor: V, ``[D, R]``.
    """

    def __init__(self, weights: Tensor, factor: TorchLinearOperator) -> None:
        self.weights, self.factor = weights, factor
        super().__init__(factor.shape, factor._own_dtype, factor._own_device)

    def _made_of(self) -> tuple[Tensor, TorchLinearOperator]:
        return (self.weights, self.factor)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.weights[:, None] * self.factor.apply(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.factor.T.apply(self.weights[:, None] * X)


class DiagonallyDamped(Sum):
    """The operator c V Vᵀ + P with a diagonal P > 0: a prior by layer or by entry.

    Args:
        low_rank: c V Vᵀ, ``[D, D]``.
        diagonal: P.

    Example:
        >>> import torch, vivit_linop as vl
        >>> V = vl.Dense(torch.rand(1000, 3))
        >>> A = V @ V.T + vl.Diagonal(torch.linspace(1, 2, 1000))
        >>> A, A.inv()
        (<1000x1000 DiagonallyDamped, torch.float32, cpu>,
         <1000x1000 DiagonalWoodbury, torch.float32, cpu>)
    """

    def __init__(self, low_rank: LowRank, diagonal: Diagonal) -> None:
        super().__init__(low_rank, diagonal)
        self.low_rank, self.damping = low_rank, diagonal

    @cached_property
    def whitened(self) -> LowRank:
        """The node c W Wᵀ with W = P^{−½} V."""
        weights = self.damping.entries.detach().rsqrt()
        factor = WeightedRows(weights, self.low_rank.factor)
        return LowRank(factor, self.low_rank.scale)


class DiagonalWoodbury(TorchLinearOperator):
    """The inverse of c V Vᵀ + P, through the smaller side.

    For entries of P that require grad, x = (c V Vᵀ + P)⁻¹ b has the derivatives
    (c V Vᵀ + P)⁻¹ (db − x ∘ dp): gradients cost one more product with the inverse.

    Args:
        operator: c V Vᵀ + P.
        woodbury: (c W Wᵀ + I)⁻¹ with W = P^{−½} V.

    Raises:
        ValueError: If an entry of P is not positive.
    """

    self_adjoint = True

    def __init__(self, operator: DiagonallyDamped, woodbury: Woodbury) -> None:
        self.operator, self.woodbury = operator, woodbury
        super().__init__(operator.shape, operator._own_dtype, operator._own_device)

    @property
    def weights(self) -> Tensor:
        """The diagonal of P^{−½}."""
        factor: Any = self.woodbury.operator.factor
        weights: Tensor = factor.weights
        return weights

    def _made_of(self) -> tuple[TorchLinearOperator]:
        return (self.operator,)

    def _multiply(self, X: Tensor) -> Tensor:
        if self.requires_grad and torch.is_grad_enabled():
            return solved(X, self.operator.damping.entries, self.detached)
        return self._solve(X)

    @property
    def detached(self) -> DiagonalWoodbury:
        """The inverse at the values of P, which require no grad."""
        entries = Diagonal(self.operator.damping.entries.detach())
        operator = DiagonallyDamped(self.operator.low_rank, entries)
        return DiagonalWoodbury(operator, self.woodbury)

    def _solve(self, X: Tensor) -> Tensor:
        weights = self.weights[:, None]
        return weights * self.woodbury.apply(weights * X)
