"""Random projections that are made of a seed, again for every product."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vivit_linop.operators.base import TorchLinearOperator

# What the entries of a block take, however many rows there are.
_BLOCK_ENTRIES = 2**21
# SplitMix64 (Steele, Lea & Flood 2014), its constants as signed integers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class RandomProjection(TorchLinearOperator):
    """A matrix P of random signs, ±1/√k, ``[k, D]``, that is never stored whole.

    E[PᵀP] = I, so that inner products of projected vectors are those of the vectors in
    expectation, with a variance of at most (‖x‖²‖y‖² + ⟨x, y⟩²)/k (Achlioptas 2003;
    the projection of TRAK, Park et al. 2023, arXiv:2303.14186). ``(P @ U).to_dense()``
    are the features ``[k, N]`` of per-sample gradients, in memory of k N entries.

    Entry (i, j) is a hash of the seed, i and j: one seed is one matrix on all devices,
    in all precisions, and however vectors are cut. A product makes the k·D entries
    anew, block by block: with few columns it takes 3 to 4 times as long as one with the
    stored matrix, so give it many columns at once.

    Args:
        D: The columns.
        k: The rows, how many features there are.
        seed: Of the entries, from 0 on and below 2⁶³.
        dtype: A torch dtype, or None to take that of what it is combined with.
        device: A torch device, or None likewise.

    Attributes:
        seed: The seed.

    Example:
        >>> import torch, vivit_linop as vl
        >>> P = vl.RandomProjection(1000, 300, seed=0)
        >>> x = torch.linspace(0, 1, 1000)
        >>> bool(((P @ x).norm() / x.norm() - 1).abs() < 0.2)
        True
    """

    def __init__(
        self,
        D: int,
        k: int,
        seed: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size, least in (("D", D, 1), ("k", k, 1), ("seed", seed, 0)):
            integer = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
            if not integer or not least <= size < 2**63:
                raise ValueError(f"{name}: an integer from {least} on, got {size!r}.")
        self.seed = int(seed)
        super().__init__((int(k), int(D)), dtype, device)

    def _settled(
        self, dtype: torch.dtype | None, device: torch.device | None
    ) -> RandomProjection:
        k, D = self.shape
        own = self._own_dtype or dtype, self._own_device or device
        return RandomProjection(D, k, self.seed, *own)

    def blocks(
        self, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the transposes of blocks of columns: their place, and ``[d, k]``."""
        k, D = self.shape
        step = max(1, _BLOCK_ENTRIES // k)
        for start in range(0, D, step):
            place = slice(start, min(start + step, D))
            columns = torch.arange(place.start, place.stop, device=device)
            yield place, self._signs(columns).to(dtype).mul_(2).sub_(1).div_(k**0.5)

    def _signs(self, columns: Tensor) -> Tensor:
        """Zeros and ones, ``[d, k]``: 64 of them from one hash."""
        words = -(-self.shape[0] // 64)
        counters = columns[:, None] * words + torch.arange(words, device=columns.device)
        start = _mixed(torch.tensor(self.seed, device=columns.device) + _GAMMA)
        octets = _mixed(start + counters * _GAMMA).view(torch.uint8)
        bits = torch.arange(8, dtype=torch.uint8, device=columns.device)
        signs = octets.unsqueeze(2).bitwise_right_shift(bits).bitwise_and_(1)
        return signs.flatten(1)[:, : self.shape[0]]

    def _multiply(self, X: Tensor) -> Tensor:
        result = X.new_zeros(self.shape[0], X.shape[1])
        for place, block in self.blocks(X.dtype, X.device):
            result.addmm_(block.T, X[place])
        return result

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return torch.cat([block @ X for _, block in self.blocks(X.dtype, X.device)])


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64: integers overflow, and shifts fill with zeros."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & (2 ** (64 - by) - 1)
