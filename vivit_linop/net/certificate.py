"""What columns must add up to with random weights, and what is tolerated there.

With a random weight w for each column, Σ w_nr c_nr must be Jᵀ (B w), which is one
ordinary backward pass through the net on all samples of the columns. A weight of its
own for each sample *and* column makes wrong values seen as well as right values of the
wrong sample (Freivalds 1977: a product is checked by a random vector). Each parameter
is compared for itself, so that only those that fail have to be made in another way.

Weights are scaled so that all columns count alike, however small, and have magnitudes
between 1 and 2 before: none hides behind the others, and none behind its own weight.
What is tolerated is measured by one column, not by their sum, so that one wrong column
among very many is seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from functools import lru_cache

import torch
from torch import Tensor

from vivit_linop.devices import told
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.noise import BY_NOISE


class Certificate:
    """Random weights for columns, and what is tolerated where they are added up.

    Args:
        columns: The columns, by parameter.
        cotangents: B, ``[n, C, R]``, of which they are pulled back.
        weights: w, if they are known; by default they are drawn.

    Attributes:
        weights: w, ``[n, R]``.
        cotangent: B w, ``[n, C]``.
    """

    def __init__(
        self,
        columns: Mapping[str, LayerColumns],
        cotangents: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        self._columns = columns
        n, _, R = cotangents.shape
        # One operation on those of all parameters is as fast as one on each.
        found = [part.sizes() for part in columns.values()]
        sizes = torch.stack(found) if found else cotangents.new_zeros(0, n, R)
        if weights is None:
            weights = _weights(sizes, norms(cotangents, 1))
        self.weights = weights
        self.cotangent = torch.bmm(cotangents, self.weights.unsqueeze(2)).squeeze(2)
        # What a column has, in the mean, of a parameter.
        parts = (self.weights * sizes).flatten(1)
        self._shares = torch.linalg.vector_norm(parts, dim=1) / (n * R) ** 0.5

    def errors(
        self,
        gradients: Mapping[str, Tensor],
        lenient: Set[str] = frozenset(),
        noise: float = 0.0,
    ) -> dict[str, float]:
        """Return how far parameters' columns are off, in units of what is tolerated.

        Rounding errors of two ways to one sum grow with the root of the number of
        columns, and are those of all parameters where a parameter's own columns cancel.
        Ways to a single column differ by about ε^¾ at most if the net is well
        conditioned, by √ε otherwise.

        Args:
            gradients: By parameter, its part of Jᵀ B w; it may have no columns.
            lenient: For which of them the net may be ill-conditioned.
            noise: By how much rounding is known to change these gradients.
        """
        if not gradients:
            return {}
        differences = list[Tensor]()
        for name, gradient in gradients.items():
            difference = gradient.reshape(-1)
            if name in self._columns:
                difference = self._columns[name].residual(self.weights, difference)
            differences.append(difference)
        # The host waits for all of them together.
        distances = torch.stack(torch._foreach_norm(differences))
        (*shares,), (*found,) = told([self._shares, distances])
        of = dict(zip(self._columns, shares, strict=True))
        eps, whole = torch.finfo(distances.dtype).eps, math.hypot(*shares)
        spread, errors = self.weights.numel() ** 0.5, dict[str, float]()
        for name, distance in zip(gradients, found, strict=True):
            share = of.get(name, 0.0)
            tolerated = 100 * eps**0.75 * share
            tolerated += spread * (10 * eps * share + eps**0.75 * whole)
            if name in lenient:
                tolerated = 10 * eps**0.5 * spread * (share + whole)
            tolerated += BY_NOISE * noise
            if distance == 0.0:
                errors[name] = 0.0
            else:
                errors[name] = distance / tolerated if tolerated else math.inf
        return errors


def weights_before(cotangents: Tensor) -> Tensor:
    """Weights of columns that are not made yet, ``[n, 1]``.

    As far as what is pulled back tells, columns count alike.

    Args:
        cotangents: B, ``[n, C, 1]``.
    """
    sizes = norms(cotangents, 1)
    drawn = _drawn(sizes.shape, sizes.dtype, sizes.device)
    tiny = torch.finfo(sizes.dtype).tiny
    return torch.where(sizes > tiny, drawn / sizes, drawn)


def _weights(sizes: Tensor, cotangents: Tensor) -> Tensor:
    """Random signs and magnitudes over the sizes of the columns, ``[n, R]``.

    Args:
        sizes: Of each parameter those of its columns, ``[P, n, R]``.
        cotangents: The norms of what is pulled back, ``[n, R]``.
    """
    drawn = _drawn(cotangents.shape, cotangents.dtype, cotangents.device)
    scale, eps = torch.zeros_like(cotangents), torch.finfo(cotangents.dtype)
    if len(sizes):
        # Squares of what is very large or very small are no numbers.
        scale = sizes.amax(0)
        unit = torch.where(scale > 0.0, scale, 1.0)
        scale = scale * norms(sizes / unit, 0)
    # A column that should not be as small as it is must not count for too much.
    pulled = torch.linalg.vector_norm(cotangents)
    gain = torch.linalg.vector_norm(scale) / pulled
    gain = torch.where(gain > 0.0, gain, 1.0)
    least = torch.where(pulled > 0.0, eps.eps**0.25 * gain * cotangents, 0.0)
    scale = torch.maximum(scale, least)
    return torch.where(scale > eps.tiny, drawn / scale, 0.0)


@lru_cache(maxsize=8)
def _drawn(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random signs and magnitudes between 1 and 2, which nobody writes into."""
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(
        2, *shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    return ((1.0 + draws[0]) * (draws[1] - 0.5).sign()).to(device, dtype)


def norms(tensor: Tensor, dim: int) -> Tensor:
    """Norms along an axis; torch's own are slow along any but the last."""
    return tensor.square().sum(dim).sqrt()
