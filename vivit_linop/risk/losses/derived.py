"""Losses made of another one: weighted, of many items a sample, with a part of H."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.risk.data.containers import map_leaves
from vivit_linop.risk.losses.base import OutputLoss, roots_of
from vivit_linop.risk.losses.certificates import targets_of
from vivit_linop.risk.losses.draws import Draws
from vivit_linop.risk.losses.registry import (
    as_module,
    built,
    checked_reduction,
    register,
)
from vivit_linop.risk.model.copies import BACKWARD_HOOKS, has_hooks_on_all
from vivit_linop.risk.model.outputs import OutputTree, Returned


class LossOfAnother(OutputLoss):
    """What is known of another loss holds of this one."""

    def __init__(self, loss: OutputLoss) -> None:
        self.loss, self.tested, self.name = loss, loss.tested, loss.name
        self.reduction, self.source = loss.reduction, loss.source

    def has_own(self, method: str) -> bool:
        return self.loss.has_own(method)

    @property
    def convex(self) -> bool:
        return self.loss.convex

    def channels(self, output: Tensor) -> Tensor:
        return self.loss.channels(output)

    def total(self, output: Tensor, target: Any) -> Tensor:
        return self.loss.total(output, target)

    def probabilities(self, output: Tensor) -> Tensor:
        return self.loss.probabilities(output)

    def hessian_product(self, output: Tensor, target: Any, X: Tensor) -> Tensor:
        return self.hessian_at(output, target)(X)


def without_items_and_weights(loss: OutputLoss) -> OutputLoss:
    """Return the loss of items or of samples without weights that one is made of."""
    while isinstance(loss, LossOfAnother):
        loss = loss.loss
    return loss


# Many items a sample -----------------------------------------------------------------


class LossOfItems(LossOfAnother):
    """The sum of a loss over the items of each sample.

    Outputs are ``[n, m, …]``, with m items in each of n samples. The loss is asked for
    ``[n m, …]``: what it says of its samples it says of items, and the Hessian of a
    sample has a block for each of its items.
    """

    def channels(self, output: Tensor) -> Tensor:
        """The outputs of all items together."""
        return OutputLoss.channels(self, output)

    def of_user(self, output: Tensor, target: Any) -> tuple[OutputLoss, Tensor, Any]:
        return self.loss.of_user(*_items(output, target))

    @property
    def takes_several(self) -> bool:
        return self.loss.takes_several

    def total(self, output: Tensor, target: Any) -> Tensor:
        return self.loss.total(*_items(output, target))

    def weight(self, output: Tensor, target: Any) -> Tensor:
        return self.loss.weight(*_items(output, target))

    def probabilities(self, output: Tensor) -> Tensor:
        items = output.flatten(0, 1)
        return self.loss.probabilities(items).unflatten(0, output.shape[:2])

    def as_targets(self, target: Any, output: Tensor) -> Any:
        """In the form of the samples, as the loss computes with them."""
        f, y = _items(output, target)
        shape = output.shape[:2]
        return map_leaves(
            lambda leaf: leaf.unflatten(0, shape), self.loss.as_targets(y, f)
        )

    def check_data(self, output: Tensor, target: Any) -> None:
        self.loss.check_data(*_items(output, target))

    def gradient(self, output: Tensor, target: Any) -> Tensor:
        gradient = self.loss.gradient(*_items(output, target))
        return gradient.reshape(self.channels(output).shape)

    def hessian_at(self, output: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
        f, y = _items(output, target)
        product, shape = self.loss.hessian_at(f, y), self.loss.channels(f).shape
        return lambda X: product(X.reshape(*shape, X.shape[-1])).reshape(X.shape)

    def hessian_diagonal(self, output: Tensor, target: Any) -> Tensor:
        diagonal = self.loss.hessian_diagonal(*_items(output, target))
        return diagonal.reshape(self.channels(output).shape)

    def sqrt_width(self, output: Tensor) -> int:
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


# A part of the Hessian ---------------------------------------------------------------


class HessianPart(LossOfAnother):
    """A loss with the positive part of each sample's Hessian; of sign −1 the negative.

    With H_n = Q diag(λ) Qᵀ they are Q diag(max(±λ, 0)) Qᵀ: both positive
    semi-definite, and H is their difference. The positive part is the nearest positive
    semi-definite matrix to H_n in the Frobenius norm (Higham 1988, Linear Algebra
    Appl. 103). All else is the loss's own. Its Hessian must have been certified.
    """

    convex = True

    def __init__(self, loss: OutputLoss, sign: int) -> None:
        super().__init__(loss)
        self.tested, self._sign = True, sign

    def hessian_at(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        """Keep the root."""
        S = self.sqrt(output, target)

        def product(X: Tensor) -> Tensor:
            inner = torch.einsum("ncrp,ncpk->nrpk", S, X)
            return torch.einsum("ncrp,nrpk->ncpk", S, inner)

        return product

    def hessian_diagonal(self, output: Tensor, target: Tensor) -> Tensor:
        return self.sqrt(output, target).square().sum(2)

    def sqrt(self, output: Tensor, target: Tensor) -> Tensor:
        """Q √max(±λ, 0), which always exists."""
        evals, evecs = self.loss.hessian_eigenpairs(output, target)
        return roots_of(self._sign * evals, evecs)


# Weights of samples ------------------------------------------------------------------


class Weighted(nn.Module):
    """A loss with weights of samples: ℓ_n becomes w_n ℓ_n, for targets ``(y, w)``.

    What the loss has in closed form the weighted one has too: H is w_n H_n, and labels
    for Monte-Carlo samples are drawn as before. A mean still divides by what it
    divides by without weights (N, or the entries, or the weights of classes): weights
    of mean one leave the scale as it is.

    Args:
        loss: A ``torch.nn`` loss, a :class:`vivit_linop.Loss`, or a function.
        reduction: For a function, ``"mean"`` or ``"sum"``.

    Raises:
        TypeError: If the loss is no function.
        ValueError: If a function has no ``reduction``, or a loss another one; in a
            risk, if w is not ``[n]``, negative or not finite.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> X, y, w = torch.rand(6, 3), torch.randint(2, (6,)), torch.rand(6)
        >>> loss = vl.losses.Weighted(nn.CrossEntropyLoss())
        >>> G = vl.GGN(nn.Linear(3, 2), loss, (X, (y, w)))
        >>> plain = vl.GGN(nn.Linear(3, 2), nn.CrossEntropyLoss(), (X, y))
        >>> G.factor.width == plain.factor.width
        True
    """

    def __init__(self, loss: Any, reduction: str | None = None) -> None:
        super().__init__()
        self.loss, self.reduction = loss, checked_reduction(as_module(loss), reduction)

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the mean or the sum of the weighted losses of a batch."""
        returned, loss = Returned(), weighted_loss(self)
        with returned.of_batch(len(target[1])):
            joined = returned(output)
        if returned.tree is not None:
            loss = loss.of_several(returned.tree)
        targets = loss.as_targets(target, joined)
        total = loss.total(joined, targets)
        mean = self.reduction == "mean"
        return total / loss.weight(joined, targets) if mean else total


@register(Weighted)
def weighted_loss(loss: Weighted) -> OutputLoss:
    """By what is weighted."""
    parts = loss.loss.modules() if isinstance(loss.loss, nn.Module) else ()
    on_all = parts and has_hooks_on_all(gradients_only=True)
    if on_all or any(any(BACKWARD_HOOKS(part)) for part in parts):
        raise ValueError(
            "loss: a hook on gradients of what is weighted has no effect on single "
            "samples. Put it on the Weighted loss, and not on all modules."
        )
    plain = as_module(loss.loss)
    return WeightedLoss(built(plain, checked_reduction(plain, loss.reduction)))


class WeightedLoss(LossOfAnother):
    """What a :class:`Weighted` is in output space."""

    takes_several = True

    def __init__(self, loss: OutputLoss) -> None:
        super().__init__(loss)
        self.name = f"Weighted {loss.name}"

    def watch(self, parameters: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        self.loss.watch(parameters, own)

    def of_user(self, output: Tensor, target: Any) -> tuple[OutputLoss, Tensor, Any]:
        return self.loss.of_user(output, target[0])

    def of_several(self, tree: OutputTree) -> OutputLoss:
        self.loss = self.loss.of_several(tree)
        self.tested = self.loss.tested
        return self

    def as_targets(self, target: Any, output: Tensor) -> Any:
        if not isinstance(target, (tuple, list)) or len(target) != 2:
            raise TypeError(
                f"data: {self.name} takes targets (y, w) with weights w [n], got "
                f"{type(target).__name__}."
            )
        y, w = target
        if not isinstance(w, Tensor):
            raise TypeError(
                f"data: {self.name} takes targets (y, w) with a tensor w of weights "
                f"[n], got {type(w).__name__}."
            )
        return targets_of(self.loss, y, output), w.to(output.dtype)

    def check_data(self, output: Tensor, target: Any) -> None:
        y, w = target
        if w.shape != (len(output),):
            raise ValueError(
                f"data: weights of {self.name} must be [{len(output)}], got "
                f"{list(w.shape)}."
            )
        if not w.isfinite().all() or (w < 0).any():
            raise ValueError(
                f"data: weights of {self.name} must be finite and not negative."
            )
        self.loss.check_data(output, y)

    def weight(self, output: Tensor, target: Any) -> Tensor:
        return self.loss.weight(output, target[0])

    def total(self, output: Tensor, target: Any) -> Tensor:
        return torch.dot(target[1], losses_of_samples(self.loss, output, target[0]))

    def gradient(self, output: Tensor, target: Any) -> Tensor:
        return _of_sample(target[1], self.loss.gradient(output, target[0]))

    def hessian_at(self, output: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
        y, w = target
        product = self.loss.hessian_at(output, y)
        return lambda X: _of_sample(w, product(X))

    def hessian_diagonal(self, output: Tensor, target: Any) -> Tensor:
        return _of_sample(target[1], self.loss.hessian_diagonal(output, target[0]))

    def sqrt_width(self, output: Tensor) -> int:
        return self.loss.sqrt_width(output)

    def sqrt(self, output: Tensor, target: Any) -> Tensor:
        """√w_n S_n."""
        return _of_sample(target[1].sqrt(), self.loss.sqrt(output, target[0]))

    def sample(
        self, output: Tensor, target: Any, mc_samples: int, draws: Draws
    ) -> Tensor:
        """√w_n times that of the loss."""
        drawn = self.loss.sample(output, target[0], mc_samples, draws)
        return _of_sample(target[1].sqrt(), drawn)


def losses_of_samples(loss: OutputLoss, output: Tensor, target: Any) -> Tensor:
    """The losses of single samples, ``[n]``, differentiable.

    Of all together, or one by one where torch cannot do that.
    """

    def single(f: Tensor, y: Any) -> Tensor:
        one = map_leaves(lambda leaf: leaf.unsqueeze(0), y)
        return loss.total(f.unsqueeze(0), one)

    try:
        return torch.vmap(single)(output, target)
    # Functions that branch on values, and operations without such a rule; one by one
    # also takes less memory.
    except Exception:
        return torch.stack(
            [
                single(f, map_leaves(operator.itemgetter(n), target))
                for n, f in enumerate(output)
            ]
        )


def _of_sample(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply what each sample has by its weight."""
    return weights.reshape(-1, *(1,) * (values.ndim - 1)) * values
