"""Damped nodes: A + δ I with a number δ, c V Vᵀ + P with a diagonal P.

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

from vivit_linop.arguments import Scalar, as_scalar
from vivit_linop.modes import is_followed
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op, TorchLinearOperator
from vivit_linop.operators.elementary import Dense, Diagonal, OfOperator, Sum, mirrored
from vivit_linop.operators.lowrank import LowRank, Woodbury

# Damping by a number -----------------------------------------------------------------


class Damped(OfOperator):
    """The operator A + δ I.

    Args:
        operator: A, square.
        damping: δ.
    """

    def __init__(self, operator: Op, damping: Scalar) -> None:
        self.operator, self.damping = operator, as_scalar(damping)
        TorchLinearOperator.__init__(
            self, operator.shape, operator._own_dtype, operator._own_device
        )

    def _mirrors(self, other: Op) -> bool:
        if not isinstance(other, Damped):
            return False
        one, two = self.damping, other.damping
        tensors = isinstance(one, Tensor) or isinstance(two, Tensor)  # of derivatives
        if one is not two and (tensors or one != two):
            return False
        return mirrored(self.operator, other.operator)

    def _made_of(self) -> tuple[Scalar | Op, ...]:
        return (self.damping, self.operator)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.operator.apply(X) + self.damping * X

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.operator.T.apply(X) + self.damping * X


class DampedDense(Damped, Dense):  # type: ignore[misc]  # what it is made of: Damped's
    """A + δ I of a dense A: dense as well, and it remembers A and δ.

    Inverses, roots and determinants add δ in float64, where it counts however small it
    is; rules for damped nodes come before those for dense ones.

    Args:
        operator: A, square.
        damping: δ.

    Attributes:
        matrix: A + δ I, in the dtype of A; formed when first asked for.
    """

    @cached_property
    def matrix(self) -> Tensor:  # type: ignore[override]
        """A + δ I."""
        return verbs.to_dense(self)


class DampedInverse(OfOperator):
    """The inverse of A + δ I for a δ that requires grad.

    With x = (A + δ I)⁻¹ b, derivatives are (A + δ I)⁻¹ (db − x dδ), so that gradients
    cost one more product with the same inverse.

    Args:
        operator: A, square.
        damping: δ.
        inverse: (A + δ I)⁻¹ at the value of δ.
    """

    def __init__(self, operator: Op, damping: Tensor, inverse: Op) -> None:
        self.operator, self.damping, self.inverse = operator, damping, inverse
        super().__init__(inverse.shape, inverse._own_dtype, inverse._own_device)

    def _made_of(self) -> tuple[Tensor, Op]:
        return (self.damping, self.operator)

    def _multiply(self, X: Tensor) -> Tensor:
        return _Solve.apply(X, self.damping, self.inverse)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return _Solve.apply(X, self.damping, self.inverse.T)


class _Solve(torch.autograd.Function):
    """x = (A + δ I)⁻¹ b, or with diag(p) in place of δ I, as a node of autograd.

    Derivatives pass to b and δ or p, and not to the inverse.
    """

    @staticmethod
    def forward(X: Tensor, damping: Tensor, inverse: Op) -> Tensor:
        return inverse.apply(X)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, damping, ctx.inverse = inputs
        ctx.save_for_backward(output, damping)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        solution, damping = ctx.saved_tensors
        adjoint: Tensor = _Solve.apply(gradients[0], damping, ctx.inverse.T)
        products = -(adjoint * solution)
        total = products.sum() if damping.ndim == 0 else products.sum(1)
        return adjoint, total.to(damping), None


# Damping by a diagonal ---------------------------------------------------------------


class WeightedRows(TorchLinearOperator):
    """The factor diag(w) V.

    Args:
        weights: w, ``[D]``.
        factor: V, ``[D, R]``.
    """

    def __init__(self, weights: Tensor, factor: Op) -> None:
        self.weights, self.factor = weights, factor
        super().__init__(factor.shape, factor._own_dtype, factor._own_device)

    def _made_of(self) -> tuple[Tensor, Op]:
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
        entries = self.damping.entries
        if is_followed(entries) and not entries.requires_grad:
            raise TypeError(
                "P: derivatives in forward mode of the entries of a damping are not "
                "there. Pass them .detach()ed, or take Dense(op.to_dense()) if it is "
                "small."
            )
        weights = entries.detach().rsqrt()
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
        return factor.weights

    def _made_of(self) -> tuple[Op]:
        return (self.operator,)

    def _multiply(self, X: Tensor) -> Tensor:
        if not (self.requires_grad and torch.is_grad_enabled()):
            return self._solve(X)
        entries = self.operator.damping.entries
        return _Solve.apply(X, entries, self.detached)

    @property
    def detached(self) -> DiagonalWoodbury:
        """The inverse at the values of P, which require no grad."""
        entries = Diagonal(self.operator.damping.entries.detach())
        operator = DiagonallyDamped(self.operator.low_rank, entries)
        return DiagonalWoodbury(operator, self.woodbury)

    def _solve(self, X: Tensor) -> Tensor:
        weights = self.weights[:, None]
        return weights * self.woodbury.apply(weights * X)
