"""Second derivatives certify themselves: H x against a difference of gradients.

Torch differentiates a backward pass by whatever formula each operation has for that;
hand-written ones may have none, and then terms are missing without a word. So the slope
of a gradient along a random x, as torch gives it, is compared with what a difference of
two gradients gives, on every batch.

The gradient is that of φ(θ) = Σ_n ⟨u_n, f_n(θ)⟩ + ½ Σ_n |f_n(θ) − f_n|² with random u
and f_n the outputs at θ. Its second derivative Jᵀ J x + Σ ⟨u_n, ∂²f_n x⟩ has all that
is the net's in that of the risk, and is not small where the loss is saturated.

A difference must be told from one over a kink (ReLU, max-pooling), where gradients jump
however small the step is. So it is taken in float64, where steps can be so small that
kinks are seldom crossed; of a batch where it disagrees the samples are looked at apart,
and of these such that lie on a kink also a little beside θ. A net is wrong where
differences of all steps agree with each other and not with H x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vivit_linop.curvature.culprit import FrozenValues, at_fault
from vivit_linop.risk.data import map_leaves, take
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.model import Params, as_guest, strided

# Steps relative to the parameters, the first for nets without kinks.
_STEPS = {torch.float64: (1e-7, 1e-6, 1e-9, 1e-10), torch.float32: (1e-2, 3e-3, 1e-3)}
_STEPS_AT_FIRST = 1
# The first of them are precise: what they refute is no matter of rounding.
_PRECISE = 2
# What H x may be off, in the precision of the net, where differences are better.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# What it may be off where they are not: a net that runs in float32 only.
_ROUGH = 3e-2
# Errors of a part of H x in proportion to all of it: of rounding, and of the above.
_ROUNDINGS, _SHARE = 300, 1e-2
# Roundings of a gradient that a difference shows.
_NOISE = 30
# How near differences are to each other that have converged, by what they are off H x.
_CONVERGED = 1e-2
# The first shift relative to the parameters, to leave a kink, and how often to try.
_SHIFT, _SHIFTS = 1e-2, 2


class Verdict(Enum):
    """What a difference of gradients says of H x."""

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Samples:
    """Some samples of a batch.

    Attributes:
        X: The input.
        u: What φ weighs the outputs by.
        base: The outputs at θ.
    """

    X: Any
    u: Tensor
    base: Tensor

    def some(self, index: Tensor, by_sample: Sequence[bool]) -> Samples:
        """Those of some numbers."""
        at = index.to(self.base.device)
        return Samples(take(self.X, index, by_sample), self.u[at], self.base[at])


@dataclass(frozen=True)
class Slope:
    """A gradient and its slope along a vector, a tensor for each parameter.

    Attributes:
        x: The vector.
        gradient: The gradient.
        along: The slope.
    """

    x: list[Tensor]
    gradient: list[Tensor]
    along: list[Tensor]


class Certificate:
    """Whether torch's second derivatives of a net are those of its gradient.

    Args:
        risk: The risk, whose net and samples these are.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        self.risk = risk
        self._generator = torch.Generator().manual_seed(0)
        theta = [p.detach() for p in risk.params.values()]
        typical = torch.cat([p.reshape(-1) for p in theta]).square().mean().sqrt()
        least = 0.1 * float(typical) or 1.0
        self._scales = [
            max(float(p.square().mean().sqrt()) if p.numel() else 0.0, least)
            for p in theta
        ]
        self._x = self._direction()

    def check(self) -> None:
        """Pass over the data; two gradients and a product, if nothing is wrong.

        Raises:
            ValueError: If torch has no second derivative of the net, or a wrong one.
        """
        risk = self.risk
        for index, (X, _) in enumerate(risk.batches("certificate")):
            with as_guest(risk.device):
                with torch.no_grad():
                    output = risk.model(risk.params, X)
                risk.check_outputs(index, output)
                size = float(output.detach().square().mean().sqrt()) or 1.0
                u = size * self._normal(output)
                self._check(index, Samples(X, u, output))

    def _check(self, index: int, samples: Samples) -> None:
        """Look at samples together, then at halves of them, in the end at each."""
        found = self._product(samples, self.risk.params, self._x)
        if self._verdict(samples, self.risk.params, found) is Verdict.RIGHT:
            return
        halves = self._halves(samples)
        if not halves:
            self._check_alone(index, samples)
            return
        products = [self._product(half, self.risk.params, self._x) for half in halves]
        parts = [sum(p) for p in zip(*(p.along for p in products), strict=True)]
        if any(self._off(found, parts, _TOLERANCE[self.risk.dtype])):
            raise self._error(index, samples, f"of {len(samples.base)} samples ")
        for half in halves:
            self._check(index, half)

    def _check_alone(self, index: int, samples: Samples) -> None:
        """Where they lie on a kink, or nothing can be seen, look beside θ as well."""
        size = _SHIFT
        for _ in range(_SHIFTS):
            theta = self._moved(self.risk.params, self._direction(), size)
            found = self._product(samples, theta, self._x)
            if self._verdict(samples, theta, found) is Verdict.RIGHT:
                return
            size *= 10.0
        raise self._error(index, samples, "")

    def _halves(self, samples: Samples) -> list[Samples]:
        """Halves, none if there is one sample or the net runs on whole batches only."""
        n = len(samples.base)
        if n == 1:
            return []
        halves = [
            samples.some(part, self.risk.by_sample) for part in torch.arange(n).chunk(2)
        ]
        try:
            for half in halves:
                with torch.no_grad():
                    self.risk.model(self.risk.params, half.X)
        # Whatever a model says to batches of another size.
        except Exception:
            return []
        return halves

    # Comparisons ----------------------------------------------------------------------

    def _verdict(self, samples: Samples, theta: Params, found: Slope) -> Verdict:
        verdict = self._compared(samples, theta, found, FrozenValues(), _STEPS_AT_FIRST)
        if verdict is Verdict.RIGHT:
            return verdict
        # Torch's derivatives are those of a net in which what it detaches is constant,
        # and so are entries without a gradient, such as those for padding.
        frozen = FrozenValues()
        with frozen.recording():
            self._evaluate(theta, samples.X, self._dtype)
        gradients = zip(found.x, found.gradient, strict=True)
        x = [part.masked_fill(g == 0.0, 0.0) for part, g in gradients]
        found = self._product(samples, theta, x)
        verdict = self._compared(samples, theta, found, frozen)
        if verdict is Verdict.RIGHT or self._dtype is self.risk.dtype:
            return verdict
        # Rounding may leave few digits in float32: are they those of float64?
        exact = self._product(samples, theta, x, self._dtype)
        if any(self._off(found, exact.along, _ROUGH)):
            return verdict
        return self._compared(samples, theta, exact, frozen)

    def _compared(
        self,
        samples: Samples,
        theta: Params,
        found: Slope,
        frozen: FrozenValues,
        count: int | None = None,
    ) -> Verdict:
        """Compare with differences of all steps; of one, if that agrees."""
        dtype = self._dtype
        own = found.along[0].dtype
        base = _TOLERANCE[own] if dtype is torch.float64 else _ROUGH
        differences: list[list[Tensor]] = []
        noises: list[float] = []
        misses: list[list[bool]] = []
        for step in _STEPS[dtype][:count]:
            differences.append(self._difference(samples, theta, found.x, step, frozen))
            noises.append(_NOISE * torch.finfo(dtype).eps / step)
            misses.append(self._off(found, differences[-1], base, noises[-1]))
            if len(misses) == 1 and not any(misses[0]):
                return Verdict.RIGHT
        if count is not None:
            return Verdict.UNDECIDED
        verdicts = [
            self._of_one(
                number, found, differences, noises, [m[number] for m in misses]
            )
            for number in range(len(self._scales))
        ]
        for verdict in (Verdict.WRONG, Verdict.UNDECIDED):
            if verdict in verdicts:
                return verdict
        return Verdict.RIGHT

    def _of_one(
        self,
        number: int,
        found: Slope,
        differences: list[list[Tensor]],
        noises: list[float],
        misses: list[bool],
    ) -> Verdict:
        """The verdict on the part of one parameter."""
        if not all(misses[:_PRECISE]):
            return Verdict.RIGHT
        scale, total = self._scales[number], self._total(found)
        parts = [difference[number] for difference in differences]
        off = min(float((part - found.along[number]).norm()) for part in parts)
        nearest = [
            float((part - parts[0]).norm())
            <= _CONVERGED * off + 2 * noise * total / scale
            for part, noise in zip(parts, noises, strict=True)
        ]
        if all(nearest):
            return Verdict.WRONG
        return Verdict.UNDECIDED if all(misses) else Verdict.RIGHT

    def _off(
        self, found: Slope, expected: list[Tensor], tolerance: float, noise: float = 0.0
    ) -> list[bool]:
        """Whether H x is not what is expected, for each parameter."""
        eps = torch.finfo(found.along[0].dtype).eps
        floor = max(_SHARE * tolerance, _ROUNDINGS * eps) + noise
        floor *= self._total(found)
        result = []
        for scale, a, b in zip(self._scales, found.along, expected, strict=True):
            error, size = float((a - b).norm()), float(a.norm())
            result.append(
                not scale * error <= (tolerance + noise) * scale * size + floor
            )
        return result

    def _total(self, found: Slope) -> float:
        """The size of all first and second derivatives, by changes in proportion."""
        both = zip(self._scales, found.along, found.gradient, strict=True)
        return sum(s * float(a.norm() + g.norm()) for s, a, g in both)

    # Derivatives ----------------------------------------------------------------------

    def _evaluate(self, theta: Params, X: Any, dtype: torch.dtype) -> Tensor:
        """The outputs at θ; in float64 with all else cast as well."""
        if dtype is self.risk.dtype:
            return self.risk.model(theta, X)
        fixed = {name: _cast(t, dtype) for name, t in self.risk.model.constants.items()}
        X = map_leaves(lambda leaf: _cast(leaf, dtype), X)
        theta = {name: _cast(p, dtype) for name, p in theta.items()}
        return self.risk.model({**fixed, **theta}, X)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """What differences are taken in: float64 where the net runs in that."""
        risk, double = self.risk, torch.float64
        if risk.dtype is double:
            return double
        X, _ = next(iter(risk.batches()))
        try:
            with as_guest(risk.device), torch.no_grad():
                output = self._evaluate(risk.params, X, double)
        # Whatever a model says to numbers of another precision.
        except Exception:
            return risk.dtype
        return double if output.dtype is double else risk.dtype

    def _gradient(
        self,
        samples: Samples,
        theta: Params,
        dtype: torch.dtype,
        graph: bool,
        frozen: FrozenValues | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """θ as leaves, and the gradient of φ there."""
        inner = {n: p.detach().to(dtype).requires_grad_() for n, p in theta.items()}
        # Not around the backward pass: what a Function does there is its own.
        with (frozen or FrozenValues()).replaying():
            output = self._evaluate(inner, samples.X, dtype)
        deviation = output - samples.base.to(dtype)
        total = (samples.u.to(dtype) * output).sum() + 0.5 * deviation.square().sum()
        parameters = list(inner.values())
        return parameters, gradient_of(total, parameters, graph)

    def _product(
        self,
        samples: Samples,
        theta: Params,
        x: list[Tensor],
        dtype: torch.dtype | None = None,
    ) -> Slope:
        """The gradient of φ, and its slope along x by torch."""
        dtype = dtype or self.risk.dtype
        x = [part.to(dtype) for part in x]
        with differentiable_twice():
            parameters, gradient = self._gradient(samples, theta, dtype, graph=True)
            curved = [k for k, g in enumerate(gradient) if g.requires_grad]
            slopes: Sequence[Tensor | None] = [None] * len(parameters)
            if curved:
                slopes = torch.autograd.grad(
                    [gradient[k] for k in curved],
                    parameters,
                    [x[k] for k in curved],
                    allow_unused=True,
                )
        along = [
            torch.zeros_like(p) if s is None else s
            for s, p in zip(map(strided, slopes), parameters, strict=True)
        ]
        return Slope(x, [g.detach() for g in gradient], along)

    def _difference(
        self,
        samples: Samples,
        theta: Params,
        x: list[Tensor],
        step: float,
        frozen: FrozenValues,
    ) -> list[Tensor]:
        """The slope of the gradient of φ along x, by two gradients."""
        sides = []
        for h in (step, -step):
            moved = self._moved(theta, x, h, self._dtype)
            sides.append(self._gradient(samples, moved, self._dtype, False, frozen)[1])
        return [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]

    def _moved(
        self, theta: Params, x: list[Tensor], h: float, dtype: torch.dtype | None = None
    ) -> Params:
        return {
            name: (p.detach().to(dtype or p.dtype) + h * part.to(dtype or p.dtype))
            for (name, p), part in zip(theta.items(), x, strict=True)
        }

    def _direction(self) -> list[Tensor]:
        """A random vector, in proportion to the parameters."""
        return [
            scale * self._normal(p)
            for scale, p in zip(self._scales, self.risk.params.values(), strict=True)
        ]

    def _normal(self, like: Tensor) -> Tensor:
        noise = torch.randn(
            like.shape, generator=self._generator, dtype=torch.float64, device="cpu"
        )
        return noise.to(like.device, like.dtype)

    def _error(self, index: int, samples: Samples, where: str) -> ValueError:
        def outputs(theta: Params) -> Tensor:
            return self._evaluate(theta, samples.X, self._dtype)

        params = self.risk.params.items()
        names = at_fault(outputs, {n: p.detach().to(self._dtype) for n, p in params})
        return ValueError(
            f"model: its second derivatives by torch are wrong. On samples {where}of "
            f"batch {index} they are not the slope of the gradient. {names} Write it "
            "with differentiable operations, or replace it by an equivalent one. The "
            "GGN, the Fisher matrices and gradients need no second derivatives."
        )


def gradient_of(total: Tensor, parameters: list[Tensor], graph: bool) -> list[Tensor]:
    """The gradient of a scalar; zeros for parameters that it does not depend on."""
    gradients = torch.autograd.grad(
        total, parameters, create_graph=graph, allow_unused=True
    )
    return [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(map(strided, gradients), parameters, strict=True)
    ]


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Say what it means if torch cannot differentiate a gradient."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"model: has no second derivative in torch ({error}). Replace the "
            "operation by an equivalent one that has. The GGN, the Fisher matrices and "
            "gradients need no second derivatives."
        ) from error


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
