"""Pairs of columns of all samples, where the samples are spread over processes.

Each rank pairs the columns that it holds with its own, and with those of half of the
other ranks, which are made as they are needed and go round. Of two ranks that are each
other's, each takes half of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vivit_linop.net.pieces import Pass, Piece
from vivit_linop.ranks.alone import Ranks

Use = Callable[[Piece, Piece], None]


def pair_all(columns: Pass, ranks: Ranks, single: Use, pair: Use) -> list[Piece]:
    """Pair the columns of one factor with each other, each pair on one rank.

    Args:
        columns: The columns of this rank's samples.
        ranks: The ranks.
        single: What to do with each piece and itself.
        pair: What to do with two different pieces, the first of this rank.

    Returns:
        The pieces of this rank, if it has held all of them together; else none.
    """
    whole = False
    held: list[Piece] = []
    for held in _held(columns, ranks):
        end = held[-1].samples.stop if held else 0
        whole = bool(held) and (held[0].samples.start, end) == columns.samples
        with ranks.together("columns of this rank"):
            for index, left in enumerate(held):
                single(left, left)
                for right in held[index + 1 :]:
                    pair(left, right)
            if held and not whole:
                for (right,) in columns.pieces(end):
                    for left in held:
                        pair(left, right)
        for distance in range(1, ranks.size // 2 + 1):
            use = _with_half(held, ranks, distance, pair)
            ranks.shifted(iter(held) if whole else _each(columns), distance, use)
    return held if whole else []


def _with_half(
    held: list[Piece], ranks: Ranks, distance: int, pair: Use
) -> Callable[[Piece], None]:
    """Pair what is held with a piece of another rank, unless that rank does it."""
    opposite = 2 * distance == ranks.size
    upper = opposite and ranks.rank >= distance

    def use(right: Piece) -> None:
        for left in held:
            # The pieces of the lower one of two opposite ranks decide.
            decides = right if upper else left
            if not opposite or decides.number % 2 == int(upper):
                pair(left, right)

    return use


def cross_all(left: Pass, right: Pass, ranks: Ranks, pair: Use) -> None:
    """Pair this rank's columns of one factor with those of another of all ranks."""
    for held in _held(left, ranks):

        def use(b: Piece, held: list[Piece] = held) -> None:
            for a in held:
                pair(a, b)

        for distance in range(ranks.size):
            ranks.shifted(_each(right), distance, use)


def _held(columns: Pass, ranks: Ranks) -> Iterator[list[Piece]]:
    """Yield what fits into memory together, nothing where other ranks have more."""
    parts = columns.held()
    while True:
        with ranks.together("columns held") as ballot:
            held = [piece for (piece,) in next(parts, [])]
            ballot.flag = bool(held)
        if not ballot.flag:
            return
        yield held


def _each(columns: Pass) -> Iterator[Piece]:
    return (piece for (piece,) in columns.pieces())
