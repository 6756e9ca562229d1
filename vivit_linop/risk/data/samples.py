"""Where the samples of an input are: how many there are, and some of them.

Samples are mostly along the first axis of each tensor. Hidden states of an RNN have
them along the second one, a mask may have none, bags and graphs lie one after the other
in one tensor (:mod:`vivit_linop.risk.data.segments`). Which it may be says
:mod:`vivit_linop.risk.data.sample_search`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from vivit_linop.risk.data.containers import (
    attribute,
    is_leaf,
    leaves,
    map_leaves,
    opened,
)

Take = Callable[[Any, Tensor], Any]
Count = Callable[[Any], int]

# Containers that know their samples -------------------------------------------------


def number_of(unit: Any) -> int | None:
    """Return how many samples a container has, None for one that does not know."""
    if isinstance(unit, Tensor):
        return int(unit.size(0)) if unit.is_nested else None
    if isinstance(unit, PackedSequence):
        return int(unit.batch_sizes[0])  # all are there at the first step
    if _is_graphs(unit):
        return int(unit.num_graphs)
    if _has_batch_size(unit):
        return int(unit.batch_size[0])
    # One graph alone is one sample, with all its nodes.
    return 1 if isinstance(attribute(unit, "stores"), list) else None


def some_of(unit: Any, index: Tensor) -> Any:
    """Return some samples of a container that knows its samples."""
    if isinstance(unit, Tensor):  # a nested one
        parts = unit.unbind()
        return _built(unit, [parts[i] for i in index.tolist()])
    if isinstance(unit, PackedSequence):
        sequences = unpack_sequence(unit)
        # Packed in the order of their lengths, they stay so.
        ordered = unit.sorted_indices is None and bool((index.diff() >= 0).all())
        some = [sequences[i] for i in index.tolist()]
        return pack_sequence(some, enforce_sorted=ordered)
    if _has_batch_size(unit):
        return unit[index]
    if not _is_graphs(unit):
        return unit
    return type(unit).from_data_list(unit.index_select(index))


def _built(like: Any, parts: list[Any]) -> Any:
    """A container of the same type with other parts."""
    found = opened(like)
    assert found is not None
    return found.build(parts)


def has_entries(value: Any) -> bool:
    """Whether it is a list or an array of something else than tensors, as of texts."""
    if isinstance(value, (list, tuple)):
        return bool(value) and next(leaves(value), None) is None
    return isinstance(value, np.ndarray) and value.ndim > 0


def _is_unit(value: Any) -> bool:
    return number_of(value) is not None or has_entries(value)


def units_of(X: Any) -> list[Any]:
    """The tensors of an input, containers that know their samples, and lists."""
    return list(leaves(X, _is_unit))


def _has_batch_size(unit: Any) -> bool:
    """Whether it is a dictionary of tensors with common axes, as a ``TensorDict``."""
    size = attribute(unit, "batch_size")
    return isinstance(size, torch.Size) and len(size) > 0


def _is_graphs(unit: Any) -> bool:
    """Whether it is a batch of graphs as those of torch_geometric."""
    names = ("num_graphs", "index_select", "from_data_list")
    return all(hasattr(type(unit), name) for name in names)


class Where:
    """Where samples are."""

    def number(self, X: Any) -> int | None:
        """Return how many there are, None if that is not to be seen."""
        return None

    def fits(self, X: Any, n: int) -> bool:
        """Whether n samples may be there."""
        return self.number(X) == n

    def joined(self, inputs: Sequence[Any]) -> Any:
        """Put samples of several inputs into one.

        Raises:
            NotImplementedError: If nobody knows how.
        """
        raise NotImplementedError


# Places of samples in one part of an input ------------------------------------------


class Place(Where, ABC):
    """Where they are in one tensor, or in a container that is one unit."""

    @abstractmethod
    def take(self, unit: Any, index: Tensor, n: int) -> Any:
        """Return some of the n samples."""


@dataclass(frozen=True)
class Axis(Place):
    """Along an axis of a tensor, one after the other."""

    axis: int

    def number(self, unit: Any) -> int | None:
        has_it = isinstance(unit, Tensor) and -unit.ndim <= self.axis < unit.ndim
        return int(unit.shape[self.axis]) if has_it else None

    def take(self, unit: Tensor, index: Tensor, n: int) -> Tensor:
        """Index the axis, also that of a sparse tensor, of any layout."""
        indexed = (torch.strided, torch.sparse_coo)
        plain = unit if unit.layout in indexed else unit.to_sparse()
        some = plain.index_select(self.axis, index.to(unit.device))
        return some if plain is unit else some.to_sparse(layout=unit.layout)

    def joined(self, units: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(units), dim=self.axis)


@dataclass(frozen=True)
class Blocks(Place):
    """Along the first axis, several rows for each sample: [N * heads, …]."""

    def fits(self, unit: Any, n: int) -> bool:
        return (
            isinstance(unit, Tensor)
            and unit.ndim > 0
            and len(unit) > n
            and len(unit) % n == 0
        )

    def take(self, unit: Tensor, index: Tensor, n: int) -> Tensor:
        rows = unit.unflatten(0, (n, -1))[index.to(unit.device)]
        return rows.flatten(0, 1)


@dataclass(frozen=True)
class Shared(Place):
    """Nowhere: it is the same for all samples."""

    def fits(self, unit: Any, n: int) -> bool:
        return True

    def take(self, unit: Any, index: Tensor, n: int) -> Any:
        return unit

    def joined(self, units: Sequence[Any]) -> Any:
        return units[0]


@dataclass(frozen=True)
class Counted(Place):
    """In a container that knows its samples."""

    def number(self, unit: Any) -> int | None:
        return number_of(unit)

    def take(self, unit: Any, index: Tensor, n: int) -> Any:
        return some_of(unit, index)


@dataclass(frozen=True)
class Entries(Place):
    """In a list or an array of something else than tensors: an entry for each."""

    def number(self, unit: Any) -> int | None:
        return len(unit) if has_entries(unit) else None

    def take(self, unit: Any, index: Tensor, n: int) -> Any:
        if isinstance(unit, np.ndarray):
            return unit[index.numpy()]
        return type(unit)(unit[i] for i in index.tolist())

    def joined(self, units: Sequence[Any]) -> Any:
        if isinstance(units[0], np.ndarray):
            return np.concatenate(units)
        return type(units[0])(entry for unit in units for entry in unit)


# Samples of an input ----------------------------------------------------------------


class Samples(Where, ABC):
    """Where they are in the inputs of a risk."""

    @abstractmethod
    def number(self, X: Any) -> int:
        """Return how many samples an input has."""

    @abstractmethod
    def take(self, X: Any, index: Tensor) -> Any:
        """Return some samples of an input, ``index`` a vector on the host."""

    def axes(self, X: Any) -> list[int | None] | None:
        """Return the axis of samples in each tensor, None where that does not do."""
        return None


class ByUnit(Samples):
    """A place in each unit: in each tensor, and in containers that are one."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)

    def fits(self, X: Any, n: int) -> bool:
        """Whether each unit may have n samples, and one of them has."""
        units = units_of(X)
        return len(units) == len(self.places) and all(
            place.fits(unit, n) for place, unit in zip(self.places, units, strict=True)
        )

    def number(self, X: Any) -> int:
        """By the first unit that has samples."""
        for place, unit in zip(self.places, units_of(X), strict=True):
            if (n := place.number(unit)) is not None:
                return n
        raise ValueError("no part of the input has a sample axis.")

    def take(self, X: Any, index: Tensor) -> Any:
        n, places = self.number(X), iter(self.places)
        return map_leaves(lambda unit: next(places).take(unit, index, n), X, _is_unit)

    def joined(self, inputs: Sequence[Any]) -> Any:
        places = iter(self.places)
        parts = zip(*(units_of(X) for X in inputs), strict=True)
        joined = iter([next(places).joined(units) for units in parts])
        return map_leaves(lambda _: next(joined), inputs[0], _is_unit)

    def axes(self, X: Any) -> list[int | None] | None:
        """Those of the places, if all are axes or shared."""
        if not all(isinstance(place, (Axis, Shared)) for place in self.places):
            return None
        pairs = zip(self.places, units_of(X), strict=True)
        return [
            place.axis if isinstance(place, Axis) else None
            for place, unit in pairs
            if is_leaf(unit)
        ]


class Listing(Samples):
    """In a list: images of several sizes, one for each sample."""

    def fits(self, X: Any, n: int) -> bool:
        return isinstance(X, (list, tuple)) and len(X) == n

    def number(self, X: Any) -> int:
        return len(X)

    def take(self, X: Any, index: Tensor) -> Any:
        return _built(X, [X[i] for i in index.tolist()])

    def joined(self, inputs: Sequence[Any]) -> Any:
        return _built(inputs[0], [part for X in inputs for part in X])


class Given(Samples):
    """Where the user says they are, by what takes some and what counts them."""

    def __init__(self, take: Take, count: Count) -> None:
        self._take, self._count = take, count

    def number(self, X: Any) -> int:
        return self._count(X)

    def take(self, X: Any, index: Tensor) -> Any:
        return self._take(X, index)
