"""What columns of Jᵀ B must add up to, whichever way they were made.

With a random weight w for each column, Σ w_nr c_nr must be Jᵀ (B w), which is one
ordinary backward pass through the net on all samples of the columns. A weight of its
own for each sample *and* column makes wrong values seen as well as right values of the
wrong sample (Freivalds 1977: a product is checked by a random vector). Each parameter
is compared for itself, so that only those that fail have to be made in another way.

Weights are scaled so that all columns count alike, however small, and have magnitudes
between 1 and 2 before: none hides behind the others, and none behind its own weight.
What is tolerated is measured by one column, not by their sum, so that one wrong column
among very many is seen.

Columns that are zero but for rounding (a weight that a norm makes irrelevant) do not
show how large rounding is: what has cancelled is not in them. Before they are called
wrong, it is measured (:meth:`vivit_linop.net.capture.Capture.failing`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.rounding import BY_NOISE


class Certificate:
    """Random weights for columns, and what is tolerated where they are added up.

    Args:
        columns: The columns, by parameter.
        cotangents: B, ``[n, C, R]``, of which they are pulled back.

    Attributes:
        weights: w, ``[n, R]``.
        cotangent: B w, ``[n, C]``.
    """

    def __init__(self, columns: Mapping[str, LayerColumns], cotangents: Tensor) -> None:
        with torch.no_grad():
            self._columns = columns
            sizes = {name: part.sizes() for name, part in columns.items()}
            self.weights = _weights(sizes, torch.linalg.vector_norm(cotangents, dim=1))
            self.cotangent = (cotangents @ self.weights.unsqueeze(2)).squeeze(2)
            # What a column has, in the mean, of a parameter, and in all.
            shares = {
                name: (self.weights * size).square().mean().sqrt()
                for name, size in sizes.items()
            }
            self._shares = shares
            self._whole = torch.stack(
                [share.square() for share in shares.values()]
                or [cotangents.new_zeros(())]
            )
            self._whole = self._whole.sum().sqrt()

    def error(
        self,
        name: str,
        gradient: Tensor | None,
        lenient: bool = False,
        noise: float = 0.0,
    ) -> float:
        """Return how far a parameter's columns are off, in units of what is tolerated.

        Rounding errors of two ways to one sum grow with the root of the number of
        columns, and are those of all parameters where a parameter's own columns cancel.
        Ways to a single column differ by about ε^¾ at most if the net is well
        conditioned, by √ε otherwise.

        Args:
            name: The parameter; it may have no columns.
            gradient: Its part of Jᵀ B w, None for zero.
            lenient: Whether the net may be ill-conditioned.
            noise: By how much rounding is known to change the gradient.
        """
        eps = torch.finfo(self.weights.dtype).eps
        spread = self.weights.numel() ** 0.5
        share = self._shares.get(name, self._whole.new_zeros(()))
        if lenient:
            tolerated = 10 * eps**0.5 * spread * (share + self._whole)
        else:
            tolerated = 100 * eps**0.75 * share
            tolerated += spread * (10 * eps * share + eps**0.75 * self._whole)
        with torch.no_grad():
            if gradient is None:
                gradient = self.weights.new_zeros(
                    self._columns[name].numel if name in self._columns else 1
                )
            gradient = gradient.reshape(-1)
            if name in self._columns:
                gradient = self._columns[name].residual(self.weights, gradient)
            distance = torch.linalg.vector_norm(gradient)
        if distance == 0.0:
            return 0.0
        tolerated += BY_NOISE * noise
        return float(distance / tolerated)


def _weights(sizes: Mapping[str, Tensor], cotangents: Tensor) -> Tensor:
    """Random signs and magnitudes over the sizes of the columns, ``[n, R]``.

    Args:
        sizes: By parameter, those of its columns, ``[n, R]``.
        cotangents: The norms of what is pulled back, ``[n, R]``.
    """
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(
        2, *cotangents.shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    drawn = ((1.0 + draws[0]) * (draws[1] - 0.5).sign()).to(cotangents)
    scale, eps = torch.zeros_like(cotangents), torch.finfo(cotangents.dtype)
    for size in sizes.values():
        scale = torch.hypot(scale, size)
    # A column that should not be as small as it is must not count for too much.
    pulled = torch.linalg.vector_norm(cotangents)
    gain = torch.linalg.vector_norm(scale) / pulled if scale.any() else 1.0
    if pulled > 0.0:
        scale = torch.maximum(scale, eps.eps**0.25 * gain * cotangents)
    return torch.where(scale > eps.tiny, drawn / scale, 0.0)
