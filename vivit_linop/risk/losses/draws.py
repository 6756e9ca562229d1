"""Random numbers that belong to samples, however the data are cut into batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivit_linop.arguments import check_generator
from vivit_linop.modes import as_guest, replayed, seeded
from vivit_linop.risk.data.containers import leaves

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
        check_generator(generator)
        device = torch.device("cpu") if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
        return cls(int(seed))

    def starting_at(self, first: int) -> Draws:
        """The same numbers, from another sample on."""
        return Draws(self._seed, first)

    def another(self, number: int) -> Draws:
        """Others for the same samples, independent of these; these themselves for 0."""
        # The key has 128 bits, of which a seed takes half.
        return Draws(self._seed + (number << 64), self._first)

    def for_each(self, times: int, start: int = 0) -> Draws:
        """Numbers for so many labels of each sample, from sample ``start`` on."""
        return Draws(self._seed, (self._first + start) * times)

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


class LabelDraws:
    """Random numbers for labels of the samples of a batch.

    Each call has new ones, for n samples along the first axis. Those of a sample depend
    on its number among all samples, on the seed and on what was called before: not on
    batches, nor on the device.

    Args:
        draws: Where they come from.

    Example:
        >>> source = LabelDraws(Draws(7))
        >>> source.normal(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
        >>> source.categories(torch.tensor([[0.0, 1.0]])), source.counts(torch.zeros(1))
        (tensor([1]), tensor([0.]))
    """

    def __init__(self, draws: Draws) -> None:
        self._draws, self._next = draws, 0

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in (0, 1), in the shape and dtype of a tensor ``[n, …]``.

        ``draws.uniform(p) < p`` has labels of a Bernoulli distribution.
        """
        return self._uniform(*like.shape).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Numbers from N(0, 1), likewise."""
        return torch.special.ndtri(self._uniform(*like.shape)).to(like)

    def categories(self, probabilities: Tensor) -> Tensor:
        """Classes, ``[n, …]`` for probabilities ``[n, …, C]``, int64.

        Classes are the last axis; probabilities need not sum to 1.
        """
        uniform = self._uniform(*probabilities.shape[:-1], 1)
        return categories(probabilities.detach(), uniform).squeeze(-1)

    def counts(self, rate: Tensor) -> Tensor:
        """Counts of Poisson distributions, in the shape and dtype of the rates."""
        return counts(rate, self._uniform(*rate.shape))

    def _uniform(self, *shape: int) -> Tensor:
        source, self._next = self._draws.another(self._next), self._next + 1
        return source.uniform(*shape)

    def drawn(self, function: Callable[..., Any], output: Any, target: Any) -> Any:
        """Return what a function draws, who may use torch's own generator too."""
        seed = int(self._uniform(1).mul(2**62))
        device = next(leaves(output)).device
        with as_guest(device), replayed(seeded(seed, device), device), torch.no_grad():
            return function(output, target, self)


def categories(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw categories, ``[…, M]``, by the inverse of their distribution function.

    Of probabilities ``[…, C]``, which need not sum to 1, and uniform numbers in (0, 1).
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
    variance, to its own 1e-3. Uniform numbers are on the host.
    """
    from scipy.stats import poisson  # imports half of SciPy

    mean = rate.detach().double().cpu()
    few = poisson.ppf(uniform.numpy(), mean.clamp(max=_MANY).numpy())
    many = mean + mean.sqrt() * torch.special.ndtri(uniform)
    return torch.where(mean < _MANY, torch.from_numpy(np.asarray(few)), many).to(rate)
