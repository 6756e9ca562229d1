"""The seam between what a process computes and what all processes know.

Each process of a group, a *rank*, has the whole model and a part of the samples. Every
operator is the matrix of all samples, and every rank has the same vectors. So what is
summed over samples is summed over ranks, and what is listed by sample is listed rank by
rank. An operator says which of the two, and computes the part of its own samples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Ballot:
    """What a rank says in a vote, and what came of it.

    Attributes:
        flag: Afterwards, whether any rank had set it.
        rows: How many rows it has to give.
        given: What must be the same on all ranks, beside what was known before.
        heights: Afterwards, how many each rank has.
    """

    def __init__(self) -> None:
        self.flag, self.rows, self.heights = False, 0, list[int]()
        self.given: tuple[Tensor, ...] = ()


class Ranks:
    """One process: its part is the whole.

    Attributes:
        size: How many processes there are.
        is_many: Whether there are several.
        are_many: Whether there are several for any risk of this process.
        rank: Which one this is.
        first: The number of its first sample.
        counts: How many samples each has, where there are several.
    """

    size, rank, first = 1, 0, 0
    is_many = are_many = False
    counts: Sequence[int] = ()

    def __str__(self) -> str:
        """What a risk says of it: nothing."""
        return ""

    def on(self, device: torch.device) -> Ranks:
        """Return the same ranks, exchanging tensors on a device."""
        return self

    def counted(self, counts: Sequence[int]) -> Ranks:
        """Return the same ranks for a risk of whose samples each has so many."""
        return self

    # Called in C: of a product in one process a profile shows no trace of ranks.

    summed: Callable[..., Tensor] = operator.call
    """``summed(local, *inputs)``: add up what ranks compute of inputs that all have.

    The sum ``[D, …]`` is the same on all ranks, to the bit.
    """

    listed: Callable[..., Tensor] = operator.call
    """``listed(local, *inputs)``: put the rows that ranks compute below each other."""

    led: Callable[..., Any] = operator.call
    """``led(compute, *inputs)``: let one rank compute, and give its result to all.

    For whatever the bits of a matrix do not decide: eigenvectors, a route.
    """

    def agreed(self, X: Tensor) -> Tensor:
        """Return a vector that all must have; where they round, the leader's."""
        return X

    def sent(self, item: Any) -> Any:
        """Return on all ranks what the leader has."""
        return item

    def to_leader(self, rows: Tensor) -> Tensor | None:
        """Return the rows of all samples on the leader, None on other ranks."""
        return rows

    def in_turn(self, items: Iterator[Result]) -> Iterator[Result]:
        """Yield what each rank yields, one rank after the other."""
        return items

    @property
    def leads(self) -> bool:
        """Whether it is this rank that leads."""
        return True

    def total(self, part: Tensor) -> Tensor:
        """Add up what ranks have in place of it."""
        return part

    @property
    def samples(self) -> int:
        """How many samples all ranks have."""
        return sum(self.counts)

    def owner(self, sample: int) -> int:
        """Which rank has a sample."""
        return 0

    def shifted(
        self, items: Iterator[Result], distance: int, use: Callable[[Result], None]
    ) -> None:
        """Use what this rank + distance iterates over, objects with tensors in them."""
        for item in items:
            use(item)

    def swapped(self, item: Result, distance: int) -> Result:
        """Send an object to this rank + distance, and return what is sent to this."""
        return item

    def gathered(self, item: Result) -> Sequence[Result]:
        """Return what each rank gives, in their order."""
        return [item]

    def together(self, what: str, *inputs: Tensor) -> AbstractContextManager[Ballot]:
        """Do what all ranks do at the same time, each for itself; then vote.

        An error on one of them is then an error on all of them. All do the same with
        the same inputs.
        """
        return nullcontext(Ballot())

    def called(self, what: str) -> AbstractContextManager[object]:
        """Do what may have exchanges inside; an error is then one of all ranks, too."""
        return nullcontext()


ALONE = Ranks()
"""The one that has all samples."""


class RankRows:
    """A matrix ``[N·R, Q]`` over the ranks, of which ``own`` are this one's rows."""

    def __init__(self, ranks: Ranks, own: Tensor, first: int) -> None:
        self._ranks, self.own, self._first = ranks, own, first

    def whole(self) -> Tensor:
        """Return the matrix on all ranks."""
        return self._ranks.listed(lambda: self.own)

    def on_leader(self) -> Tensor | None:
        """Return the matrix on the rank that leads, None on the others."""
        return self._ranks.to_leader(self.own)

    def norm(self) -> float:
        """Return the Frobenius norm of the matrix."""
        squares = self._ranks.total(self.own.square().sum()[None])
        return squares.sqrt().item()

    def multiply(self, X: Tensor) -> Tensor:
        """Return its product with a matrix that all ranks have, ``[N·R, K]``."""
        return self._ranks.listed(lambda X: self.own @ X, X)

    def multiply_adjoint(self, X: Tensor) -> Tensor:
        """Return its adjoint's product, ``[Q, K]``."""
        place = slice(self._first, self._first + len(self.own))
        return self._ranks.summed(lambda X: self.own.T @ X[place], X)
