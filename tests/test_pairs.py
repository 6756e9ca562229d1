"""Chosen combinations of parameters have what they promise."""

import itertools

import pytest

from tests.pairs import in_turn, pairwise


@pytest.mark.parametrize(
    "sizes", [(2, 3), (4, 3, 2), (6, 4, 3, 2), (1, 5, 5), (3, 3, 3)]
)
def test_any_two_values_meet(sizes: tuple[int, ...]) -> None:
    rows = pairwise(*map(range, sizes))
    for (i, first), (j, second) in itertools.combinations(enumerate(sizes), 2):
        met = {(row[i], row[j]) for row in rows}
        assert met == set(itertools.product(range(first), range(second)))
    assert (
        len(set(rows))
        == len(rows)
        <= max(
            sizes[i] * sizes[j] for i, j in itertools.combinations(range(len(sizes)), 2)
        )
        + max(sizes)
    )


def test_values_take_turns() -> None:
    assert in_turn("abc", [1, 2]) == [("a", 1), ("b", 2), ("c", 1)]
