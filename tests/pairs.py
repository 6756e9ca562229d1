"""Few of all combinations of parameters, chosen so that each two values still meet."""

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations in which any two values of two axes stand together at least once.

    A fault of one value is seen, and so is one of two values together; only what takes
    three of them may be missed. The first combination that brings most is taken, so
    that the choice is always the same.
    """
    values = [list(axis) for axis in axes]
    rows = list(itertools.product(*(range(len(axis)) for axis in values)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        row = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[row]
        chosen.append(tuple(axis[i] for axis, i in zip(values, row, strict=True)))
    return chosen


def in_turn(first: Iterable[Any], *others: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Each value of the first axis once, with the next values of the others.

    Of what the values of an axis have to do with each other nothing is seen: for axes
    that are parts of different code.
    """
    cycles = [itertools.cycle(axis) for axis in others]
    return list(zip(first, *cycles, strict=False))
