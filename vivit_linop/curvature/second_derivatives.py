"""Second derivatives certify themselves: H x against a difference of gradients.

Torch differentiates a backward pass by a formula of each operation. Hand-written
operations may have none: then terms are missing, without a word. So the slope of a
gradient along a random x is taken twice on every batch: by torch, and by a difference
of two gradients.

The gradient is that of φ(θ) = Σ_n ⟨u_n, f_n(θ)⟩ + ½ Σ_n |f_n(θ) − f_n|², with random u
and the outputs f_n at θ. Its slope is Jᵀ J x + Σ ⟨u_n, ∂²f_n x⟩. It has all of the
net's part in H x, and is not small where the loss is saturated.

Over a kink (ReLU, max-pooling) gradients jump, however small the step. In float64 steps
can be so small that kinks are seldom crossed, so differences are taken there. θ itself
may lie on a kink: where the two disagree, they are taken a little beside θ, and for
samples apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vivit_linop.checkpoints import Repeated
from vivit_linop.curvature.culprit import at_fault
from vivit_linop.devices import is_out_of_memory
from vivit_linop.graphs import gradients
from vivit_linop.modes import as_guest
from vivit_linop.noise import Noise
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.losses.differences import (
    ROUGH,
    SHIFTS,
    STEPS,
    TOLERANCE,
    Comparison,
    allowed,
)
from vivit_linop.risk.model.frozen_values import FrozenValues
from vivit_linop.risk.model.functional import of_kind
from vivit_linop.risk.model.original import Params

# How near outputs in float64 are to those in float32, if the net is the same there.
_SAME = 1e-2


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


@dataclass(frozen=True)
class Slope:
    """A gradient and its slope along x, and the size of what is differentiated."""

    x: list[Tensor]
    gradient: list[Tensor]
    along: list[Tensor]
    value: Tensor


class Certificate:
    """Whether torch's second derivatives of a net are those of its gradient.

    Args:
        risk: The risk, whose net and samples these are.
        rewritten: Whether second derivatives are those of functions that are written in
            others (:func:`rewriting`).
    """

    def __init__(self, risk: EmpiricalRisk, rewritten: bool = False) -> None:
        self.risk, self._rewritten = risk, rewritten
        self._noise = Noise()
        theta = [p.detach() for p in risk.model.params.values()]
        typical = torch.cat([p.reshape(-1) for p in theta]).square().mean().sqrt()
        least = torch.where(typical > 0.0, 0.1 * typical, 1.0).double()
        sizes = [p.square().mean().sqrt() if p.numel() else p.sum() for p in theta]
        self._scales = torch.stack(sizes).double().clamp(min=least)
        self._x = self._direction()

    def check(self) -> None:
        """Pass over the data; two gradients and a product, if nothing is wrong.

        Raises:
            ValueError: If torch has no second derivative of the net, or a wrong one.
        """
        risk = self.risk
        for index, (X, _) in enumerate(risk.passes.batches("certificate")):
            with as_guest(risk.device):
                differ = risk.inputs_differ(index, X)
                # With gradients: the model may differentiate inside.
                output = risk.model(risk.model.params, X).detach()
                risk.check_outputs(index, output, differ)
                size = output.square().mean().sqrt()
                size = torch.where(size > 0.0, size, 1.0)
                u = size * self._noise.like(output)
                self._check(index, Samples(X, u, output))

    def _check(self, index: int, samples: Samples) -> None:
        """Look at samples together, then at halves of them, in the end at each."""
        found = self._product(samples, self.risk.model.params, self._x)
        if self._right(samples, self.risk.model.params, found):
            return
        shifts = SHIFTS[self._dtype]
        if self._right_beside(samples, shifts[0]):
            self._check_symmetry(index, samples, found)
            return
        halves = self._halves(samples)
        if not halves:
            if any(self._right_beside(samples, shift) for shift in shifts[1:]):
                self._check_symmetry(index, samples, found)
                return
            raise self._error(samples, f"On a sample of batch {index}")
        products = [self._product(h, self.risk.model.params, self._x) for h in halves]
        parts = [a + b for a, b in zip(*(p.along for p in products), strict=True)]
        if not self._near(found, parts, TOLERANCE[self.risk.dtype]):
            where = f"On {len(samples.base)} samples of batch {index} together"
            raise self._error(samples, where)
        for half in halves:
            self._check(index, half)

    def _right_beside(self, samples: Samples, shift: float) -> bool:
        """Whether they are right beside θ, where that may lie on a kink itself."""
        params, dtype = self.risk.model.params, self.risk.dtype
        theta = self._moved(params, self._direction(), shift, dtype)
        found = self._product(samples, theta, self._x)
        return self._right(samples, theta, found)

    def _check_symmetry(self, index: int, samples: Samples, found: Slope) -> None:
        """Raise an error if ⟨y, H x⟩ and ⟨x, H y⟩ differ: on a kink they may."""
        other = self._product(samples, self.risk.model.params, self._direction())
        ways = ((found, other), (other, found))
        yx, xy = (
            sum(float((b * a).sum()) for b, a in zip(left.x, right.along, strict=True))
            for right, left in ways
        )
        size = float((self._norms(found.along) + self._norms(other.along)).sum())
        # ⟨x, …⟩ adds up D entries, in units of the parameters.
        size *= float(sum(p.numel() for p in found.x)) ** 0.5
        if not abs(yx - xy) <= TOLERANCE[self.risk.dtype] * size:
            raise ValueError(
                f"model: its parameters lie on a kink, where torch's second "
                f"derivatives are not symmetric (batch {index}; zero inputs of a PReLU "
                "for example), so there is no Hessian. Move the parameters a little. "
                "The GGN needs no second derivatives."
            )

    def _halves(self, samples: Samples) -> list[Samples]:
        """Halves, none if there is one sample or the net runs on whole batches only."""
        if len(samples.base) == 1:
            return []
        numbers = torch.arange(len(samples.base), device="cpu").chunk(2)
        inputs = [self.risk.samples.take(samples.X, part) for part in numbers]
        try:
            for X in inputs:
                self.risk.model(self.risk.model.params, X)
        # Whatever a model says to batches of another size.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return []
        u, base = samples.u.chunk(2), samples.base.chunk(2)
        return [*map(Samples, inputs, u, base)]

    # Comparisons ----------------------------------------------------------------------

    def _right(self, samples: Samples, theta: Params, found: Slope) -> bool:
        """Whether differences of gradients agree with H x."""
        first = STEPS[self._dtype][0]
        difference = self._difference(samples, theta, found.x, first, FrozenValues())
        if self._compared(found, [difference]):
            return True
        # Torch takes what a net detaches, and rows for padding, for constant.
        frozen = FrozenValues()
        with frozen.recording():
            self._evaluate(theta, samples.X, self._dtype)
        if self._agrees(samples, theta, found, frozen):
            return True
        if self._dtype is self.risk.dtype:
            return False
        # Rounding may leave few digits in float32: are they those of float64?
        exact = self._product(samples, theta, found.x, self._dtype)
        return self._near(found, exact.along, ROUGH) and self._agrees(
            samples, theta, exact, frozen
        )

    def _agrees(
        self, samples: Samples, theta: Params, found: Slope, frozen: FrozenValues
    ) -> bool:
        """Compare with a difference; with those of other steps if it does not agree."""
        differences: list[list[Tensor]] = []
        for step in STEPS[self._dtype]:
            differences.append(self._difference(samples, theta, found.x, step, frozen))
            if len(differences) == 1 and self._compared(found, differences):
                return True
        return self._compared(found, differences)

    def _compared(self, found: Slope, differences: list[list[Tensor]]) -> bool:
        comparison = Comparison(
            size=self._norms(found.along),
            total=self._total(found),
            off=torch.stack([self._norms(d, found.along) for d in differences]),
            apart=torch.stack([self._norms(d, differences[0]) for d in differences]),
            precision=self._dtype,
            own=found.along[0].dtype,
            value=found.value,
        )
        return bool(comparison.right().all())

    def _near(self, found: Slope, expected: list[Tensor], tolerance: float) -> bool:
        """Whether H x is what is expected, for each parameter."""
        error, size = self._norms(found.along, expected), self._norms(found.along)
        own = found.along[0].dtype
        return bool((error <= allowed(size, self._total(found), tolerance, own)).all())

    def _norms(self, parts: list[Tensor], others: list[Tensor] | None = None) -> Tensor:
        """Norms of tensors, or of what they differ by, for changes in proportion."""
        if others is not None:
            parts = [a - b for a, b in zip(parts, others, strict=True)]
        norms = [part.norm().double() for part in parts]
        return torch.stack(norms) * self._scales

    def _total(self, found: Slope) -> Tensor:
        """The size of all first and second derivatives.

        Where all of them cancel, that of the values which they are the rounding of.
        """
        total = (self._norms(found.along) + self._norms(found.gradient)).sum()
        nothing = total < torch.finfo(found.along[0].dtype).eps ** 0.5 * found.value
        return torch.where(nothing, found.value, total)

    # Derivatives ----------------------------------------------------------------------

    def _evaluate(self, theta: Params, X: Any, dtype: torch.dtype) -> Tensor:
        """The outputs at θ; in float64 with all else cast as well."""
        if dtype is self.risk.dtype:
            return self.risk.model(theta, X)
        return self.risk.model(*self.risk.model.cast(theta, X, dtype))

    @cached_property
    def _dtype(self) -> torch.dtype:
        """What differences are taken in: float64 where the net runs in that."""
        risk, double = self.risk, torch.float64
        if risk.dtype is double:
            return double
        X, _ = next(iter(risk.passes.batches()))
        try:
            with as_guest(risk.device):
                output = self._evaluate(risk.model.params, X, double).detach()
        # Whatever a model says to numbers of another precision, or for want of memory
        # for them: then differences are taken in its own, with the bounds of that.
        except Exception:
            return risk.dtype
        known = risk.outputs[0]
        if output.dtype is not double:
            return risk.dtype
        sizes = known.abs()
        near = (output.to(known) - known).abs() <= _SAME * (sizes + sizes.max())
        return double if near.all() else risk.dtype

    def _gradient(
        self,
        samples: Samples,
        theta: Params,
        dtype: torch.dtype,
        graph: bool,
        frozen: FrozenValues | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """θ as leaves, and the gradient of φ there."""
        own = self.risk.model.params
        inner = {
            name: of_kind(own[name], p.detach().to(dtype)).requires_grad_()
            for name, p in theta.items()
        }
        # Not around the backward pass: what a Function does there is its own.
        with (
            (frozen or FrozenValues()).replaying(),
            rewriting(graph and self._rewritten),
        ):
            output = self._evaluate(inner, samples.X, dtype)
        deviation = output - samples.base.to(dtype)
        total = (samples.u.to(dtype) * output).sum() + 0.5 * deviation.square().sum()
        parameters = list(inner.values())
        return parameters, gradients(total, parameters, create_graph=graph)

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
            along = gradients(gradient, parameters, x)
        value = (samples.u.norm() * samples.base.norm()).double()
        return Slope(x, [g.detach() for g in gradient], along, value)

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
        self, theta: Params, x: list[Tensor], h: float, dtype: torch.dtype
    ) -> Params:
        parts = zip(theta.items(), x, strict=True)
        return {n: p.detach().to(dtype) + h * part.to(dtype) for (n, p), part in parts}

    def _direction(self) -> list[Tensor]:
        """A random vector, in proportion to the parameters."""
        parts = zip(self._scales, self.risk.model.params.values(), strict=True)
        return [scale * self._noise.like(p) for scale, p in parts]

    def _error(self, samples: Samples, where: str) -> ValueError:
        def outputs(theta: Params) -> Tensor:
            return self._evaluate(theta, samples.X, self._dtype)

        params = self.risk.model.params.items()
        names = at_fault(outputs, {n: p.detach().to(self._dtype) for n, p in params})
        return ValueError(
            f"model: its second derivatives by torch are wrong. {where} they are not "
            f"the slope of the gradient. {names} Write it with "
            "differentiable operations, or replace it by an equivalent one. The "
            "GGN, the Fisher matrices and gradients need no second derivatives."
        )


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Say what it means if torch cannot differentiate a gradient."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"model: has no second derivative in torch ({error}). Replace the "
            "operation by an equivalent one that has. The GGN, the Fisher matrices and "
            "gradients need no second derivatives."
        ) from error


# Functions without second derivatives -------------------------------------------------


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(input + 3.0) / 6.0
    return input.copy_(result) if inplace else result


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    return torch.linalg.vector_norm(difference, p, dim=-1)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if mode == "max":
        raise NotImplementedError("maxima of bags")
    tokens = input.flatten()
    if offsets is None:
        offsets = torch.arange(0, len(tokens), input.shape[-1], device=input.device)
    elif include_last_offset:
        offsets = offsets[:-1]
    places = torch.arange(len(tokens), device=input.device)
    bags = torch.searchsorted(offsets, places, right=True) - 1
    used = torch.ones_like(tokens, dtype=weight.dtype)
    if padding_idx is not None:
        used = (tokens != padding_idx % len(weight)).to(weight.dtype)
    rows = used[:, None] * weight[tokens]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    result = rows.new_zeros(len(offsets), weight.shape[1]).index_add(0, bags, rows)
    if mode == "mean":
        counts = used.new_zeros(len(offsets)).index_add(0, bags, used)
        result = result / counts.clamp(min=1.0)[:, None]
    return result


_REWRITTEN: dict[Any, Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,
    torch.cdist: _cdist,
    F.embedding_bag: _embedding_bag,
    F.hardsigmoid: _hardsigmoid,
}


def rewriting(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """Write functions without second derivatives in others, where that is needed."""
    return _Rewriting() if needed else contextlib.nullcontext()


def has_other_words(risk: EmpiricalRisk) -> bool:
    """Whether the net calls functions that would be written in others."""
    with as_guest(risk.device), _Watch() as watch:
        for X, _ in risk.passes.batches("certificate"):
            risk.model(risk.model.params, X)
    return watch.has_seen


class _Watch(TorchFunctionMode):
    has_seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.has_seen |= func in _REWRITTEN
        return func(*args, **(kwargs or {}))


class _Rewriting(Repeated):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _REWRITTEN.get(func, func)(*args, **(kwargs or {}))
