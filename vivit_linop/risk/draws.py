"""Random numbers that belong to samples, however the data are cut into batches."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# Numbers that Philox gives for each value of its counter.
_PER_COUNT = 4
# Half the spacing of the uniform numbers: none is 0, so normal numbers are finite.
_HALF = 2.0**-54
# Counts beyond which Poisson distributions are taken for normal ones.
_MANY = 1e6


class Draws:
    """Numbers of which those of sample n depend on a seed and on n only.

    A counter-based generator (Philox; Salmon, Moraes, Dror & Shaw 2011) jumps to any
    sample. Numbers are drawn on the host in float64, so that they are the same on every
    device, and in every precision up to rounding.

    Args:
        seed: The seed.
        first: The number of the first sample, counted over all batches.

    Example:
        >>> whole = Draws(7).uniform(5, 3)
        >>> bool((Draws(7, first=2).uniform(3, 3) == whole[2:]).all())
        True
    """

    def __init__(self, seed: int, first: int = 0) -> None:
        self._seed, self._first = seed, first

    @classmethod
    def seeded_by(cls, generator: torch.Generator | None) -> Draws:
        """Take a seed from a generator on any device, by default torch's global one."""
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: a torch.Generator or None, got {generator!r}.")
        device = torch.device("cpu") if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
        return cls(int(seed))

    def starting_at(self, first: int) -> Draws:
        """The same numbers, from another sample on."""
        return Draws(self._seed, first)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in (0, 1) for the next samples, ``[n, …]``, float64 on the host."""
        width = math.prod(shape[1:])
        counts = -(-width // _PER_COUNT)
        bits = np.random.Philox(key=self._seed).advance(self._first * counts)
        numbers = np.random.Generator(bits).random((shape[0], _PER_COUNT * counts))
        return torch.from_numpy(numbers[:, :width] + _HALF).reshape(shape)

    def normal(self, *shape: int) -> Tensor:
        """Numbers from N(0, 1) for the next samples, likewise."""
        return torch.special.ndtri(self.uniform(*shape))


def categories(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw categories by the inverse of their distribution function.

    Args:
        probabilities: ``[…, C]``; they need not sum to 1.
        uniform: ``[…, M]``, in (0, 1).

    Returns:
        Numbers of categories, ``[…, M]``.
    """
    # In float64: float32 would lose rare ones among many thousands.
    total = probabilities.double().cumsum(-1)
    drawn = torch.searchsorted(total, uniform.to(total) * total[..., -1:], right=True)
    # Where the product is rounded up to the total: the last category that has mass.
    last = (total < total[..., -1:]).sum(-1, keepdim=True)
    return torch.minimum(drawn, last)


def counts(rate: Tensor, uniform: Tensor) -> Tensor:
    """Draw counts from Poisson distributions by the inverse distribution function.

    Beyond a rate of a million the distribution is the normal one of the same mean and
    variance, to its own 1e-3.

    Args:
        rate: The means, on the device of the result.
        uniform: In their shape, in (0, 1), on the host.
    """
    from scipy.stats import poisson  # imports half of SciPy

    mean = rate.detach().double().cpu()
    few = poisson.ppf(uniform.numpy(), mean.clamp(max=_MANY).numpy())
    many = mean + mean.sqrt() * torch.special.ndtri(uniform)
    return torch.where(mean < _MANY, torch.from_numpy(np.asarray(few)), many).to(rate)
