"""Losses that are made of another one: of many items a sample, of a part of H."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivit_linop.risk.containers import map_leaves
from vivit_linop.risk.draws import Draws
from vivit_linop.risk.losses.base import OutputLoss, roots_of


class LossOfItems(OutputLoss):
    """The sum of a loss over the items of each sample.

    Outputs are ``[n, m, …]``, with m items in each of n samples. The loss is asked for
    ``[n m, …]``: what it says of its samples it says of items, and the Hessian of a
    sample has a block for each of its items.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: OutputLoss) -> None:
        self.loss, self.tested = loss, loss.tested
        self.name, self.reduction = loss.name, loss.reduction
        self.source = self._of_user

    def _of_user(self, output: Tensor, target: Any) -> Tensor:
        value: Tensor = self.loss.source(*_items(output, target))
        return value

    def has_own(self, method: str) -> bool:
        """Whether the loss has it in closed form."""
        return self.loss.has_own(method)

    @property
    def takes_several(self) -> bool:
        """Whether the loss does."""
        return self.loss.takes_several

    @property
    def convex(self) -> bool:
        """Whether the loss is."""
        return self.loss.convex

    def total(self, output: Tensor, target: Any) -> Tensor:
        """Over all items."""
        return self.loss.total(*_items(output, target))

    def weight(self, output: Tensor, target: Any) -> Tensor:
        """Of all items."""
        return self.loss.weight(*_items(output, target))

    def as_targets(self, target: Any, output: Tensor) -> Any:
        """In the form of the samples, as the loss computes with them."""
        f, y = _items(output, target)
        shape = output.shape[:2]
        return map_leaves(
            lambda leaf: leaf.unflatten(0, shape), self.loss.as_targets(y, f)
        )

    def check_data(self, output: Tensor, target: Any) -> None:
        """Item by item."""
        self.loss.check_data(*_items(output, target))

    def gradient(self, output: Tensor, target: Any) -> Tensor:
        """Those of the items of a sample, one after the other."""
        gradient = self.loss.gradient(*_items(output, target))
        return gradient.reshape(self.channels(output).shape)

    def hessian_product(self, output: Tensor, target: Any, X: Tensor) -> Tensor:
        """Item by item."""
        return self.hessian_at(output, target)(X)

    def hessian_at(self, output: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
        """As the loss."""
        f, y = _items(output, target)
        product, shape = self.loss.hessian_at(f, y), self.loss.channels(f).shape
        return lambda X: product(X.reshape(*shape, X.shape[-1])).reshape(X.shape)

    def hessian_diagonal(self, output: Tensor, target: Any) -> Tensor:
        """Item by item."""
        diagonal = self.loss.hessian_diagonal(*_items(output, target))
        return diagonal.reshape(self.channels(output).shape)

    def sqrt_width(self, output: Tensor) -> int:
        """Those of all items."""
        f = output.flatten(0, 1)
        positions = self.loss.channels(f).shape[2]
        return output.shape[1] * self.loss.sqrt_width(f) * positions

    def sqrt(self, output: Tensor, target: Any) -> Tensor:
        """The roots of the items, on the diagonal."""
        n, m = output.shape[:2]
        S = self.loss.sqrt(*_items(output, target))  # [n m, c, s, P]
        _, c, s, P = S.shape
        unit = torch.eye(P, dtype=S.dtype, device=S.device)
        blocks = torch.einsum("icsp,pq->icpsq", S, unit).reshape(n, m, c * P, s * P)
        roots = S.new_zeros(n, m, c * P, m, s * P)
        items = torch.arange(m, device=S.device)
        roots[:, items, :, items] = blocks.movedim(1, 0)
        return roots.reshape(n, m * c * P, m * s * P, 1)

    def sample(
        self, output: Tensor, target: Any, mc_samples: int, draws: Draws
    ) -> Tensor:
        """Labels of all items of a sample, which are independent of each other."""
        n, m = output.shape[:2]
        f, y = _items(output, target)
        columns = self.loss.sample(f, y, mc_samples, draws.for_each(m))
        return columns.reshape(n, -1, mc_samples, 1)


def _items(output: Tensor, target: Any) -> tuple[Tensor, Any]:
    return output.flatten(0, 1), map_leaves(lambda leaf: leaf.flatten(0, 1), target)


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
