"""Columns of parts of a parameter, one above the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from vivit_linop.net.columns.base import (
    ColumnCost,
    DenseColumns,
    LayerColumns,
    add_product,
)

Place = tuple[int, int]


class StackedColumns(LayerColumns):
    """Columns of disjoint parts of a parameter, one above the other.

    Args:
        parts: By the entries of the flattened parameter that they are for, the columns
            of each part. Entries in none of them are zero.
        numel: The number of entries of the parameter.
    """

    def __init__(self, parts: dict[Place, LayerColumns], numel: int) -> None:
        first = next(iter(parts.values()))
        self.num_samples, self.width = first.num_samples, first.width
        self.cotangents_key = object()
        self.parts, self.numel = parts, numel

    @property
    def nbytes(self) -> int:
        return sum(columns.nbytes for columns in self.parts.values())

    def without_data(self) -> Self:
        twin = super().without_data()
        twin.parts = {place: part.without_data() for place, part in self.parts.items()}
        return twin

    def cost(self, samples: int, width: int, shared: bool) -> ColumnCost:
        ways, *counts = zip(
            *(part.cost(samples, width, shared) for part in self.parts.values()),
            strict=True,
        )
        return ColumnCost(" + ".join(dict.fromkeys(ways)), *map(sum, counts))

    def compacted(self) -> StackedColumns:
        parts = {place: part.compacted() for place, part in self.parts.items()}
        if all(parts[place] is part for place, part in self.parts.items()):
            return self
        return StackedColumns(parts, self.numel)

    def _of_parts(self, of: Callable[[LayerColumns], Tensor]) -> Tensor:
        """Put together what each part has for its entries, along the last axis."""
        return placed(((at, of(part)) for at, part in self.parts.items()), self.numel)

    def rows(self) -> Tensor:
        return self._of_parts(lambda part: part.rows())

    def squared_norms(self, memory: int) -> Tensor:
        norms = [part.squared_norms(memory) for part in self.parts.values()]
        return torch.stack(norms).sum(0)

    def sample_grams(self, other: LayerColumns, memory: int) -> Tensor:
        theirs = other.parts if isinstance(other, StackedColumns) else {}
        if theirs.keys() != self.parts.keys():
            return super().sample_grams(other, memory)
        parts = self.parts.items()
        grams = [part.sample_grams(theirs[at], memory) for at, part in parts]
        return torch.stack(grams).sum(0)

    def entry_squares(self, memory: int) -> Tensor:
        return self._of_parts(lambda part: part.entry_squares(memory))

    def sample_entry_squares(self, memory: int) -> Tensor:
        return self._of_parts(lambda part: part.sample_entry_squares(memory))

    def entry_sums(self) -> Tensor:
        return self._of_parts(lambda part: part.entry_sums())

    def signals(self, weights: Tensor) -> Tensor:
        """The weights themselves: each part has its own cotangents."""
        return weights

    def combine(self, signals: Tensor, out: Tensor, add: bool) -> None:
        if not add:
            out.zero_()
        for (start, stop), columns in self.parts.items():
            columns.combine(columns.signals(signals), out[:, start:stop], add)

    def sizes(self) -> Tensor:
        return torch.stack([part.sizes() for part in self.parts.values()]).norm(dim=0)

    def combination(self, weights: Tensor) -> Tensor:
        return self._of_parts(lambda part: part.combination(weights))

    def residual(self, weights: Tensor, expected: Tensor) -> Tensor:
        rest, parts = expected.clone(), []
        for (start, stop), columns in self.parts.items():
            parts.append(columns.residual(weights, expected[start:stop]))
            rest[start:stop] = 0.0
        return torch.cat([*parts, rest])

    def images(self, rows: Tensor) -> Tensor:
        """The components already, part by part."""
        total = rows.new_zeros(len(rows), self.num_samples, self.width)
        for (start, stop), columns in self.parts.items():
            total += columns.components(columns.images(rows[:, start:stop]))
        return total

    def components(self, images: Tensor) -> Tensor:
        return images

    def add_gram(self, gram: Tensor, other: LayerColumns, memory: int) -> None:
        theirs = other.parts if isinstance(other, StackedColumns) else {}
        if theirs.keys() == self.parts.keys():
            for place, columns in self.parts.items():
                columns.add_gram(gram, theirs[place], memory)
        else:
            add_product(gram, self.rows(), other.rows(), False)


def assembled(uses: Sequence[tuple[Place, LayerColumns]], numel: int) -> LayerColumns:
    """Add up the columns of the uses of one parameter, each of the entries it uses."""
    by_place: dict[Place, list[LayerColumns]] = {}
    for place, columns in uses:
        by_place.setdefault(place, []).append(columns)
    parts: dict[Place, LayerColumns] = {}
    for place, (columns, *others) in sorted(by_place.items()):
        parts[place] = columns.joined(others) if others else columns
    if [*parts] == [(0, numel)]:
        return parts[0, numel]
    ends = pairwise(parts)
    if all(left[1] <= right[0] for left, right in ends):
        return StackedColumns(parts, numel)
    first = next(iter(parts.values()))
    rows = placed(((place, part.rows()) for place, part in parts.items()), numel)
    return DenseColumns(rows.view(first.num_samples, first.width, numel))


def placed(parts: Iterable[tuple[Place, Tensor]], numel: int) -> Tensor:
    """Add up what parts of the parameter have, along the last axis, for the whole."""
    whole: Tensor | None = None
    for (start, stop), part in parts:
        if whole is None:
            whole = part.new_zeros(*part.shape[:-1], numel)
        whole[..., start:stop] += part
    assert whole is not None
    return whole
