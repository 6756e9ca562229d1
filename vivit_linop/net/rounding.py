"""Numbers with other last digits: how large the rounding of what follows is.

What cancels is not in a result, so its size does not show how far it may be off. Where
two ways to one number disagree, the net is run again at parameters that are off by some
units in the last place; by how much that changes the number is rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from vivit_linop.noise import Noise
from vivit_linop.risk.model.private_module import Params

# How often rounding is measured before a result is called wrong: where a few numbers
# cancel, most often nothing is left.
_ATTEMPTS = 64


def nearby(params: Params, cotangent: Tensor) -> Iterator[tuple[Params, Tensor]]:
    """Yield copies of parameters, and of what is pulled back, with other last digits.

    First as they are: if that gives another result, it is not rounding.
    """
    digits = Noise()
    yield {name: p.detach().clone() for name, p in params.items()}, cotangent
    for _ in range(_ATTEMPTS):
        at = {name: digits.off(p.detach()) for name, p in params.items()}
        yield at, digits.off(cotangent)
