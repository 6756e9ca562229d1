"""What a loss must say of itself in output space, and what follows from that.

A loss is a sum over samples, L = scale · Σ_n ℓ_n(f_n, y_n); all quantities here are
those of the unscaled ℓ_n. Outputs f are ``[n, C, P]``: n samples, C channels that a
loss couples (the classes of a cross-entropy), P positions that it does not.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vivit_linop.arguments import check_has_values
from vivit_linop.checkpoints import RECOMPUTED
from vivit_linop.modes import recorded
from vivit_linop.risk.losses.draws import Draws
from vivit_linop.risk.model.outputs import OutputTree

# Relative to the largest eigenvalue: what rounding may do to a zero of a Hessian.
_CONVEXITY_TOLERANCE = 1e3
# How many columns of the identity to multiply at a time.
_UNIT_COLUMNS = 64


class OutputLoss(ABC):
    """A loss and its derivatives with respect to the outputs of a net.

    A subclass defines :meth:`total`. What else it defines is a closed form; the rest
    comes from ``total`` by autograd. :func:`vivit_linop.losses.register` says which
    losses of a user it stands for.

    Closed forms are not believed. A total is compared with the user's loss, a gradient
    with autograd, a product with differences of gradients, a root and a diagonal with
    products, on the batches they are used for. Only random roots (:meth:`sample`) are
    not looked at.

    Shapes: outputs are ``[n, …]``, targets what the data have. :meth:`channels` brings
    outputs to ``[n, C, P]``, and derivatives have these axes; by default all outputs of
    a sample are coupled, C of them at one position. Nothing may depend on the other
    samples of a batch.

    Attributes:
        name: How messages call it; by default the class of the user's loss.
        reduction: ``"mean"`` or ``"sum"``, what the user's loss has.
        source: A copy of the loss that the user gave.
        tested: Whether closed forms are known to be right, and are not compared.
        takes_several: Whether targets may be several tensors, in a container; by
            default not of a tested loss.
    """

    name: str = ""
    reduction: str = "mean"
    source: Any = None
    tested: bool = False

    @property
    def takes_several(self) -> bool:
        """Those of the library take one tensor of targets."""
        return not self.tested

    def check_memory(self) -> None:
        """Raise an error if memory of others that it reads has changed.

        A loss that is made of another one, its ``loss``, asks that one.
        """
        inner = getattr(self, "loss", None)
        if isinstance(inner, OutputLoss):
            inner.check_memory()

    @abstractmethod
    def total(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The sum of ℓ_n over the batch, a scalar, differentiable."""

    def weight(self, output: Tensor, target: Tensor, /) -> Tensor:
        """What this batch adds to the divisor of a mean, a scalar tensor.

        By default the number of samples. A mean over entries counts entries.
        """
        return output.new_tensor(len(output))

    def as_targets(self, target: Tensor, output: Tensor) -> Tensor:
        """Return targets in the dtype that the loss computes with."""
        return target

    def check_data(self, output: Tensor, target: Tensor, /) -> None:
        """Raise a ``ValueError`` if the loss does not take these."""
        return

    def probabilities(self, output: Tensor) -> Tensor:
        """Return the probabilities that outputs stand for, in their shape.

        Raises:
            TypeError: If the loss does not say that they stand for any.
        """
        raise TypeError(
            f"link: of {self.name} it is not known that outputs are logits. Give the "
            "function from logits to probabilities: link=torch.sigmoid, or "
            "link=lambda logits: logits.softmax(1)."
        )

    def watch(self, parameters: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        """Let the next check see which tensors the loss uses; a closed form uses none.

        Parameters of the model are refused; nobody else has the loss's own tensors.
        """
        return

    def of_several(self, tree: OutputTree) -> OutputLoss:
        """Return the loss of a model with several outputs, which come joined.

        Raises:
            TypeError: If the loss takes one tensor.
        """
        raise TypeError(
            f"model: returned {tree!r} for a sample, and {self.name} takes one tensor. "
            "Say which with predict=, or give a loss of them: a function (outputs, "
            "target) -> scalar with reduction=, or vl.Loss."
        )

    def channels(self, output: Tensor) -> Tensor:
        """Reshape outputs ``[n, …]`` to ``[n, C, P]``."""
        return output.reshape(len(output), -1, 1)

    def of_user(self, output: Tensor, target: Any) -> tuple[OutputLoss, Tensor, Any]:
        """The loss that the user has given, and what of these it is asked for."""
        return self, output, target

    def gradient(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The gradients of ℓ_n, ``[n, C, P]``.

        Without a closed form, by one backward pass in output space.
        """
        with recorded():
            _, gradient = self._graph(output, target)
        return self.channels(gradient.detach())

    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor, /) -> Tensor:
        """Multiply each sample's Hessian, ``[n, C, P, K] -> [n, C, P, K]``.

        Without a closed form, by one backward pass for each of the K columns.
        """
        with recorded():
            leaf, gradient = self._graph(output, target)
            if not gradient.requires_grad:  # a linear loss
                return torch.zeros_like(X)
            columns = [
                torch.autograd.grad(
                    gradient, leaf, x.reshape(leaf.shape), retain_graph=True
                )[0]
                for x in X.unbind(-1)
            ]
        return torch.stack([self.channels(column) for column in columns], dim=-1)

    def hessian_at(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        """Return X ↦ H X; what does not depend on X may be computed once, here."""
        return functools.partial(self.hessian_product, output, target)

    def hessian_diagonal(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The diagonals of the Hessians, ``[n, C, P]``.

        Without a closed form, by a product for each output of a sample.
        """
        f = self.channels(output)
        n, width = len(f), f[0].numel()
        result = f.new_empty(n, width)
        for part in torch.arange(width, device=f.device).split(_UNIT_COLUMNS):
            unit = f.new_zeros(n, width, len(part))
            unit.scatter_(1, part.expand(n, 1, -1), 1.0)
            product = self.hessian_product(
                output, target, unit.view(*f.shape, len(part))
            )
            product = product.reshape(n, width, len(part))
            result[:, part] = product[:, part].diagonal(dim1=1, dim2=2)
        return result.view(f.shape)

    def sqrt(self, output: Tensor, target: Tensor, /) -> Tensor:
        """Exact square roots S of the Hessians, H = S Sᵀ, ``[n, C, R, P]``.

        Without a closed form, by an eigendecomposition of each sample's Hessian.

        Raises:
            ValueError: If a Hessian has a negative eigenvalue.
        """
        evals, evecs = self.hessian_eigenpairs(output, target)
        worst = negative_sample(evals)
        if worst is not None:
            smallest = evals[worst].min()
            raise ValueError(
                f"loss: {self.name} is not convex in the output at sample {worst} of "
                f"its batch (eigenvalue {smallest:.3g} of its Hessian), so its "
                "Hessian has no square root. vl.GGN and vl.Hessian work by products: "
                "to_dense, diagonal, trace, eigvalsh and eigh(k=…). For a factor and "
                "all that follows from it give positive_part=True, or mc_samples= for "
                "a loss with sample=."
            )
        return roots_of(evals, evecs)

    def hessians(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The Hessians, ``[n, P, C, C]``, by a product for each of the C channels."""
        f = self.channels(output)
        n, num_channels, positions = f.shape
        unit = torch.eye(num_channels, dtype=f.dtype, device=f.device)
        columns = unit.view(1, num_channels, 1, num_channels)
        columns = columns.expand(n, -1, positions, -1)
        # Positions are not coupled.
        hessians = self.hessian_product(output, target, columns).movedim(2, 1)
        return (hessians + hessians.mT) / 2

    def hessian_eigenpairs(
        self, output: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The eigenvalues and eigenvectors of the Hessians, ``[n, P, C(, C)]``."""
        hessians = self.hessians(output, target)
        if hessians.shape[3] == 1:
            return hessians.squeeze(3), torch.ones_like(hessians)
        evals, evecs = torch.linalg.eigh(hessians)
        return evals, evecs

    def has_roots(self, output: Tensor, target: Tensor, /) -> bool:
        """Whether all Hessians of a batch are positive semi-definite, to rounding.

        By their Cholesky factors, which are had sooner than eigenvalues. ``sqrt`` finds
        negative eigenvalues in none of these.
        """
        hessians = self.hessians(output, target)
        # No entry is larger than the largest eigenvalue.
        largest = hessians.abs().amax()
        shift = _CONVEXITY_TOLERANCE * torch.finfo(output.dtype).eps * largest
        unit = torch.eye(hessians.shape[3], dtype=output.dtype, device=output.device)
        shift = shift.clamp(min=torch.finfo(output.dtype).tiny)
        return not torch.linalg.cholesky_ex(hessians + shift * unit).info.any()

    def sqrt_width(self, output: Tensor) -> int:
        """The number R of columns that ``sqrt`` has for each position."""
        return self.channels(output).shape[1]

    def sample(
        self, output: Tensor, target: Tensor, mc_samples: int, draws: Draws, /
    ) -> Tensor:
        """Random square roots S with E[S Sᵀ] the Hessian, ``[n, C P, M, 1]``.

        Column m is the gradient of −log p(ỹ | f) at a label ỹ ~ p(· | f), over √M.

        Args:
            output: The outputs of a batch.
            target: Their targets.
            mc_samples: M.
            draws: Random numbers, from the first sample of the batch on:
                ``draws.uniform(n, …)`` and ``draws.normal(n, …)``, float64 on the host.
                All samples must take as many, in one call, so that a sample's do not
                depend on how the data are cut into batches.

        Raises:
            ValueError: If the loss is no negative log-likelihood.
        """
        raise ValueError(
            f"mc_samples: {self.name} has no likelihood to sample from; use "
            "mc_samples=0 (KFAC and EKFAC: variant='exact'), or say how labels are "
            "drawn: vl.Loss(…, sample=…)."
        )

    @property
    def convex(self) -> bool:
        """Whether all Hessians have roots for certain: there is a closed form."""
        return self.has_own("sqrt")

    def has_own(self, method: str) -> bool:
        """Whether a method is a closed form in place of what the base class does."""
        return getattr(type(self), method) is not getattr(OutputLoss, method)

    def _graph(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs as leaves and the gradient as a function of them."""
        leaf = output.detach().requires_grad_()
        # Hooks on gradients of a leaf, as torch's counters of operations have them on
        # what enters a module, fail in autograd.grad.
        with RECOMPUTED:
            total = self.total(leaf.view_as(leaf), target)
        if not total.requires_grad:
            raise ValueError(
                f"loss: {self.name} does not depend differentiably on the output."
            )
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        return leaf, gradient


def negative_sample(eigenvalues: Tensor) -> int | None:
    """The sample with the lowest of ``[n, P, C]`` eigenvalues, if that is negative."""
    eps = torch.finfo(eigenvalues.dtype).eps
    limit = -_CONVEXITY_TOLERANCE * eps * eigenvalues.abs().amax()
    smallest = eigenvalues.amin((1, 2))
    worst = int(smallest.argmin())
    return worst if smallest[worst] < limit else None


def roots_of(eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    """Roots ``[n, C, C, P]`` of the positive parts of ``[n, P, C, C]`` matrices."""
    roots = eigenvectors * eigenvalues.clamp(min=0.0).sqrt().unsqueeze(2)
    return roots.permute(0, 2, 3, 1)


def copied_weight(weight: Tensor | None) -> Tensor | None:
    """The user's tensor may change, and a risk stays the same function."""
    if weight is None:
        return None
    check_has_values(weight, "loss: a weight")
    with torch.inference_mode(False):
        return weight.detach().clone()


def check_same_shape(output: Tensor, target: Tensor, name: str) -> None:
    """Raise a ``ValueError`` if targets have not the shape of the outputs."""
    if output.shape != target.shape:
        raise ValueError(
            f"data: {name} needs targets in the shape of the outputs, got outputs "
            f"{list(output.shape)} and targets {list(target.shape)}. (torch would "
            "broadcast; reshape the targets.)"
        )
