"""Losses of classes: the cross-entropy, and what is one of log-probabilities.

All of them say ℓ = −Σ_c a_c log p_c with p the softmax of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit_linop.risk.losses.base import OutputLoss, check_same_shape, copied_weight
from vivit_linop.risk.losses.draws import Draws, categories


class CrossEntropy(OutputLoss):
    """``nn.CrossEntropyLoss`` with all its options.

    Each of them says ℓ = −Σ_c a_c log p_c with coefficients a ≥ 0 (class weights,
    smoothed or soft labels; zero where the target is ignored). With m = Σ_c a_c the
    gradient is m p − a, the Hessian m (diag(p) − p pᵀ).
    """

    name, tested, convex = "CrossEntropyLoss", True, True

    def __init__(
        self,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        self.class_weight = copied_weight(class_weight)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        if class_weight is not None and (class_weight < 0).any():
            raise ValueError(f"loss: weight of {self.name} has negative entries.")

    def channels(self, output: Tensor) -> Tensor:
        """Classes are axis 1, as in torch."""
        return output.reshape(len(output), output.shape[1], -1)

    def probabilities(self, output: Tensor) -> Tensor:
        """The softmax over the classes; also of log-probabilities."""
        return output.softmax(1)

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

    def check_data(self, output: Tensor, target: Tensor) -> None:
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
            wrong = (target < 0) | (target >= num_classes)
            if (wrong & (target != self.ignore_index)).any():
                classes = target[target != self.ignore_index]
                raise ValueError(
                    f"data: class indices must lie in 0..{num_classes - 1}, got "
                    f"{int(classes.min())}..{int(classes.max())}."
                )
        if self.class_weight is not None and len(self.class_weight) != num_classes:
            raise ValueError(
                f"loss: weight of {self.name} has {len(self.class_weight)} entries "
                f"for {num_classes} classes."
            )

    def weight(self, output: Tensor, target: Tensor) -> Tensor:
        """Torch's divisor: the weights of the classes, or the number of positions."""
        if target.is_floating_point():
            return output.new_tensor(output.numel() // output.shape[1])
        return self.mass(output, target, smoothing=0.0).sum()

    def _coefficients(self, output: Tensor, target: Tensor) -> Tensor:
        """Return a, ``[n, C, P]``."""
        if target.is_floating_point():
            a, valid = self.channels(target.to(output)), None
        else:
            index = target.reshape(len(target), 1, -1)
            valid = index != self.ignore_index
            index = torch.where(valid, index, 0)
            a = torch.zeros_like(self.channels(output)).scatter(1, index, 1.0)
        if self.label_smoothing:
            smoothing = self.label_smoothing / output.shape[1]
            a = (1.0 - self.label_smoothing) * a + smoothing
        if self.class_weight is not None:
            a = a * self.class_weight.to(output)[:, None]
        return a if valid is None else a * valid

    def mass(
        self, output: Tensor, target: Tensor, smoothing: float | None = None
    ) -> Tensor:
        """Return m, ``[n, P]``; for class indices also with another smoothing."""
        if target.is_floating_point():
            return self._coefficients(output, target).sum(1)
        index = target.reshape(len(target), -1)
        valid = index != self.ignore_index
        if self.class_weight is None:  # smoothed labels have the same mass
            return valid.to(output.dtype)
        weights = self.class_weight.to(output)
        share = self.label_smoothing if smoothing is None else smoothing
        mass = (1.0 - share) * weights[torch.where(valid, index, 0)]
        return (mass + share * weights.mean()) * valid

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """−Σ a log p; by torch's own where a is 1 for a class, and else 0."""
        plain = self.class_weight is None and not self.label_smoothing
        if plain and output.ndim == 2 and not target.is_floating_point():
            ignored = self.ignore_index
            return F.cross_entropy(
                output, target, ignore_index=ignored, reduction="sum"
            )
        log_p = self.channels(output).log_softmax(1)
        a = self._coefficients(output, target)
        # 0 · (−inf) has no place in the sum: a class that cannot be and is not.
        return -torch.where(a == 0.0, torch.zeros_like(a), a * log_p).sum()

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """M p − a."""
        a = self._coefficients(output, target)
        p = self.channels(output).softmax(1)
        return p.mul_(a.sum(1, keepdim=True)).sub_(a)

    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor) -> Tensor:
        """M p ∘ (x − pᵀx), with x measured from its entry at the likeliest class.

        The Hessian maps constants to zero, so the shift changes nothing; without it
        the row of a saturated class would be a difference of nearly equal numbers.
        """
        return self.hessian_at(output, target)(X)

    def hessian_at(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        """Keep p, m p and the likeliest class."""
        f = self.channels(output)
        p = f.softmax(1).unsqueeze(-1)
        likeliest = f.argmax(1, keepdim=True).unsqueeze(-1)
        scaled = self.mass(output, target)[:, None, :, None] * p

        def product(X: Tensor) -> Tensor:
            X = X - X.gather(1, likeliest.expand(-1, -1, -1, X.shape[-1]))
            X -= (p * X).sum(1, keepdim=True)
            return X.mul_(scaled)

        return product

    def hessian_diagonal(self, output: Tensor, target: Tensor) -> Tensor:
        """M p (1 − p), with 1 − p of the likeliest class as the sum of the others."""
        f = self.channels(output)
        p = f.softmax(1)
        likeliest = f.argmax(1, keepdim=True)
        others = p.scatter(1, likeliest, 0.0).sum(1, keepdim=True)
        rest = (1.0 - p).scatter_(1, likeliest, others)
        return self.mass(output, target).unsqueeze(1) * p * rest

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
        ratio = log_p.unsqueeze(2) - log_q.unsqueeze(1)
        above, on, signs = _triangle(num_classes, ratio.dtype, ratio.device)
        ratio = ratio.masked_fill_(on, 0.0).masked_fill_(above, -math.inf)
        factor = ratio.add_(diagonal.unsqueeze(1)).exp_().mul_(signs)
        mass = self.mass(output, target)[:, None, None]
        return factor.mul_(mass.sqrt())

    def sample(
        self, output: Tensor, target: Tensor, mc_samples: int, draws: Draws
    ) -> Tensor:
        """√m (p − onehot(ỹ)) for ỹ ~ p, drawn for each position."""
        p = self.channels(output).softmax(1).movedim(1, 2)  # [n, P, C]
        n, positions, _ = p.shape
        drawn = categories(p, draws.uniform(n, positions, mc_samples))
        residual = p.unsqueeze(2).repeat(1, 1, mc_samples, 1)  # [n, P, M, C]
        rows = drawn.unsqueeze(-1)
        residual.scatter_add_(3, rows, residual.new_full((), -1.0).expand(rows.shape))
        mass = self.mass(output, target)
        residual *= (mass / mc_samples).sqrt()[:, :, None, None]
        return residual.permute(0, 3, 1, 2).reshape(n, -1, mc_samples, 1)


class NegativeLogLikelihood(CrossEntropy):
    """``nn.NLLLoss`` of log-probabilities: the cross-entropy with f = log p as logits.

    By itself ℓ = −f_y is linear and its Hessian zero. As log_softmax leaves
    log-probabilities as they are, ℓ also is their cross-entropy: the same function of
    the parameters, whose Hessian diag(p) − p pᵀ is that of the likelihood. G then is
    what ``nn.CrossEntropyLoss`` gives for the logits under the log_softmax.
    """

    name = "NLLLoss"

    def check_data(self, output: Tensor, target: Tensor) -> None:
        """Outputs are log-probabilities, targets class indices."""
        if target.is_floating_point():
            raise ValueError(
                f"data: {self.name} needs class indices, got {target.dtype}. For soft "
                "targets use CrossEntropyLoss on logits."
            )
        super().check_data(output, target)
        check_log_probabilities(output, self.name)

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """−Σ a f, also where probabilities sum to 1 in a few digits only."""
        return -(self._coefficients(output, target) * self.channels(output)).sum()


class KullbackLeibler(CrossEntropy):
    """``nn.KLDivLoss`` of log-probabilities: ℓ = Σ_c t_c (log t_c − f_c).

    By itself linear in f, it is the cross-entropy with soft targets up to a constant,
    and has that one's Hessian: see :class:`NegativeLogLikelihood`.

    Args:
        log_target: Whether targets are logarithms of probabilities.
        per_sample: Whether a mean is one over samples (``"batchmean"``) instead of one
            over entries.
    """

    name = "KLDivLoss"

    def __init__(self, log_target: bool = False, per_sample: bool = False) -> None:
        super().__init__()
        self.log_target, self._per_sample = log_target, per_sample

    def check_data(self, output: Tensor, target: Tensor) -> None:
        """Outputs are log-probabilities, targets in their shape."""
        if not target.is_floating_point():
            raise ValueError(
                f"data: {self.name} needs probabilities as targets, got "
                f"{target.dtype}. For class indices use NLLLoss."
            )
        super().check_data(output, target.exp() if self.log_target else target)
        check_log_probabilities(output, self.name)

    def weight(self, output: Tensor, target: Tensor) -> Tensor:
        """Count the entries, or the samples."""
        return output.new_tensor(len(output) if self._per_sample else output.numel())

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        t = target.to(output)
        if self.log_target:
            return (t.exp() * (t - output)).sum()
        return (torch.xlogy(t, t) - t * output).sum()

    def _coefficients(self, output: Tensor, target: Tensor) -> Tensor:
        target = target.exp() if self.log_target else target
        return super()._coefficients(output, target)


@lru_cache(maxsize=8)
def _triangle(
    num_classes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What is above and on the diagonal, and the signs of a root: ``[C, C − 1, 1]``."""
    rows = torch.arange(num_classes, device=device)[:, None, None]
    columns = torch.arange(num_classes - 1, device=device)[:, None]
    above, on = rows < columns, rows == columns
    return above, on, on.to(dtype) - (rows > columns).to(dtype)


def check_log_probabilities(output: Tensor, name: str) -> None:
    """Raise a ``ValueError`` if outputs are no log-probabilities along axis 1."""
    mass = output.logsumexp(1).abs().max()
    if not mass <= 10 * torch.finfo(output.dtype).eps ** 0.5:
        raise ValueError(
            f"loss: {name} needs log-probabilities along axis 1, but probabilities sum "
            f"to exp({mass:.3g}) or its inverse. End the model with log_softmax(1), or "
            "use CrossEntropyLoss on logits."
        )
