"""Which parts of an input have samples, and where: what is possible, and what is so.

The shapes of all batches leave a few ways. Of these the model, which must treat samples
independently, is asked (:mod:`vivit_linop.risk.independence`). Where nothing fits, the
user says where samples are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from vivit_linop.arguments import check_function
from vivit_linop.devices import is_out_of_memory
from vivit_linop.risk.data.batches import numbers_of
from vivit_linop.risk.data.containers import described, is_leaf, leaves, opened
from vivit_linop.risk.data.samples import (
    Axis,
    Blocks,
    ByUnit,
    Count,
    Counted,
    Entries,
    Given,
    Listing,
    Place,
    Samples,
    Shared,
    Take,
    number_of,
    units_of,
)
from vivit_linop.risk.data.segments import Bags, Graphs

# How many ways are tried of those that may be.
_MOST_WAYS = 16
# Where all units have samples so, they are nowhere else.
_CERTAIN = (Axis(0), Counted())


class Search:
    """Where the samples of all inputs may be, by what has been seen of these.

    Args:
        sample_axis: The axis of samples, if the user says it: an integer, or a tree
            like X of integers and None.
        take: ``(X, index) -> X``, which takes some samples, if the user says it so.
        count: ``X -> n``, which counts them.

    Attributes:
        ways: Where they may be, the likeliest first.

    Raises:
        TypeError: If these are of wrong types, or contradict each other.
    """

    def __init__(
        self,
        sample_axis: Any = None,
        take: Take | None = None,
        count: Count | None = None,
    ) -> None:
        for name, function in (("take", take), ("count", count)):
            if function is not None:
                check_function(function, name)
        if (take is None) != (count is None):
            raise TypeError(
                "take, count: give both, take(X, index) -> some samples of an input "
                "and count(X) -> their number, or none."
            )
        if take is not None and sample_axis is not None:
            raise TypeError("sample_axis: with take and count it is not needed.")
        self._axis, self.ways = sample_axis, list[Samples]()
        self._given: Samples | None = None
        if take is not None and count is not None:
            self._given = Given(take, count)
            self.ways = [self._given]

    @classmethod
    def known(cls, samples: Samples) -> Search:
        """One that is over."""
        search = cls()
        search._given, search.ways = samples, [samples]
        return search

    @property
    def samples(self) -> Samples:
        """The likeliest way."""
        return self.ways[0]

    def number(self, index: int, X: Any, y: Any) -> int:
        """Return how many samples a batch has, and learn from it where they may be.

        Raises:
            ValueError: If nobody knows, or it is none.
        """
        if self._axis is not None and not self.ways:
            self._given = chosen_by_user(self._axis, X)
            self.ways = [self._given]
        if self._given is not None:
            return self._number_by_user(self._given, index, X)
        numbers = _numbers_by_input(X) or numbers_of(y, index)
        if listed := _are_listed(X, y):
            numbers = [len(y), *numbers]
        # Nodes are no samples: edges are there to mix them.
        graphs = [n for n, nodes in _numbers_of_graphs(X) if nodes in numbers]
        for n in dict.fromkeys([*graphs, *numbers]):
            if index == 0:
                fitting = ways_of(X, n)
                fitting.sort(key=lambda way: listed and not isinstance(way, Listing))
            else:
                fitting = [way for way in self.ways if way.fits(X, n)]
            if fitting:
                self.ways = fitting
                return n
        raise ValueError(
            f"data: batch {index} has {numbers[0]} samples in y and "
            f"{sorted({len(t) for t in leaves(X) if t.ndim})} in X ({described(X)}); "
            "the first axis of both must count samples. Where they are somewhere else "
            "say so: sample_axis= an integer, or a tree like X of integers and None; "
            "or take=(X, index) -> some of them and count=X -> their number."
        )

    @contextlib.contextmanager
    def agreeing(self, index: int, n: int, y: Any) -> Iterator[None]:
        """Say what may be wrong where a batch fails whose samples the user has counted.

        Targets need not be as many: they may be of items, such as the nodes of graphs.
        """
        try:
            yield
        except (IndexError, RuntimeError) as error:
            lengths = sorted({len(t) for t in leaves(y) if t.ndim})
            by_user = self._axis is not None or isinstance(self._given, Given)
            if not by_user or n in lengths or is_out_of_memory(error):
                raise
            name = "sample_axis" if self._axis is not None else "count"
            raise ValueError(
                f"{name}: finds {n} samples in batch {index}, whose targets have "
                f"{lengths} along the first axis, and neither samples nor their items "
                f"can be told apart ({type(error).__name__}: {error})."
            ) from error

    def _number_by_user(self, samples: Samples, index: int, X: Any) -> int:
        found = "data" if self._axis is None else "sample_axis"  # in other data
        name = "count" if isinstance(samples, Given) else found
        n = samples.number(X)
        if isinstance(n, bool) or not hasattr(n, "__index__") or int(n) < 1:
            raise ValueError(
                f"{name}: finds {n!r} samples in batch {index}; a batch has one at "
                "least."
            )
        if not samples.fits(X, int(n)):
            raise ValueError(
                f"{name}: batch {index} has not {n} samples in all tensors of X "
                f"({described(X)}) that are said to have some."
            )
        return int(n)


def number_without_targets(X: Any, sample_axis: Any = None) -> int | None:
    """Return how many samples an input has if it shows that itself."""
    if sample_axis is not None:
        return chosen_by_user(sample_axis, X).number(X)
    if found := _numbers_by_input(X):
        return found[0]
    for n, _ in _numbers_of_graphs(X):
        return n
    for at, tensor in enumerate(leaves(X)):
        if tensor.ndim == 1 and Bags(at, False).fits(X, len(tensor)):
            return len(tensor)
    return None


def _are_listed(X: Any, y: Any) -> bool:
    """Whether inputs and targets are lists with a part for each sample.

    Else they are lists of tensors that all number samples.
    """
    lists = (list, tuple)
    if not (isinstance(X, lists) and isinstance(y, lists) and len(X) == len(y)):
        return False
    return len({len(leaf) if leaf.ndim else -1 for leaf in leaves((X, y))}) > 1


def _numbers_by_input(X: Any) -> list[int]:
    """What containers say that know their samples."""
    found = (number_of(unit) for unit in units_of(X))
    return [n for n in found if n is not None]


def _numbers_of_graphs(X: Any) -> Iterator[tuple[int, int]]:
    """How many graphs there may be, and how many nodes these have."""
    for way in Graphs.possible(X):
        n, nodes = way.number(X), way.nodes(X)
        if n < nodes and way.fits(X, n):
            yield n, nodes


def ways_of(X: Any, n: int) -> list[Samples]:
    """Return where n samples of an input may be, the likeliest first."""
    units = units_of(X)
    places = [list(_places(unit, n)) for unit in units]
    ways: list[Samples] = []
    likeliest = [options[0] for options in places]
    plain = [place for place in likeliest if place in _CERTAIN]
    if units and len(plain) == len(units):
        ways.append(ByUnit(likeliest))
    tensors = list(leaves(X))
    for at, tensor in enumerate(tensors):
        if tensor.ndim == 1 and len(tensors) > 1 and not tensor.is_floating_point():
            bags = (Bags(at, False), Bags(at, True))
            ways += [way for way in bags if way.fits(X, n)]
    ways += [way for way in Graphs.possible(X) if way.fits(X, n)]
    if isinstance(X, (list, tuple)) and Listing().fits(X, n):
        ways.append(Listing())
    for chosen in itertools.islice(itertools.product(*places), _MOST_WAYS):
        # Someone must have samples of its own.
        if any(isinstance(place, (Axis, Counted, Entries)) for place in chosen):
            if not ways or list(chosen) != plain:
                ways.append(ByUnit(chosen))
    return ways


def _places(unit: Any, n: int) -> Iterator[Place]:
    """Yield where n samples may be in a unit, the likeliest first."""
    for place in (Counted(), Entries()):
        if place.fits(unit, n):
            yield place
    if is_leaf(unit):
        for axis in range(unit.ndim):
            if unit.shape[axis] == n:
                yield Axis(axis)
        if n > 1 and Blocks().fits(unit, n):
            yield Blocks()
    yield Shared()


def chosen_by_user(sample_axis: Any, X: Any) -> ByUnit:
    """Return the places that ``sample_axis`` says: an integer, or a tree like X.

    Args:
        sample_axis: Integers, and None for what is the same for all samples. One at
            the place of a container is that of all its tensors.
        X: The input.
    """
    return ByUnit(list(_chosen(sample_axis, X, "")))


def _chosen(axis: Any, X: Any, name: str) -> Iterator[Place]:
    """Yield a place for each unit of X."""
    if isinstance(axis, bool) or not (axis is None or isinstance(axis, int)):
        yield from _chosen_parts(axis, X, name)
        return
    for unit in units_of(X):
        if axis is None:
            yield Shared()
            continue
        if not is_leaf(unit):
            yield Counted() if number_of(unit) is not None else Entries()
            continue
        if not -unit.ndim <= axis < unit.ndim:
            raise ValueError(
                f"sample_axis: is {axis} for X{name}, where there is a tensor "
                f"{list(unit.shape)}; give None for what is the same for all "
                "samples."
            )
        yield Axis(axis)


def _chosen_parts(axes: Any, X: Any, name: str) -> Iterator[Place]:
    given, found = opened(axes), opened(X)
    if given is None:
        raise TypeError(
            "sample_axis: an integer, None, or a tree like X of these, got "
            f"{axes!r} for X{name}."
        )
    if found is None or set(given.names) != set(found.names):
        raise ValueError(
            f"sample_axis: has the parts {list(given.names)} for X{name}, which has "
            f"{list(found.names) if found else 'none'}."
        )
    by_name = dict(zip(given.names, given.parts, strict=True))
    for key, part in zip(found.names, found.parts, strict=True):
        yield from _chosen(by_name[key], part, f"{name}[{key!r}]")
