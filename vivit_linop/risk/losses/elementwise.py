"""Losses that couple no outputs: a function of each output and its target.

Their Hessians are diagonal, and known from two derivatives of one function.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit_linop.risk.data.containers import leaves
from vivit_linop.risk.losses.base import OutputLoss, check_same_shape, copied_weight
from vivit_linop.risk.losses.draws import Draws, LabelDraws, counts
from vivit_linop.risk.losses.own import Loss, OwnLoss
from vivit_linop.risk.model.outputs import OutputTree


class ElementwiseLoss(OutputLoss):
    """A sum over outputs of a function of each output and its target.

    To write one, define :meth:`total`, :meth:`slope` and :meth:`curvature`; a mean
    is one over entries, as in torch.
    """

    def as_targets(self, target: Tensor, output: Tensor) -> Tensor:
        """Labels and counts may be booleans or integers."""
        return target.to(output.dtype)

    def channels(self, output: Tensor) -> Tensor:
        """No output is coupled to another: one channel."""
        return output.reshape(len(output), 1, -1)

    def check_data(self, output: Tensor, target: Tensor) -> None:
        """Outputs and targets have one shape."""
        check_same_shape(output, target, self.name)

    def weight(self, output: Tensor, target: Tensor, /) -> Tensor:
        """Count the entries."""
        return output.new_tensor(output.numel())

    @abstractmethod
    def slope(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The first derivative of each summand, in the shape of the outputs."""

    @abstractmethod
    def curvature(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The second derivative, in the shape of the outputs."""

    def gradient(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The slopes."""
        return self.channels(self.slope(output, target))

    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor, /) -> Tensor:
        """Multiply by the curvatures."""
        return self.channels(self.curvature(output, target)).unsqueeze(-1) * X

    def hessian_diagonal(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The curvatures."""
        return self.channels(self.curvature(output, target))

    def sqrt(self, output: Tensor, target: Tensor, /) -> Tensor:
        """The roots of the curvatures; those of others may be negative."""
        if not self.tested:
            return super().sqrt(output, target)
        return self.channels(self.curvature(output, target)).sqrt().unsqueeze(2)

    @property
    def convex(self) -> bool:
        """Those of the library are."""
        return self.tested or type(self).sqrt is not ElementwiseLoss.sqrt


class NormalLoss(ElementwiseLoss):
    """The negative log-likelihood of normal labels ỹ ~ N(f, 1/h), h the curvature."""

    def sample(
        self, output: Tensor, target: Tensor, mc_samples: int, draws: Draws
    ) -> Tensor:
        """The slopes h (f − ỹ) ~ N(0, h)."""
        h = self.curvature(output, target).reshape(len(output), -1, 1)
        noise = draws.normal(*h.shape[:2], mc_samples).to(output)
        return (noise * (h / mc_samples).sqrt()).unsqueeze(-1)


class SquaredError(NormalLoss):
    """``nn.MSELoss``: ℓ = Σ_c (f_c − y_c)², Hessian 2 I."""

    name, tested = "MSELoss", True

    def total(self, output: Tensor, target: Tensor, /) -> Tensor:
        return (output - target).square().sum()

    def slope(self, output: Tensor, target: Tensor, /) -> Tensor:
        return 2.0 * (output - target)

    def curvature(self, output: Tensor, target: Tensor, /) -> Tensor:
        return torch.full_like(output, 2.0)

    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor, /) -> Tensor:
        return 2.0 * X


class BinaryCrossEntropy(ElementwiseLoss):
    """``nn.BCEWithLogitsLoss``: ℓ = −Σ w (q y log σ + (1 − y) log(1 − σ)).

    Args:
        loss_weight: w, broadcast over the outputs, or None for 1.
        pos_weight: q, broadcast over the outputs, or None for 1.
    """

    name, tested = "BCEWithLogitsLoss", True

    def __init__(
        self, loss_weight: Tensor | None = None, pos_weight: Tensor | None = None
    ) -> None:
        self.loss_weight = copied_weight(loss_weight)
        self.pos_weight = copied_weight(pos_weight)
        for name, value in (("weight", loss_weight), ("pos_weight", pos_weight)):
            if value is not None and (value < 0).any():
                raise ValueError(
                    f"loss: {name} of BCEWithLogitsLoss has negative entries."
                )

    def probabilities(self, output: Tensor) -> Tensor:
        return output.sigmoid()

    def check_data(self, output: Tensor, target: Tensor) -> None:
        """Targets are probabilities in the shape of the outputs."""
        super().check_data(output, target)
        if (target < 0).any() or (target > 1).any():
            raise ValueError("data: targets of BCEWithLogitsLoss must lie in [0, 1].")
        for name, value in (
            ("weight", self.loss_weight),
            ("pos_weight", self.pos_weight),
        ):
            # Broadcast along the sample axis only: torch would accept a weight of a
            # batch's samples, which has no meaning for another batch.
            if value is not None and value.ndim >= output.ndim and len(value) != 1:
                raise ValueError(
                    f"loss: {name} of BCEWithLogitsLoss has shape {list(value.shape)}, "
                    "which numbers samples; it must not have a sample axis."
                )

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            output,
            target.to(output),
            weight=_to(self.loss_weight, output),
            pos_weight=_to(self.pos_weight, output),
            reduction="sum",
        )

    def _coefficients(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b of ℓ = −a log σ − b log(1 − σ)."""
        target = target.to(output)
        ones = torch.ones_like(output)
        w, q = _to(self.loss_weight, output), _to(self.pos_weight, output)
        w = ones if w is None else w * ones
        return w * (ones if q is None else q) * target, w * (1.0 - target)

    def slope(self, output: Tensor, target: Tensor) -> Tensor:
        """(a + b) σ − a."""
        a, b = self._coefficients(output, target)
        return b * output.sigmoid() - a * (-output).sigmoid()

    def curvature(self, output: Tensor, target: Tensor) -> Tensor:
        """(a + b) σ (1 − σ); both tails keep their digits."""
        a, b = self._coefficients(output, target)
        return (a + b) * output.sigmoid() * (-output).sigmoid()

    def sample(
        self, output: Tensor, target: Tensor, mc_samples: int, draws: Draws
    ) -> Tensor:
        """√(a + b) (σ − ỹ) for ỹ ~ Bernoulli(σ)."""
        a, b = self._coefficients(output, target)
        f = output.reshape(len(output), -1, 1)
        uniform = draws.uniform(*f.shape[:2], mc_samples).to(f.device)
        residual = f.sigmoid() - (uniform < f.sigmoid()).to(f)
        mass = (a + b).reshape(len(output), -1, 1)
        return ((mass / mc_samples).sqrt() * residual).unsqueeze(-1)


class GaussianNLL(NormalLoss):
    """``nn.GaussianNLLLoss``: ℓ = Σ ½ (log v + (f − y)²/v), Hessian diag(1/v).

    The variances v come with the targets: ``torch.stack([y, v], dim=-1)``. As in torch
    they are at least ``eps``.

    Args:
        full: Whether ℓ has the constant ½ log 2π.
        eps: The smallest variance.
    """

    name, tested = "GaussianNLLLoss", True

    def __init__(self, full: bool = False, eps: float = 1e-6) -> None:
        self.full, self.eps = full, eps

    def of_several(self, tree: OutputTree) -> OutputLoss:
        """Of means and variances, both from the net, which may broadcast: not convex.

        In expectation over labels the Hessian is diag(1/v, 1/(2v²)).
        """
        if len(tree.shapes) != 2:
            return super().of_several(tree)
        loss = Loss(self.of_both, sample=self.labels, reduction=self.reduction)
        result = OwnLoss(loss)
        result.name, result.reduction, result.source = self.name, self.reduction, loss
        return result.of_several(tree)

    def of_both(self, output: Any, target: Tensor) -> Tensor:
        """The losses of outputs (mean, variance), entry by entry."""
        mean, variance = leaves(output)
        check_same_shape(mean, target, self.name)
        return F.gaussian_nll_loss(
            mean, target, variance, full=self.full, eps=self.eps, reduction="none"
        )

    def labels(self, output: Any, target: Tensor, draws: LabelDraws) -> Tensor:
        """Labels y ~ N(f, v) of outputs (mean, variance)."""
        mean, variance = leaves(output)
        return mean + variance.clamp(min=self.eps).sqrt() * draws.normal(mean)

    def check_data(self, output: Tensor, target: Tensor) -> None:
        """Targets have a last axis: the target and its variance."""
        if target.shape != (*output.shape, 2):
            raise ValueError(
                f"data: {self.name} needs targets {[*output.shape, 2]} that hold the "
                "variances too, torch.stack([y, variance.expand_as(y)], dim=-1); got "
                f"{list(target.shape)}. Or let the model return both, (mean, variance)."
            )
        if (target[..., 1] < 0).any():
            raise ValueError(f"data: variances of {self.name} must not be negative.")

    def _variance(self, target: Tensor) -> Tensor:
        return target[..., 1].clamp(min=self.eps)

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        y, variance = target.unbind(-1)
        return F.gaussian_nll_loss(
            output, y, variance, full=self.full, eps=self.eps, reduction="sum"
        )

    def slope(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target[..., 0]) / self._variance(target)

    def curvature(self, output: Tensor, target: Tensor) -> Tensor:
        return self._variance(target).reciprocal()


class PoissonNLL(ElementwiseLoss):
    """``nn.PoissonNLLLoss``: ℓ = Σ λ − y log λ for a rate λ.

    With ``log_input`` λ = exp(f), and the Hessian is diag(λ); otherwise λ = f, the
    logarithm is that of f + eps, and the Hessian is diag(y/(f + eps)²).

    Args:
        log_input: Whether outputs are logarithms of rates.
        full: Whether ℓ has Stirling's approximation of log y!.
        eps: Added to a rate before the logarithm.
    """

    name, tested = "PoissonNLLLoss", True

    def __init__(
        self, log_input: bool = True, full: bool = False, eps: float = 1e-8
    ) -> None:
        self.log_input, self.full, self.eps = log_input, full, eps

    def check_data(self, output: Tensor, target: Tensor) -> None:
        """Counts are not negative, rates neither."""
        super().check_data(output, target)
        if (target < 0).any():
            raise ValueError(f"data: targets of {self.name} must not be negative.")
        if not self.log_input and (output + self.eps <= 0).any():
            raise ValueError(
                f"loss: {self.name} with log_input=False needs positive outputs. Let "
                "the model return logarithms of rates, with log_input=True."
            )

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return F.poisson_nll_loss(
            output,
            target.to(output),
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            reduction="sum",
        )

    def slope(self, output: Tensor, target: Tensor) -> Tensor:
        if self.log_input:
            return output.exp() - target
        return 1.0 - target / (output + self.eps)

    def curvature(self, output: Tensor, target: Tensor) -> Tensor:
        if self.log_input:
            return output.exp()
        return target / (output + self.eps).square()

    def sample(
        self, output: Tensor, target: Tensor, mc_samples: int, draws: Draws
    ) -> Tensor:
        """λ − ỹ for ỹ ~ Poisson(λ)."""
        if not self.log_input:
            raise ValueError(
                f"mc_samples: with log_input=False the Hessian of {self.name} depends "
                "on the target, so samples of the likelihood would be biased. Let the "
                "model return logarithms of rates, with log_input=True."
            )
        rate = output.exp().reshape(len(output), -1, 1).repeat(1, 1, mc_samples)
        drawn = counts(rate, draws.uniform(*rate.shape))
        return ((rate - drawn) / mc_samples**0.5).unsqueeze(-1)


class Huber(ElementwiseLoss):
    """``nn.HuberLoss``: ½ (f − y)² up to |f − y| = δ, δ (|f − y| − ½ δ) beyond."""

    name, tested = "HuberLoss", True

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = delta

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(output, target, reduction="sum", delta=self.delta)

    def slope(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).clamp(-self.delta, self.delta)

    def curvature(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).abs() < self.delta).to(output)


class SmoothL1(Huber):
    """``nn.SmoothL1Loss``: that of Huber with δ = β, over β.

    (f − y)²/(2β) up to |f − y| = β, |f − y| − ½ β beyond. β is positive.
    """

    name, tested = "SmoothL1Loss", True

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(output, target, reduction="sum", beta=self.delta)

    def slope(self, output: Tensor, target: Tensor) -> Tensor:
        return super().slope(output, target) / self.delta

    def curvature(self, output: Tensor, target: Tensor) -> Tensor:
        return super().curvature(output, target) / self.delta


def _to(weight: Tensor | None, like: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(like)
