"""Normal numbers for checks: the same on every device and in every precision.

And numbers with other last digits, which say how large the rounding of what follows is.
What cancels is not in a result, so its size does not show how far it may be off. Where
two ways to one number disagree, the net is run again at parameters that are off by some
units in the last place; by how much that changes the number is rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How many times the measured rounding of a result two ways to it may differ by.
BY_NOISE = 30


class Noise:
    """A stream of normal numbers, drawn on the host in float32.

    To draw them in float64 takes five times as long.

    Args:
        source: A seed, or the generator to draw from.

    Example:
        >>> Noise(0)(2, like=torch.zeros(1, dtype=torch.float64))
        tensor([ 1.5410, -0.2934], dtype=torch.float64)
    """

    def __init__(self, source: int | torch.Generator = 0) -> None:
        if isinstance(source, int):
            source = torch.Generator("cpu").manual_seed(source)
        self._generator = source

    def __call__(self, *shape: int, like: Tensor) -> Tensor:
        """Draw numbers of a shape, with the dtype and device of a tensor."""
        drawn = torch.randn(
            shape, generator=self._generator, dtype=torch.float32, device="cpu"
        )
        return drawn.to(like)

    def like(self, tensor: Tensor) -> Tensor:
        """Draw numbers of a tensor's shape, dtype and device."""
        return self(*tensor.shape, like=tensor)

    def off(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor with other last digits: off by some units there."""
        if not tensor.is_floating_point():
            return tensor.clone()
        return tensor + 4 * torch.finfo(tensor.dtype).eps * tensor * self.like(tensor)
