"""Which rows belong to which sample: of J, of Vᵀ, of blocks in output space."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vivit_linop.ranks.alone import Ranks


@dataclass(frozen=True)
class RowLayout:
    """Rows listed sample by sample; those of a batch have as many for each sample.

    Where all batches have w for each sample, row n·w + i is row i of sample n. Over
    several processes these are the rows of one, which follow those of the ones before.

    Attributes:
        samples: How many samples each batch has.
        each: How many rows each of them has.
        before: How many rows other processes have before these.
        overall: How many all have; None in one process.
        widths: How many rows samples have, of all processes.
        sizes: How many rows each batch has.
        starts: The first row of each batch.
        total: How many rows there are.
        width: How many rows a sample has, at most.
        is_uniform: Whether all samples have as many.
    """

    samples: tuple[int, ...]
    each: tuple[int, ...]
    before: int = 0
    overall: int | None = None
    widths: frozenset[int] = frozenset()
    sizes: list[int] = field(init=False, compare=False, repr=False)
    starts: list[int] = field(init=False, compare=False, repr=False)
    total: int = field(init=False, compare=False, repr=False)
    width: int = field(init=False, compare=False, repr=False)
    is_uniform: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = [*map(operator.mul, self.samples, self.each)]
        starts = [*itertools.accumulate(sizes, initial=0)]
        widths = self.widths or set(self.each)
        vars(self).update(
            sizes=sizes,
            starts=starts[:-1],
            total=starts[-1],
            width=max(widths, default=0),  # of no samples
            is_uniform=len(widths) == 1,
        )

    @classmethod
    def uniform(cls, samples: Sequence[int], width: int) -> RowLayout:
        """As many rows for all samples; without a batch, an empty one."""
        samples = tuple(samples) or (0,)
        return cls(samples, (width,) * len(samples))

    def over(self, ranks: Ranks) -> RowLayout:
        """Return it as a part of the rows of all ranks, which they exchange."""
        if not ranks.is_many:
            return self
        of_samples = frozenset(self.each) if any(self.samples) else frozenset()
        every = ranks.gathered((self.total, of_samples))
        sizes, widths = zip(*every, strict=True)
        before, union = sum(sizes[: ranks.rank]), frozenset().union(*widths)
        return replace(self, before=before, overall=sum(sizes), widths=union)

    def counted(self, ranks: Ranks) -> RowLayout:
        """Likewise where all samples are known to have as many, without an exchange."""
        if not ranks.is_many:
            return self
        before, overall = ranks.first * self.width, ranks.samples * self.width
        return replace(self, before=before, overall=overall)

    @property
    def own(self) -> slice:
        """Where its rows are among those of all processes."""
        return slice(self.before, self.before + self.total)

    def of_all(self, rows: Tensor) -> Tensor:
        """Return its rows of a matrix with those of all processes."""
        return rows if self.overall is None else rows[self.own]

    def among(self, num_samples: int) -> int:
        """How many rows there are, where these may be a part of all samples."""
        if self.overall is not None:
            return self.overall
        return num_samples * self.width if self.is_uniform else self.total

    def place(self, batch: int, samples: slice) -> slice:
        """The rows of some consecutive samples, which are numbered in their batch."""
        start, width = self.starts[batch], self.each[batch]
        return slice(start + samples.start * width, start + samples.stop * width)

    def of(self, samples: Tensor) -> Tensor:
        """The numbers of the rows of samples, which are numbered over all batches."""
        each, batches = (
            torch.tensor(x, device="cpu") for x in (self.each, self.samples)
        )
        widths = each.repeat_interleave(batches)
        own, ends = widths[samples], widths.cumsum(0)[samples]
        # Rows of one sample follow each other, in the matrix and among those taken.
        steps = (ends - own.cumsum(0)).repeat_interleave(own)
        return torch.arange(len(steps), device="cpu") + steps

    def summed(self, values: Tensor) -> Tensor:
        """Add up the rows of each of its samples, ``[rows of all, …] -> [n, …]``."""
        values = self.of_all(values)
        parts = zip(values.split(self.sizes), self.samples, self.each, strict=True)
        return torch.cat([part.unflatten(0, (n, w)).sum(1) for part, n, w in parts])
