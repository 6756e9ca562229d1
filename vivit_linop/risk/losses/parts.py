"""The positive and the negative part of Hessians in output space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vivit_linop.risk.draws import Draws
from vivit_linop.risk.losses.base import OutputLoss, roots_of


class HessianPart(OutputLoss):
    """A loss with the positive or the negative part of each sample's Hessian.

    With H_n = Q diag(λ) Qᵀ they are Q diag(max(±λ, 0)) Qᵀ: both positive
    semi-definite, and H is their difference. The positive part is the nearest positive
    semi-definite matrix to H_n in the Frobenius norm (Higham 1988, Linear Algebra
    Appl. 103). All else is the loss's own. Its Hessian must have been certified.

    Args:
        loss: The loss.
        sign: 1 or −1.
    """

    tested = True

    def __init__(self, loss: OutputLoss, sign: int) -> None:
        self.loss, self._sign = loss, sign
        self.name, self.reduction, self.source = loss.name, loss.reduction, loss.source

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """That of the loss."""
        return self.loss.total(output, target)

    def channels(self, output: Tensor) -> Tensor:
        """As for the loss."""
        return self.loss.channels(output)

    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor) -> Tensor:
        """Multiply by the root and its adjoint."""
        return self.hessian_at(output, target)(X)

    def hessian_at(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        """Keep the root."""
        S = self.sqrt(output, target)

        def product(X: Tensor) -> Tensor:
            inner = torch.einsum("ncrp,ncpk->nrpk", S, X)
            return torch.einsum("ncrp,nrpk->ncpk", S, inner)

        return product

    def hessian_diagonal(self, output: Tensor, target: Tensor) -> Tensor:
        """The squared norms of the root's rows."""
        return self.sqrt(output, target).square().sum(2)

    def sqrt(self, output: Tensor, target: Tensor) -> Tensor:
        """Q √max(±λ, 0), which always exists."""
        evals, evecs = self.loss.hessian_eigenpairs(output, target)
        return roots_of(self._sign * evals, evecs)

    def sample(
        self, output: Tensor, target: Tensor, mc_samples: int, draws: Draws
    ) -> Tensor:
        """Those of the loss: what is drawn is semi-definite in any case."""
        return self.loss.sample(output, target, mc_samples, draws)
