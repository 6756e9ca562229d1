"""What differences of gradients say of second derivatives.

Second derivatives H x come in parts (parameters, or samples), and so do differences of
gradients along x over several steps. All sizes are norms of parts in units in which a
change by 1 is a change in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Steps relative to the arguments. The first is for functions without kinks; where it
# crosses one, a smaller one may not.
STEPS = {torch.float64: (1e-7, 1e-6, 1e-9, 1e-10), torch.float32: (1e-2, 3e-3, 1e-3)}
# Shifts of the arguments, to leave a kink, large beside the first steps.
SHIFTS = {torch.float64: (1e-4, 1e-2), torch.float32: (1e-1, 1.0)}
# What H x may be off by its precision, where differences are better.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# What it may be off where they are not: a function that runs in float32 only.
ROUGH = 3e-2
# The first steps are precise: what they refute is no matter of rounding.
_PRECISE = 2
# Errors of a part in proportion to all: of rounding, and of the tolerance.
_ROUNDINGS, _SHARE = 300, 1e-2
# Roundings of a gradient that a difference shows.
_NOISE = 30
# How near converged differences are to each other, by what they are off H x.
_CONVERGED = 1e-2


@dataclass(frozen=True)
class Comparison:
    """H x beside differences of gradients, in norms of P parts.

    Attributes:
        size: Of H x, ``[P]``.
        total: Of all first and second derivatives, a scalar or ``[P]``.
        off: Of H x minus each difference, ``[steps, P]``.
        apart: Of each difference minus the first, ``[steps, P]``.
        precision: What the differences were taken in.
        own: What H x was taken in.
        value: The size of the values whose slopes these are, a scalar; 0 if unknown.
            Where slopes cancel, rounding is in proportion to these.
    """

    size: Tensor
    total: Tensor
    off: Tensor
    apart: Tensor
    precision: torch.dtype
    own: torch.dtype
    value: Tensor | float = 0.0

    @property
    def _steps(self) -> Tensor:
        steps = self.off.new_tensor(STEPS[self.precision][: len(self.off)])
        return steps.unsqueeze(1)

    @property
    def _noise(self) -> Tensor:
        """What rounding adds to each difference, in proportion to all, ``[steps]``."""
        return _NOISE * torch.finfo(self.precision).eps / self._steps

    @property
    def _seen_noise(self) -> Tensor | float:
        """The noise that grows as steps shrink, ``[steps, P]``, of slopes that cancel.

        Less than rounding of the values could bring: a kink is no noise.
        """
        if self.precision is not torch.float64 or len(self.off) < 2:
            return 0.0
        smaller = self._steps.squeeze(1) < self._steps[0]
        if not smaller.any():
            return 0.0
        seen = (self.apart * self._steps)[smaller].amin(0) / self._steps
        return torch.minimum(seen, self._noise * self.value)

    @property
    def _agrees(self) -> Tensor:
        base = TOLERANCE[self.own] if self.precision is torch.float64 else ROUGH
        bound = allowed(self.size, self.total, base, self.own, self._noise)
        return self.off <= bound + self._seen_noise

    def refuted(self) -> Tensor:
        """Where differences agree with each other and not with H x, ``[P]``."""
        converged = _CONVERGED * self.off.amin(0) + 2 * self._noise * self.total
        return ~self._agrees[:_PRECISE].any(0) & (self.apart <= converged).all(0)

    def right(self) -> Tensor:
        """Where a difference agrees with H x, ``[P]``."""
        if len(self.off) == 1:
            return self._agrees[0]
        return self._agrees.any(0) & ~self.refuted()


def allowed(
    size: Tensor,
    total: Tensor,
    tolerance: float,
    own: torch.dtype,
    noise: Tensor | float = 0.0,
) -> Tensor:
    """How far a part may be off: in proportion to itself, and a little to all."""
    floor = max(_SHARE * tolerance, _ROUNDINGS * torch.finfo(own).eps)
    return (tolerance + noise) * size + (floor + noise) * total
