"""Numbers with other last digits: how large the rounding of what follows is.

What cancels is not in a result, so its size does not show how far it may be off. Where
two ways to one number disagree, the net is run again at parameters that are off by some
units in the last place; by how much that changes the number is rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.noise import Noise

# How often rounding is measured before a result is called wrong: where a few numbers
# cancel, most often nothing is left.
ATTEMPTS = 64
# How many times the measured rounding of a result two ways to it may differ by.
BY_NOISE = 30


def with_other_digits(p: Tensor, noise: Noise) -> Tensor:
    """Return numbers that are off by some units in the last place."""
    if not p.is_floating_point():
        return p
    return p + 4 * torch.finfo(p.dtype).eps * p * noise.like(p)
