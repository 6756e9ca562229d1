"""Whether J x is the slope that a backward pass gives, seen along random vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class Probe(NamedTuple):
    """Random vectors, and what an ordinary backward pass makes of one.

    Attributes:
        x: ``[D]``.
        u: ``[n C]``.
        pulled_back: Jᵀ u, by the first backward pass of the graph, ``[D]``.
    """

    x: Tensor
    u: Tensor
    pulled_back: Tensor


def agree(
    probe: Probe,
    jvp: Product,
    vjp: Product,
    traced: Product | None,
    is_rounding: Callable[[Tensor, Tensor, Tensor], bool],
) -> bool:
    """Whether products are those of the Jacobian, and stay so when used.

    ⟨u, J x⟩ must equal ⟨Jᵀ u, x⟩ for a random u, where a large error of J x may be
    hidden among many outputs, and for u = J x, where its square is seen. Of a trace,
    Jᵀ u must also be what an ordinary backward pass gives, and all this again: what it
    keeps is changed by its use if the model works in place.

    Args:
        probe: The random vectors.
        jvp: J x, as it would be used.
        vjp: Jᵀ u by an ordinary backward pass.
        traced: Jᵀ u by a trace, None where J x is none.
        is_rounding: Whether ⟨u, J x⟩ − ⟨Jᵀ u, x⟩ is, given also u and Jᵀ u. A trace is
            let go without that question.
    """
    x, u, expected = probe
    eps = torch.finfo(x.dtype).eps
    tolerance = 100 * eps**0.75
    facts = []
    for _ in range(2 if traced else 1):
        image = jvp(x)
        if traced:
            error = traced(u) - expected
            facts.append(error.norm() <= tolerance * expected.norm())
        slope = torch.dot(image, u) - torch.dot(expected, x)
        size = image.norm() * u.norm() + expected.norm() * x.norm()
        facts.append(slope.abs() <= tolerance * size)
    pulled_back = vjp(image)
    norm = torch.dot(image, image)
    square = norm - torch.dot(pulled_back, x)
    tolerated = tolerance * norm
    tolerated += 100 * eps * pulled_back.norm() * x.norm()
    facts.append(square.abs() <= tolerated)
    # The host waits for all of them together.
    right = torch.stack(facts).tolist()
    if traced:
        return all(right)
    return (right[0] or is_rounding(slope, u, expected)) and (
        right[1] or is_rounding(square, image, pulled_back)
    )
