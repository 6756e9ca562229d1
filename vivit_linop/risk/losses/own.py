"""A loss of the user's own, given by functions: :class:`Loss`."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.arguments import check_choice
from vivit_linop.risk.data.containers import leaves, map_leaves
from vivit_linop.risk.losses.autograd import AutogradLoss
from vivit_linop.risk.losses.draws import Draws, LabelDraws

OfBatch = Callable[[Any, Any], Tensor]
Functions = dict[str, Callable[..., Any]]

COUPLED = ("all", "channels", "none")
# How many entries of outputs labels are drawn for together.
DRAWN_ENTRIES = 2**22


class Loss(nn.Module):
    """A loss of one's own: its value, and what is known of it in closed form.

    Only ``value`` must be there; what else is missing comes by autograd, or is refused
    where it cannot. All functions take a batch, ``(output, target)``, with n samples.
    It is a module that may be trained with: called, it is the mean or the sum of the
    values. :func:`vivit_linop.losses.register` is the longer way, by type.

    Closed forms are compared on the data of the risk: a gradient with autograd, a
    Hessian with differences of gradients, a root with products of the Hessian, what
    ``coupled`` says with products too. What is drawn must be finite, with the shapes of
    the targets. For a negative log-likelihood E[∇ℓ ∇ℓᵀ] = E[∇²ℓ] over drawn labels; a
    warning says so where the two differ, at random outputs: then Monte-Carlo matrices
    are no estimates of the Fisher matrix. Often ℓ is then a mean over entries.

    Of a model that returns several outputs, as a tuple or mapping, all functions have
    these as they are. A Hessian and a root have C entries of all outputs, flattened and
    in their order; a gradient is a container like the outputs.

    Args:
        value: The losses ``[n]`` of the samples, or ``[n, …]`` of their entries, where
            a sample's is the sum and a mean divides by the number of entries, as in
            torch; or the mean over samples or the sum, a scalar, as ``reduction``
            says. Differentiable twice.
        gradient: The slopes in the outputs, in their shape.
        hessian: For each sample the Hessian ℓ_n'' in its outputs, ``[n, C, C]`` with C
            outputs a sample, flattened; see ``coupled`` for other shapes. It need not
            be positive semi-definite.
        sqrt: S with H = S Sᵀ, ``[n, C, R]``.
        sample: ``(output, target, draws) -> labels`` in the form of the targets, drawn
            from the model's distribution p(· | output), for Monte-Carlo samples:
            ``mc_samples=``, ``vl.KFAC``. It has each output and target M times, side
            by side. ``draws`` has random numbers
            (:class:`vivit_linop.losses.LabelDraws`); those of torch's global generator
            are right as well, but depend on how the data are cut into batches.
        reduction: ``"mean"`` or ``"sum"`` over the samples.
        coupled: Which outputs the loss couples: ``"all"`` of a sample; ``"channels"``,
            those along axis 1 at one position, for outputs ``[n, C, d…]``; ``"none"``.
            The fewer, the smaller are the blocks of H: ``[n, C, C, d…]`` for
            ``"channels"``, and for ``"none"`` in the shape of the outputs; roots are
            ``[n, C, R, d…]``, or in the shape of the outputs.

    Raises:
        TypeError: If something is no function.
        ValueError: If ``reduction`` or ``coupled`` is something else.

    Example:
        Means and log-variances of a net with two outputs. H depends on the label, and
        is indefinite; the Monte-Carlo GGN is the Fisher matrix in expectation.

        >>> import torch, vivit_linop as vl
        >>> _ = torch.manual_seed(0)
        >>> def value(f, y):
        ...     return 0.5 * (f[:, 1] + (f[:, 0] - y[:, 0]) ** 2 / f[:, 1].exp())
        >>> def sample(f, y, draws):
        ...     deviation = (0.5 * f[:, 1:]).exp()
        ...     return f[:, :1] + deviation * draws.normal(deviation)
        >>> loss = vl.Loss(value, sample=sample)
        >>> data = torch.rand(50, 3), torch.randn(50, 1)
        >>> risk = vl.EmpiricalRisk(torch.nn.Linear(3, 2), loss, data)
        >>> fisher = vl.GGN(risk, mc_samples=100)
        >>> (fisher + 0.1 * vl.Identity(8)).inv()
        <8x8 Woodbury, torch.float32, cpu>
    """

    def __init__(
        self,
        value: OfBatch,
        *,
        gradient: OfBatch | None = None,
        hessian: OfBatch | None = None,
        sqrt: OfBatch | None = None,
        sample: Callable[[Any, Any, LabelDraws], Any] | None = None,
        reduction: str = "mean",
        coupled: str = "all",
    ) -> None:
        super().__init__()
        given = {
            "value": value,
            "gradient": gradient,
            "hessian": hessian,
            "sqrt": sqrt,
            "sample": sample,
        }
        for name, function in given.items():
            if not callable(function) and (name == "value" or function is not None):
                raise TypeError(
                    f"{name}: a function of outputs and targets, got {function!r}."
                )
        check_choice(reduction, "reduction", ("mean", "sum"))
        check_choice(coupled, "coupled", COUPLED)
        self.given: Functions = {n: f for n, f in given.items() if f is not None}
        self.reduction, self.coupled = reduction, coupled

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the mean or the sum of the samples' losses."""
        value: Tensor = self.given["value"](output, target)
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.mean() if self.reduction == "mean" else value.sum()


class OwnLoss(AutogradLoss):
    """What a :class:`Loss` is in output space."""

    looked_at = False  # whether it was asked if it is a likelihood

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self._given, self._coupled = loss.given, loss.coupled
        value = loss.given["value"]
        self.name = str(getattr(value, "__name__", type(value).__name__))
        # Of the root, by the shape of a sample's outputs.
        self._widths: dict[torch.Size, int] = {}

    def has_own(self, method: str) -> bool:
        return {"hessian_product": "hessian"}.get(method, method) in self._given

    def called(self) -> list[Any]:
        """The functions."""
        return [*self._given.values()]

    def check_data(self, output: Tensor, target: Any) -> None:
        """All functions have the shapes that they must have."""
        super().check_data(output, target)
        with torch.no_grad():
            value = self._losses(output, target)
        if value.ndim and len(value) != len(output):
            raise ValueError(
                f"loss: {self.name} must return the losses of {len(output)} samples, "
                f"[{len(output)}], or a scalar, got {list(value.shape)}."
            )
        if "sqrt" in self._given:
            self._widths[output.shape[1:]] = self.sqrt(output, target).shape[2]
        if "gradient" in self._given:
            self.gradient(output, target)
        if "hessian" in self._given:
            self._blocks(output, target)

    def _losses(self, output: Tensor, target: Any) -> Tensor:
        """What the user's function returns."""
        return self._given["value"](*self.arguments(output, target))

    def total(self, output: Tensor, target: Any) -> Tensor:
        """Sum the losses, or undo the mean."""
        self.check_memory()
        losses = self._losses(output, target)
        return losses.sum() if losses.ndim else super().total(output, target)

    def weight(self, output: Tensor, target: Any) -> Tensor:
        losses = self._losses(output, target)
        return losses.new_tensor(losses.numel() if losses.ndim else len(output))

    def channels(self, output: Tensor) -> Tensor:
        """The coupled outputs, and the positions that are not."""
        n = len(output)
        if self._coupled == "channels" and output.ndim > 1:
            return output.reshape(n, output.shape[1], -1)
        if self._coupled == "none":
            return output.reshape(n, 1, -1)
        return super().channels(output)

    def gradient(self, output: Tensor, target: Any) -> Tensor:
        if "gradient" not in self._given:
            return super().gradient(output, target)
        gradient = self._call("gradient", list(output.shape), output, target)
        return self.channels(gradient)

    def hessian_product(self, output: Tensor, target: Any, X: Tensor) -> Tensor:
        if "hessian" not in self._given:
            return super().hessian_product(output, target, X)
        return self.hessian_at(output, target)(X)

    def hessian_at(self, output: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
        if "hessian" not in self._given:
            return super().hessian_at(output, target)
        return partial(torch.einsum, "ncep,nepk->ncpk", self._blocks(output, target))

    def hessian_diagonal(self, output: Tensor, target: Any) -> Tensor:
        if "hessian" not in self._given:
            return super().hessian_diagonal(output, target)
        diagonal = self._blocks(output, target).diagonal(dim1=1, dim2=2)
        return diagonal.movedim(2, 1)

    def sqrt(self, output: Tensor, target: Any) -> Tensor:
        if "sqrt" not in self._given:
            return super().sqrt(output, target)
        shape = self._blocks_shape(output, None)
        S = self._call("sqrt", shape, output, target)
        n, C, P = self.channels(output).shape
        return S.reshape(n, C, math.prod(S.shape) // max(n * C * P, 1), P)

    def sqrt_width(self, output: Tensor) -> int:
        known = self._widths.get(output.shape[1:])
        return super().sqrt_width(output) if known is None else known

    def sample(
        self, output: Tensor, target: Any, mc_samples: int, draws: Draws
    ) -> Tensor:
        """The gradients at labels that the user draws, over √M."""
        if "sample" not in self._given:
            return super().sample(output, target, mc_samples, draws)
        # [n M, …]: the labels of a sample stand side by side.
        index = torch.arange(len(output), device=output.device)
        together = max(1, DRAWN_ENTRIES // (mc_samples * output[0].numel()))
        parts = []
        for rows in index.split(together):
            own = draws.for_each(mc_samples, int(rows[0]))
            many = rows.repeat_interleave(mc_samples)
            f, y = output[many], map_leaves(operator.itemgetter(many), target)
            parts.append(self.gradient(f, self.labels(f, y, own)))
        columns = torch.cat(parts).reshape(len(output), mc_samples, -1)
        return columns.mT.unsqueeze(-1) / mc_samples**0.5

    def labels(self, output: Tensor, target: Any, draws: Draws) -> Any:
        """Draw a label for each output, in the form of the targets."""
        source = LabelDraws(draws)
        given = self.arguments(output, target)
        labels = source.drawn(self._given["sample"], *given)
        got, expected = (
            [list(leaf.shape) for leaf in leaves(tree)] for tree in (labels, target)
        )
        if got != expected:
            raise ValueError(
                f"loss: sample of {self.name} must return labels in the form of the "
                f"targets, {expected}, got {got or type(labels).__name__}."
            )
        return labels

    def _blocks(self, output: Tensor, target: Any) -> Tensor:
        """The Hessians, ``[n, C, C, P]``."""
        n, C, P = self.channels(output).shape
        H = self._call("hessian", self._blocks_shape(output, C), output, target)
        return H.reshape(n, C, C, P)

    def _blocks_shape(self, output: Tensor, columns: int | None) -> list[int | None]:
        """The shape of blocks with so many columns; None for any number."""
        if self._coupled == "none":
            return list(output.shape)
        n, C, _ = self.channels(output).shape
        return [n, C, columns, *(output.shape[2:] if self._coupled != "all" else ())]

    def _call(self, name: str, shape: list[Any], output: Tensor, target: Any) -> Tensor:
        """Call a function of the user's; the shape may have None for any number."""
        with torch.no_grad():
            found = self._given[name](*self.arguments(output, target))
        if name == "gradient" and self._tree is not None:
            found = self._tree.join(found)
        got = list(found.shape) if isinstance(found, Tensor) else []
        pairs = itertools.zip_longest(shape, got)
        if len(got) != len(shape) or any(e not in (None, size) for e, size in pairs):
            expected = str(shape).replace("None", "R")
            raise ValueError(
                f"loss: {name} of {self.name} must return {expected} for outputs "
                f"{list(output.shape)} and coupled={self._coupled!r}, got "
                f"{got if isinstance(found, Tensor) else type(found).__name__}."
            )
        return found.detach().to(output)
