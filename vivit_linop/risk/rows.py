"""Which rows belong to which sample: of J, of Vᵀ, of blocks in output space."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """Rows listed sample by sample; those of a batch have as many for each sample.

    Where all batches have w for each sample, row n·w + i is row i of sample n.

    Attributes:
        samples: How many samples each batch has.
        each: How many rows each of them has.
    """

    samples: tuple[int, ...]
    each: tuple[int, ...]

    @classmethod
    def uniform(cls, samples: Sequence[int], width: int) -> RowLayout:
        """As many rows for all samples; without a batch, an empty one."""
        samples = tuple(samples) or (0,)
        return cls(samples, (width,) * len(samples))

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each batch has."""
        return [n * w for n, w in zip(self.samples, self.each, strict=True)]

    @cached_property
    def total(self) -> int:
        """How many there are."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each batch."""
        return list(itertools.accumulate(self.sizes, initial=0))[:-1]

    @cached_property
    def width(self) -> int:
        """How many rows a sample has, at most."""
        return max(self.each)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all samples have as many."""
        return len(set(self.each)) == 1

    def among(self, num_samples: int) -> int:
        """How many rows there are, where these may be a part of all samples.

        Args:
            num_samples: All of them.
        """
        return num_samples * self.width if self.is_uniform else self.total

    def place(self, batch: int, samples: slice) -> slice:
        """The rows of some consecutive samples, which are numbered in their batch."""
        start, width = self.starts[batch], self.each[batch]
        return slice(start + samples.start * width, start + samples.stop * width)

    def of(self, samples: Tensor) -> Tensor:
        """The numbers of the rows of some samples, which are numbered over all batches.

        Args:
            samples: On the host.
        """
        each, batches = (
            torch.tensor(x, device="cpu") for x in (self.each, self.samples)
        )
        widths = each.repeat_interleave(batches)
        ends = widths.cumsum(0).tolist()
        return torch.cat(
            [
                torch.arange(ends[i] - int(widths[i]), ends[i], device="cpu")
                for i in samples.tolist()
            ]
        )

    def summed(self, values: Tensor) -> Tensor:
        """Add up the rows of each sample, ``[rows, …] -> [N, …]``."""
        parts = zip(values.split(self.sizes), self.samples, self.each, strict=True)
        return torch.cat([part.unflatten(0, (n, w)).sum(1) for part, n, w in parts])
