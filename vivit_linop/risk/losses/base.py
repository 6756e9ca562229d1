"""Losses in output space: gradients, Hessians and square roots, one class a loss.

A loss is written as a sum over samples, L = scale · Σ_n ℓ_n(f_n, y_n); all quantities
here are those of the unscaled ℓ_n. Outputs f are ``[n, C, P]``: n samples, C channels
that a loss couples (the classes of a cross-entropy), P positions that it does not. A
loss that couples nothing has one channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit_linop.risk.copies import Watch
from vivit_linop.risk.differences import SHIFTS, STEPS, Comparison
from vivit_linop.risk.draws import Draws, categories

LossCallable = Callable[[Tensor, Tensor], Tensor]

# Relative to the largest eigenvalue: what rounding may do to a zero of a Hessian.
_CONVEXITY_TOLERANCE = 1e3
# How many columns of the identity to multiply at a time.
_UNIT_COLUMNS = 64


class OutputLoss(ABC):
    """A loss and its derivatives with respect to the outputs of a net.

    Args:
        reduction: ``"mean"`` or ``"sum"``.

    Attributes:
        name: How messages call it.
        source: The loss that the user gave.
    """

    name: str
    source: Any = None

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def as_targets(self, target: Tensor, output: Tensor) -> Tensor:
        """Return targets in the dtype that the loss computes with."""
        return target

    @abstractmethod
    def check(self, output: Tensor, target: Tensor) -> None:
        """Raise a ``ValueError`` if the loss does not take these."""

    def channels(self, output: Tensor) -> Tensor:
        """Reshape outputs ``[n, …]`` to ``[n, C, P]``."""
        return output.reshape(len(output), 1, -1)

    @abstractmethod
    def weight(self, output: Tensor, target: Tensor) -> Tensor:
        """What this batch adds to the divisor of a mean, a scalar tensor."""

    @abstractmethod
    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of ℓ_n over the batch, differentiable."""

    @abstractmethod
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """The gradients of ℓ_n, ``[n, C, P]``."""

    @abstractmethod
    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor) -> Tensor:
        """Multiply each sample's Hessian, ``[n, C, P, K] -> [n, C, P, K]``."""

    def hessian_diagonal(self, output: Tensor, target: Tensor) -> Tensor:
        """The diagonals of the Hessians, ``[n, C, P]``.

        Without a closed form, by a product for each output of a sample.
        """
        f = self.channels(output)
        n, width = len(f), f[0].numel()
        result = f.new_empty(n, width)
        for part in torch.arange(width, device=f.device).split(_UNIT_COLUMNS):
            unit = f.new_zeros(n, width, len(part))
            unit[:, part, torch.arange(len(part), device=f.device)] = 1.0
            product = self.hessian_product(
                output, target, unit.view(*f.shape, len(part))
            )
            product = product.reshape(n, width, len(part))
            result[:, part] = product[:, part].diagonal(dim1=1, dim2=2)
        return result.view(f.shape)

    @abstractmethod
    def sqrt(self, output: Tensor, target: Tensor) -> Tensor:
        """Exact square roots of the Hessians, ``[n, C, R, P]``."""

    def sqrt_width(self, output: Tensor) -> int:
        """The number R of columns that ``sqrt`` has for each position."""
        return self.channels(output).shape[1]

    def sample(
        self,
        output: Tensor,
        target: Tensor,
        mc_samples: int,
        draws: Draws,
    ) -> Tensor:
        """Random square roots S with E[S Sᵀ] the Hessian, ``[n, C P, M, 1]``.

        Column m is the gradient of −log p(ỹ | f) at a label ỹ ~ p(· | f), over √M.

        Args:
            output: The outputs of a batch.
            target: Their targets.
            mc_samples: M.
            draws: Random numbers, from the first sample of the batch on. All samples
                must take as many, in one call, so that a sample's do not depend on how
                the data are cut into batches.
        """
        raise ValueError(
            f"mc_samples: {self.name} has no likelihood to sample from; use "
            "mc_samples=0."
        )

    def check_curvature(self, output: Tensor, target: Tensor) -> None:
        """Raise a ``ValueError`` if there is no Hessian; closed forms are there."""
        return

    def certify_curvature(self, output: Tensor, target: Tensor) -> None:
        """Raise a ``ValueError`` if the Hessian is wrong; closed forms are right."""
        return

    def is_constant(self) -> bool:
        """Whether the Hessian is the same for all outputs."""
        return False


class CrossEntropy(OutputLoss):
    """``nn.CrossEntropyLoss`` with all its options.

    Each of them says ℓ = −Σ_c a_c log p_c with coefficients a ≥ 0 (class weights,
    smoothed or soft labels; zero where the target is ignored). With m = Σ_c a_c the
    gradient is m p − a, the Hessian m (diag(p) − p pᵀ).

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        class_weight: ``[C]`` or None.
        ignore_index: The target that counts for nothing.
        label_smoothing: Between 0 and 1.
    """

    name = "CrossEntropyLoss"

    def __init__(
        self,
        reduction: str,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(reduction)
        self.class_weight = copied_weight(class_weight)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        if class_weight is not None and (class_weight < 0).any():
            raise ValueError(f"loss: weight of {self.name} has negative entries.")

    def channels(self, output: Tensor) -> Tensor:
        """Classes are axis 1, as in torch."""
        return output.reshape(len(output), output.shape[1], -1)

    def as_targets(self, target: Tensor, output: Tensor) -> Tensor:
        """Class indices are int64; uint8, those of masks, torch takes as well."""
        if target.is_floating_point() or target.dtype == torch.int64:
            return target
        if target.dtype != torch.uint8:
            raise TypeError(
                f"data: {self.name} takes class indices as int64 or uint8, got "
                f"{target.dtype}. Convert them with y.long()."
            )
        return target.long()

    def check(self, output: Tensor, target: Tensor) -> None:
        """Targets are classes ``[n, d…]`` or probabilities ``[n, C, d…]``."""
        if output.ndim < 2:
            raise ValueError(
                f"data: {self.name} needs outputs [N, C] or [N, C, d…], the model "
                f"returned {list(output.shape)}."
            )
        num_classes = output.shape[1]
        if target.is_floating_point():
            check_same_shape(output, target, f"{self.name} with soft targets")
            if (target < 0).any():
                raise ValueError(
                    f"data: soft targets of {self.name} must not be negative."
                )
        else:
            expected = (len(output), *output.shape[2:])
            if target.shape != expected:
                advice = ""
                if target.shape == output.shape[:-1]:
                    advice = (
                        " Classes are axis 1, not the last: transpose the outputs, "
                        "for example with predict=lambda model, X: "
                        "model(**X).logits.transpose(1, 2)."
                    )
                raise ValueError(
                    f"data: {self.name} with outputs {list(output.shape)} needs class "
                    f"indices {list(expected)}, got {list(target.shape)}.{advice}"
                )
            classes = target[target != self.ignore_index]
            if classes.numel() and (classes.min() < 0 or classes.max() >= num_classes):
                raise ValueError(
                    f"data: class indices must lie in 0..{num_classes - 1}, got "
                    f"{int(classes.min())}..{int(classes.max())}."
                )
        if self.class_weight is not None and len(self.class_weight) != num_classes:
            raise ValueError(
                f"loss: weight of {self.name} has {len(self.class_weight)} entries "
                f"for {num_classes} classes."
            )

    def _class_weights(self, output: Tensor) -> Tensor:
        if self.class_weight is None:
            return output.new_ones(output.shape[1])
        return self.class_weight.to(output)

    def weight(self, output: Tensor, target: Tensor) -> Tensor:
        """Torch's divisor: the weights of the classes, or the number of positions."""
        if target.is_floating_point():
            return output.new_tensor(output.numel() // output.shape[1])
        valid = target[target != self.ignore_index]
        return self._class_weights(output)[valid].sum()

    def _coefficients(self, output: Tensor, target: Tensor) -> Tensor:
        """Return a, ``[n, C, P]``."""
        num_classes = output.shape[1]
        if target.is_floating_point():
            labels = self.channels(target.to(output))
            valid = None
        else:
            index = target.reshape(len(target), -1)
            valid = index != self.ignore_index
            index = torch.where(valid, index, torch.zeros_like(index))
            labels = F.one_hot(index, num_classes).movedim(-1, 1).to(output)
        smoothed = (1.0 - self.label_smoothing) * labels
        smoothed = smoothed + self.label_smoothing / num_classes
        coefficients = smoothed * self._class_weights(output)[:, None]
        return coefficients if valid is None else coefficients * valid.unsqueeze(1)

    def _mass(self, output: Tensor, target: Tensor) -> Tensor:
        """Return m, ``[n, P]``; for class indices without the coefficients."""
        if target.is_floating_point():
            return self._coefficients(output, target).sum(1)
        index = target.reshape(len(target), -1)
        valid = index != self.ignore_index
        weights = self._class_weights(output)
        mass = weights[torch.where(valid, index, torch.zeros_like(index))]
        mass = (1.0 - self.label_smoothing) * mass
        return (mass + self.label_smoothing * weights.mean()) * valid

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """−Σ a log p."""
        log_p = self.channels(output).log_softmax(1)
        a = self._coefficients(output, target)
        # 0 · (−inf) has no place in the sum: a class that cannot be and is not.
        return -torch.where(a == 0.0, torch.zeros_like(a), a * log_p).sum()

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """M p − a."""
        a = self._coefficients(output, target)
        return a.sum(1, keepdim=True) * self.channels(output).softmax(1) - a

    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor) -> Tensor:
        """M p ∘ (x − pᵀx), with x measured from its entry at the likeliest class.

        The Hessian maps constants to zero, so the shift changes nothing; without it
        the row of a saturated class would be a difference of nearly equal numbers.
        """
        f = self.channels(output)
        p = f.softmax(1).unsqueeze(-1)
        likeliest = f.argmax(1, keepdim=True).unsqueeze(-1)
        X = X - X.gather(1, likeliest.expand(-1, -1, -1, X.shape[-1]))
        mass = self._mass(output, target)[:, None, :, None]
        return mass * p * (X - (p * X).sum(1, keepdim=True))

    def hessian_diagonal(self, output: Tensor, target: Tensor) -> Tensor:
        """M p (1 − p), with 1 − p of the likeliest class as the sum of the others."""
        f = self.channels(output)
        p = f.softmax(1)
        likeliest = f.argmax(1, keepdim=True)
        others = p.scatter(1, likeliest, 0.0).sum(1, keepdim=True)
        rest = (1.0 - p).scatter_(1, likeliest, others)
        return self._mass(output, target).unsqueeze(1) * p * rest

    def sqrt_width(self, output: Tensor) -> int:
        """C − 1, the rank of diag(p) − p pᵀ."""
        return max(output.shape[1] - 1, 1)

    def sqrt(self, output: Tensor, target: Tensor) -> Tensor:
        """The Cholesky factor of diag(p) − p pᵀ, C − 1 columns.

        Tanabe & Sagae (1992), Theorem 1: with q_j = Σ_{i>j} p_i the factor has
        L_jj = √(p_j q_j / q_{j−1}) and L_ij = −(p_i / q_j) L_jj below. Ratios are
        taken in the log domain, so that they keep their digits however small the
        probabilities are.
        """
        log_p = self.channels(output).log_softmax(1)
        num_classes = log_p.shape[1]
        if num_classes == 1:
            return torch.zeros_like(log_p).unsqueeze(2)
        # log q_{j-1} = log Σ_{i≥j} p_i, by summing from the smallest tail.
        log_tail = log_p.flip(1).logcumsumexp(1).flip(1)
        log_q = log_tail[:, 1:]
        diagonal = 0.5 * (log_p[:, :-1] + log_q - log_tail[:, :-1])
        # [n, i, j, P]: row i, column j.
        below = -(log_p.unsqueeze(2) - log_q.unsqueeze(1) + diagonal.unsqueeze(1)).exp()
        row = torch.arange(num_classes, device=output.device)[:, None, None]
        column = torch.arange(num_classes - 1, device=output.device)[:, None]
        factor = torch.where(row > column, below, torch.zeros_like(below))
        factor = torch.where(row == column, diagonal.exp().unsqueeze(1), factor)
        mass = self._mass(output, target)[:, None, None]
        return factor * mass.sqrt()

    def sample(
        self,
        output: Tensor,
        target: Tensor,
        mc_samples: int,
        draws: Draws,
    ) -> Tensor:
        """√m (p − onehot(ỹ)) for ỹ ~ p, drawn for each position."""
        p = self.channels(output).softmax(1).movedim(1, 2)  # [n, P, C]
        n, positions, _ = p.shape
        drawn = categories(p, draws.uniform(n, positions, mc_samples))
        residual = p.unsqueeze(2).repeat(1, 1, mc_samples, 1)  # [n, P, M, C]
        rows = drawn.unsqueeze(-1)
        residual.scatter_add_(3, rows, residual.new_full((), -1.0).expand(rows.shape))
        mass = self._mass(output, target)
        residual *= (mass / mc_samples).sqrt()[:, :, None, None]
        return residual.permute(0, 3, 1, 2).reshape(n, -1, mc_samples, 1)


class NegativeLogLikelihood(CrossEntropy):
    """``nn.NLLLoss`` of log-probabilities: the cross-entropy with f = log p as logits.

    By itself ℓ = −f_y is linear and its Hessian zero. As log_softmax leaves
    log-probabilities as they are, ℓ also is their cross-entropy: the same function of
    the parameters, whose Hessian diag(p) − p pᵀ is that of the likelihood. G then is
    what ``nn.CrossEntropyLoss`` gives for the logits under the log_softmax.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        class_weight: ``[C]`` or None.
        ignore_index: The target that counts for nothing.
    """

    name = "NLLLoss"

    def check(self, output: Tensor, target: Tensor) -> None:
        """Outputs are log-probabilities, targets class indices."""
        if target.is_floating_point():
            raise ValueError(
                f"data: {self.name} needs class indices, got {target.dtype}. For soft "
                "targets use CrossEntropyLoss on logits."
            )
        super().check(output, target)
        check_log_probabilities(output, self.name)


class KullbackLeibler(CrossEntropy):
    """``nn.KLDivLoss`` of log-probabilities: ℓ = Σ_c t_c (log t_c − f_c).

    By itself linear in f, it is the cross-entropy with soft targets up to a constant,
    and has that one's Hessian: see :class:`NegativeLogLikelihood`.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        log_target: Whether targets are logarithms of probabilities.
        per_sample: Whether a mean is one over samples (``"batchmean"``) instead of one
            over entries.
    """

    name = "KLDivLoss"

    def __init__(
        self, reduction: str, log_target: bool = False, per_sample: bool = False
    ) -> None:
        super().__init__(reduction)
        self.log_target, self._per_sample = log_target, per_sample

    def check(self, output: Tensor, target: Tensor) -> None:
        """Outputs are log-probabilities, targets in their shape."""
        if not target.is_floating_point():
            raise ValueError(
                f"data: {self.name} needs probabilities as targets, got "
                f"{target.dtype}. For class indices use NLLLoss."
            )
        super().check(output, target.exp() if self.log_target else target)
        check_log_probabilities(output, self.name)

    def weight(self, output: Tensor, target: Tensor) -> Tensor:
        """Count the entries, or the samples."""
        return output.new_tensor(len(output) if self._per_sample else output.numel())

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum torch's own."""
        return F.kl_div(
            output, target.to(output), reduction="sum", log_target=self.log_target
        )

    def _coefficients(self, output: Tensor, target: Tensor) -> Tensor:
        target = target.exp() if self.log_target else target
        return super()._coefficients(output, target)


class AutogradLoss(OutputLoss):
    """Any loss, through its derivatives by autograd in output space.

    Args:
        function: ``(output, target) -> scalar``, a mean or a sum over samples.
        reduction: Which of the two it is.
        name: How to call it in messages.
        check_sum: Whether to check that it is a sum of losses of single samples.
    """

    def __init__(
        self,
        function: LossCallable,
        reduction: str,
        name: str,
        check_sum: bool = True,
    ) -> None:
        super().__init__(reduction)
        self.function, self.name, self._check_sum = function, name, check_sum
        self._parameters: list[Tensor] | None = None
        self._own: list[Tensor] = []
        self._outside: list[tuple[Tensor, Tensor]] = []

    def watch(self, parameters: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        """Let the next check see which tensors the loss uses.

        Args:
            parameters: Those of the model, which are refused.
            own: Those that nobody else has. Others must stay what they are.
        """
        self._parameters, self._own = list(parameters), list(own)

    def channels(self, output: Tensor) -> Tensor:
        """All outputs of a sample may be coupled."""
        return output.reshape(len(output), -1, 1)

    def check(self, output: Tensor, target: Tensor) -> None:
        """The loss is a scalar and a sum of losses of samples."""
        with torch.no_grad():
            value = self._value(output, target)
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = list(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(
                    f"loss: {self.name} must return a scalar tensor, got {shape}. Use "
                    "reduction='mean' or 'sum'."
                )
            self._look_outside(output, target)
            if not self._check_sum:
                return
            whole = self.total(output, target)
            index = torch.arange(len(output), device=output.device)
            # Two ways to split: neighbours apart, then together.
            for mask in (index % 2 == 0, index < (len(output) + 1) // 2):
                if mask.all():
                    continue
                parts = self._parts(output, target, mask)
                error = (parts[0] + parts[1] - whole).abs()
                tolerance = torch.finfo(output.dtype).eps ** 0.5
                size = max(part.abs() for part in (*parts, whole))
                if error > tolerance * size or self._couples(output, target, mask):
                    raise ValueError(
                        f"loss: {self.name} with reduction={self.reduction!r} is not "
                        f"the {self.reduction} of losses of single samples, so "
                        "per-sample curvature is undefined. Give the reduction that it "
                        "has, a torch.nn loss for weights and ignored targets, or a "
                        "loss that does not mix samples."
                    )

    def _look_outside(self, output: Tensor, target: Tensor) -> None:
        """Find what the loss uses beside outputs and targets, once."""
        if self._parameters is None:
            return
        output = output.detach()
        with torch.enable_grad(), Watch() as watch:
            value = self.function(output, target)
        used = [*watch.used.values(), *leaves_of(value)]
        if parts_of(used, self._parameters):
            raise uses_parameters(self.name)
        known = {id(tensor) for tensor in (output, target, *self._own)}
        self._outside = [
            (t, t.detach().clone())
            for t in {id(t): t for t in used if id(t) not in known}.values()
        ]
        self._parameters, self._own = None, []

    def _check_outside(self) -> None:
        """Raise a ``ValueError`` if others have changed what the loss uses."""
        for tensor, before in self._outside:
            if not torch.equal(tensor.detach(), before):
                raise ValueError(
                    f"loss: {self.name} uses a tensor {list(before.shape)} that is not "
                    "its own, and that has changed since the risk was built. Make it "
                    "an attribute of a loss that is an nn.Module, or build a new risk."
                )

    def _value(self, output: Tensor, target: Tensor) -> Any:
        try:
            return self.function(output, target)
        except TypeError as error:
            raise TypeError(
                f"loss: {self.name} cannot be called as loss(output, target): {error}. "
                "Of a loss of several inputs make a function of one output and one "
                "target, with reduction=: for example lambda output, target: "
                "loss(*output.unbind(1), target), where the model returns "
                "torch.stack([a, b], dim=1)."
            ) from error

    def _parts(self, output: Tensor, target: Tensor, mask: Tensor) -> list[Tensor]:
        """The totals of some samples, and of the others."""
        try:
            return [self.total(output[m], target[m]) for m in (mask, ~mask)]
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"loss: {self.name} fails on some of the samples alone: {error}. It "
                "must not hold anything that numbers samples, such as a weight with a "
                "sample axis; that belongs to the targets."
            ) from error

    def check_curvature(self, output: Tensor, target: Tensor) -> None:
        """One product with a sample's Hessian."""
        f = self.channels(output[:1])
        try:
            self.hessian_product(output[:1], target[:1], torch.ones_like(f)[..., None])
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"loss: {self.name} has no second derivative in torch ({error}), so no "
                "Hessian. Write it as a function of differentiable operations, with "
                "reduction=. Gradients, PerSampleGradients and EmpiricalFisher need "
                "none."
            ) from error

    def certify_curvature(self, output: Tensor, target: Tensor) -> None:
        """Compare a product with differences of gradients, for each sample.

        Where torch's second derivative of the loss is wrong, the latter agree with each
        other and not with the product. On a kink they may too: so it must also be wrong
        beside the outputs.
        """
        try:
            wrong = self._refuted(output, target)
            for shift in SHIFTS[torch.float64]:
                if wrong.any():
                    size = output.abs().mean() + torch.finfo(output.dtype).tiny
                    beside = output + shift * size * _noise(output, seed=1)
                    wrong &= self._refuted(beside, target)
        # Beside the outputs a loss may not be defined, and say so in any way.
        except Exception:
            return
        if wrong.any():
            raise ValueError(
                f"loss: torch's second derivative of {self.name} is wrong, it is not "
                f"the slope of its gradient (sample {int(wrong.nonzero()[0])} of its "
                "batch). Look for hand-written autograd Functions, and write it as a "
                "function of differentiable operations. Gradients, PerSampleGradients "
                "and EmpiricalFisher need no second derivatives."
            )

    def _refuted(self, output: Tensor, target: Tensor) -> Tensor:
        """Of which samples differences of gradients refute the Hessian, ``[n]``."""
        scale = (output.square().mean().sqrt() + torch.finfo(output.dtype).tiny).item()
        x = scale * _noise(output)
        precision, exact = torch.float64, target
        if target.is_floating_point():
            exact = target.double()
        try:
            g = self.gradient(output.double(), exact)
        # Whatever a loss says to numbers of another precision.
        except Exception:
            precision, exact = output.dtype, target
            g = self.gradient(output, target)

        def norms(t: Tensor) -> Tensor:
            return scale * t.reshape(len(t), -1).double().norm(dim=1)

        def gradient(step: float) -> Tensor:
            return self.gradient(output.to(precision) + step * x.to(precision), exact)

        direction = self.channels(x).unsqueeze(-1)
        found = self.hessian_product(output, target, direction).squeeze(-1)
        differences: list[Tensor] = []

        def comparison(usual: Tensor) -> Comparison:
            return Comparison(
                size=norms(found),
                total=norms(found) + norms(g) + usual,
                off=torch.stack([norms(d - found) for d in differences]),
                apart=torch.stack([norms(d - differences[0]) for d in differences]),
                precision=precision,
                own=output.dtype,
            )

        nothing = torch.zeros_like(norms(g))
        for h in STEPS[precision]:
            differences.append((gradient(h) - gradient(-h)) / (2 * h))
            if len(differences) == 1 and comparison(nothing).right().all():
                return nothing.bool()
        return comparison(self._usual(output, target, direction, norms)).refuted()

    def _usual(
        self,
        output: Tensor,
        target: Tensor,
        direction: Tensor,
        norms: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The size of derivatives at random outputs, for each sample.

        Where the loss is saturated, rounding is to be measured by what is not.
        """
        typical = _noise(output)
        try:
            usual = norms(self.gradient(typical, target))
            usual = usual + norms(self.hessian_product(typical, target, direction))
        # Some losses are of probabilities only, and say so in any way.
        except Exception:
            return norms(torch.zeros_like(output))
        return usual.nan_to_num(0.0, 0.0, 0.0)

    def _couples(self, output: Tensor, target: Tensor, mask: Tensor) -> bool:
        """Whether the Hessian of some samples is another one with the others there."""
        try:
            self.check_curvature(output, target)
        except ValueError:
            return False
        f = self.channels(output)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(
            *f.shape, 1, generator=generator, dtype=f.dtype, device="cpu"
        ).to(f)
        together = self.hessian_product(output, target, x)[mask]
        alone = self.hessian_product(output[mask], target[mask], x[mask])
        tolerance = torch.finfo(f.dtype).eps ** 0.5
        return bool((together - alone).norm() > tolerance * alone.norm() + 1e-30)

    def weight(self, output: Tensor, target: Tensor) -> Tensor:
        """Count the samples."""
        return output.new_tensor(len(output))

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """Undo the mean."""
        self._check_outside()
        factor = len(output) if self.reduction == "mean" else 1
        return factor * self.function(output, target).reshape(())

    def _graph(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs as leaves and the gradient as a function of them."""
        leaf = output.detach().requires_grad_()
        total = self.total(leaf, target)
        if not total.requires_grad:
            raise ValueError(
                f"loss: {self.name} does not depend differentiably on the output."
            )
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        return leaf, gradient

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """By one backward pass in output space."""
        with torch.enable_grad():
            _, gradient = self._graph(output, target)
        return self.channels(gradient.detach())

    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor) -> Tensor:
        """By one backward pass for each column; samples are not coupled."""
        with torch.enable_grad():
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

    def sqrt(self, output: Tensor, target: Tensor) -> Tensor:
        """By an eigendecomposition of each sample's Hessian.

        Raises:
            ValueError: If a Hessian has a negative eigenvalue.
        """
        n, width = len(output), output[0].numel()
        unit = torch.eye(width, dtype=output.dtype, device=output.device)
        columns = unit.reshape(1, width, 1, width).expand(n, -1, -1, -1)
        hessians = self.hessian_product(output, target, columns).squeeze(2)
        evals, evecs = torch.linalg.eigh((hessians + hessians.mT) / 2)
        eps = torch.finfo(output.dtype).eps
        limit = -_CONVEXITY_TOLERANCE * eps * evals.abs().amax()
        worst = int(evals[:, 0].argmin())
        if evals[worst, 0] < limit:
            raise ValueError(
                f"loss: {self.name} is not convex in the output at sample {worst} of "
                f"its batch (eigenvalue {evals[worst, 0]:.3g} of its Hessian), so its "
                "Hessian has no square root. Products with vl.GGN and vl.Hessian work; "
                "for a factor use a convex loss."
            )
        roots = evecs * evals.clamp(min=0.0).sqrt().unsqueeze(1)
        return roots.unsqueeze(-1)


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that require grad, and that a tensor was computed from."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    found, todo, seen = [], [tensor.grad_fn], {None, tensor.grad_fn}
    while todo:
        node: Any = todo.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        following = [n for n, _ in node.next_functions if n not in seen]
        todo += following
        seen.update(following)
    return found


def parts_of(tensors: Iterable[Any], whole: Sequence[Tensor]) -> list[Tensor]:
    """Return those of some tensors that are among others, by identity."""
    known = {id(tensor) for tensor in whole}
    return [tensor for tensor in tensors if id(tensor) in known]


def uses_parameters(name: str) -> ValueError:
    """Of a loss that is not a function of the outputs alone."""
    return ValueError(
        f"loss: {name} uses parameters of the model, so it is no function of its "
        "outputs alone, and derivatives would miss that part. Give the loss without "
        "it. A regulariser τ/2 ‖θ‖² is added to operators as vl.GGN(risk) + "
        "τ * vl.Identity(D), another one by its curvature as + vl.Diagonal(…), and "
        "to risk.value() and risk.gradient() by hand."
    )


def _noise(like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(
        like.shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    return drawn.to(like)


def copied_weight(weight: Tensor | None) -> Tensor | None:
    """The user's tensor may change, and a risk stays the same function."""
    if weight is None:
        return None
    with torch.inference_mode(False):
        return weight.detach().clone()


def check_log_probabilities(output: Tensor, name: str) -> None:
    """Raise a ``ValueError`` if outputs are no log-probabilities along axis 1."""
    mass = output.logsumexp(1).abs().max()
    if not mass <= 10 * torch.finfo(output.dtype).eps ** 0.5:
        raise ValueError(
            f"loss: {name} needs log-probabilities along axis 1, but probabilities sum "
            f"to exp({mass:.3g}) or its inverse. End the model with log_softmax(1), or "
            "use CrossEntropyLoss on logits."
        )


def check_same_shape(output: Tensor, target: Tensor, name: str) -> None:
    """Raise a ``ValueError`` if targets have not the shape of the outputs."""
    if output.shape != target.shape:
        raise ValueError(
            f"data: {name} needs targets in the shape of the outputs, got outputs "
            f"{list(output.shape)} and targets {list(target.shape)}. (torch would "
            "broadcast; reshape the targets.)"
        )
