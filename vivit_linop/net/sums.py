"""Sums over the columns of factors Jᵀ B: Gram matrices, outer products, row norms.

A Gram matrix is a sum over layers of products that need no column formed. If the
columns of all samples fit into memory in the structure of their layers, one pass over
the data is enough: a forward pass, and as many backward passes without weight
gradients as a sample has columns. Else those that fit are held, and the data are
passed over once more for each such part.

Where samples are spread over processes, each rank pairs the columns that it holds with
its own, and with those of half of the other ranks, which are made as they are needed
and go round. Of two ranks that are each other's, each takes half of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from torch import Tensor

from vivit_linop.modes import as_guest
from vivit_linop.net.column_passes import Pass
from vivit_linop.net.pieces import Cotangents, Piece, StoredColumns
from vivit_linop.net.totals import GramTotal, Rows, SampleGrams, Total, Weights
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.empirical import EmpiricalRisk

Use = Callable[[Piece, Piece], None]


def accumulate(
    factor: Cotangents, totals: Sequence[Total], stored: StoredColumns | None = None
) -> StoredColumns | None:
    """Compute several sums over the columns of one factor together.

    Args:
        factor: Jᵀ B.
        totals: What is summed.
        stored: The columns, if they are there already.

    Returns:
        All columns (of this process's samples), if they have been in memory together.
    """
    if factor.risk.ranks.is_many:
        return _accumulate_over_ranks(factor, totals)
    return accumulate_own(factor, totals, stored)


def accumulate_own(
    factor: Cotangents, totals: Sequence[Total], stored: StoredColumns | None = None
) -> StoredColumns | None:
    """Likewise over the columns of this process's samples only."""
    columns = Pass([factor], totals)
    stored = None if columns.takes == "factors" else stored
    with as_guest(factor.risk.device):
        if columns.takes != "pairs":
            for piece in stored.pieces if stored else _single(columns):
                for total in totals:
                    total.add(piece, piece)
            return None
        return _accumulate_pairs(columns, factor, totals, stored)


def _accumulate_over_ranks(
    factor: Cotangents, totals: Sequence[Total]
) -> StoredColumns | None:
    """Each process adds up its own samples; pairs go round."""
    ranks, columns = factor.risk.ranks, Pass([factor], totals)
    paired = [total for total in totals if total.takes == "pairs"]

    def single(piece: Piece, same: Piece) -> None:
        for total in totals:
            total.add(piece, same)

    def pair(left: Piece, right: Piece) -> None:
        for total in paired:
            total.add(left, right)

    held: list[Piece] = []
    with as_guest(factor.risk.device):
        if paired:
            held = pair_all(columns, ranks, single, pair)
        else:
            with ranks.together("sums over columns"):
                for piece in _single(columns):
                    single(piece, piece)
    for total in totals:
        total.finish(ranks)
    whole = held and columns.names == set(factor.risk.params)
    return StoredColumns(held) if whole else None


def _accumulate_pairs(
    columns: Pass,
    factor: Cotangents,
    totals: Sequence[Total],
    stored: StoredColumns | None,
) -> StoredColumns | None:
    """Hold as many pieces as fit; all others pass by, once for each such part."""
    paired = [total for total in totals if total.takes == "pairs"]
    whole: Iterable[list[list[Piece]]] = columns.held()
    if stored is not None:
        whole = [[[piece] for piece in stored.pieces]]
    for held in whole:
        for index, (left,) in enumerate(held):
            for total in totals:
                total.add(left, left)
            for (right,) in held[index + 1 :]:
                for total in paired:
                    total.add(left, right)
        end = held[-1][0].place.stop
        if end == factor.shape[1]:
            if held[0][0].place.start or columns.names != set(factor.risk.params):
                return None
            pieces = [*chain.from_iterable(held)]
            return stored or StoredColumns.kept_on(factor.risk.device, pieces)
        for (right,) in columns.pieces(held[-1][0].samples.stop):
            for (left,) in held:
                for total in paired:
                    total.add(left, right)
    return None


def formed_pieces(
    factor: Cotangents, stored: StoredColumns | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some columns at a time, formed: which they are, and ``[D, n·R]``.

    Args:
        factor: V.
        stored: The columns, if they are there already.
    """
    return factor.risk.ranks.in_turn(_own_formed_pieces(factor, stored))


def _own_formed_pieces(
    factor: Cotangents, stored: StoredColumns | None
) -> Iterator[tuple[slice, Tensor]]:
    whole = Rows(factor)
    made = iter(stored.pieces) if stored else _single(Pass([factor], [whole]))
    while True:
        # Left before the columns are given away.
        with as_guest(factor.risk.device):
            piece = next(made, None)
            if piece is None:
                return
            whole.add(piece, piece)
        yield piece.place, whole.rows.T


def _single(columns: Pass) -> Iterator[Piece]:
    for (piece,) in columns.pieces():
        yield piece


def own_gram_rows(left: Cotangents, right: Cotangents) -> Tensor:
    """Return (left columns)ᵀ (right columns) over processes, this one's rows."""
    return _gram_total(left, right, None).rows


def _gram_total(
    left: Cotangents, right: Cotangents, weights: Tensor | Weights | None
) -> GramTotal:
    """Return the Gram matrix, empty in one process, filled over several."""
    _check_same_parameters(left.risk, right.risk)
    ranks, names = left.risk.ranks, list(left.risk.params)
    with ranks.together("Gram matrix"):
        total = GramTotal(left, right, names, weights)
    if not ranks.is_many:
        return total
    if left is right:
        _accumulate_over_ranks(left, [total])
        return total
    with as_guest(left.risk.device):
        if right.risk.ranks.is_many:
            cross_all(Pass([left], [total]), Pass([right], [total]), ranks, total.add)
        else:  # each process has all of its samples
            with ranks.together("cross-Gram matrix"):
                _add_of_two_risks(total, left, right)
    total.finish(ranks)
    return total


def _add_of_two_risks(total: GramTotal, left: Cotangents, right: Cotangents) -> None:
    """Hold as many left columns as fit; the right ones pass by."""
    for held in Pass([left], [total]).held():
        for (b,) in Pass([right], [total]).pieces():
            for (a,) in held:
                total.add(a, b)


def cross_gram(
    left: Cotangents, right: Cotangents, weights: Tensor | Weights | None = None
) -> Tensor:
    """Return (left columns)ᵀ diag(w) (right columns) of two factors, ``[R, Q]``."""
    if right.risk.ranks.is_many and not left.risk.ranks.is_many:
        return cross_gram(right, left, weights).T
    total = _gram_total(left, right, weights)
    if left.risk.ranks.is_many:
        return total.matrix
    with as_guest(left.risk.device):
        if left.risk is right.risk:
            _add_of_one_risk(total, left, right)
        else:
            _add_of_two_risks(total, left, right)
    return total.matrix


def _add_of_one_risk(total: GramTotal, left: Cotangents, right: Cotangents) -> None:
    """Make the columns of both factors of a sample together."""
    columns = Pass([left, right], [total])
    for held in columns.held():
        for a, _ in held:
            for _, b in held:
                total.add(a, b)
        places = {(b.place.start, b.place.stop) for _, b in held}
        covered = sum(stop - start for start, stop in places)
        if covered == right.shape[1]:
            return
        # Cut alike, a piece is among those held or has no sample of them.
        for (b,) in columns.only(right).pieces():
            if not _inside(b.place, held):
                for a, _ in held:
                    total.add(a, b)


def cross_sample_grams(
    left: Cotangents, right: Cotangents, weights: Tensor | Weights | None = None
) -> Tensor:
    """Return the inner products of each sample's columns of two factors, ``[N, R, Q]``.

    Args:
        left: Jᵀ A.
        right: Jᵀ B of the same risk.
        weights: w, ``[D]``, between the columns, or None.
    """
    ranks = left.risk.ranks
    with ranks.together("Gram matrices of samples"), as_guest(left.risk.device):
        total = SampleGrams(left, right, weights)
        for a, b in Pass([left, right], [total]).pieces():
            total.add(a, b)
    total.finish(ranks)
    return total.matrices


def _inside(place: slice, held: Sequence[Sequence[Piece]]) -> bool:
    first, last = held[0][1].place.start, held[-1][1].place.stop
    return bool(first <= place.start and place.stop <= last)


def _check_same_parameters(left: EmpiricalRisk, right: EmpiricalRisk) -> None:
    if left is right:
        return
    shapes = [{n: tuple(p.shape) for n, p in r.params.items()} for r in (left, right)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        raise ValueError(
            "Factors of risks with different parameters have no cross-Gram matrix: "
            f"{shapes[0]} and {shapes[1]}."
        )


# Pairs of columns over processes -----------------------------------------------------


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
