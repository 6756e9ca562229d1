"""Passes over the data that make the columns of V = Jᵀ B, and sums over all of them.

A batch is cut so that the columns of each part fit into memory, however they are taken
(:class:`~vivit_linop.net.totals.Total`): those of other parts are made when it has been
added up, or beside those that are held. If the columns of all samples fit in the
structure of their layers, one pass is enough: a forward pass, and as many backward
passes without weight gradients as a sample has columns. Else pairs take one more for
each part that is held.

Where samples are spread over processes, each rank pairs the columns that it holds with
its own, and with those of half of the other ranks, which are made as they are needed
and go round. Of two ranks that are each other's, each takes half of the pairs.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vivit_linop.devices import explained, free_memory
from vivit_linop.modes import as_guest
from vivit_linop.net.capture import Capture, Takes, sample_sizes
from vivit_linop.net.certified import (
    SMALL_RUN,
    CertifiedColumns,
    NewlyOpaque,
    find_structure,
    known_structure,
)
from vivit_linop.net.pieces import Cotangents, Piece, StoredColumns
from vivit_linop.net.structure import Structure
from vivit_linop.net.totals import Total
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.data.containers import copied

Use = Callable[[Piece, Piece], None]

# What the largest tensor of a pass on the CPU should take, if there are more than a few
# samples: fresh memory costs about as much as what is computed in it.
_SIGNAL_BYTES, _FEW_SAMPLES = 8 * 2**20, 16
# Into how many pieces at least it is cut, where one is made beside those that are held,
# and where it passes by.
_PIECES, _PASSING_PIECES = 4, 2
# Whatever the budget is, columns are held up to this: the fewer are held, the more
# often all others are made again.
LEAST_BYTES = 64 * 2**20
# A run of a batch that has been made serves whole up to this; a larger one is made
# again, in parts that stay near the caches.
_LARGEST_RUN = 128 * 2**20
# What does with anything comes first; factors and pairs are never together.
_DEMANDS: list[Takes] = ["stream", "columns", "rows", "pairs", "factors"]


class Pass:
    """Passes over the data that make the columns of V, piece by piece.

    Its pieces are made inside of :func:`~vivit_linop.modes.as_guest`.

    Args:
        factors: V, or several Jᵀ B of one risk.
        totals: What is summed over their columns.

    Attributes:
        names: The parameters of interest.
        takes: How the columns are taken: as the most demanding of the totals does.
    """

    def __init__(self, factors: Sequence[Cotangents], totals: Sequence[Total]) -> None:
        self._factors, self._risk = factors, factors[0].risk
        risk = self._risk
        self._sizes = dict(zip(risk.params, risk.sizes, strict=True))
        self._width, self._formed = 0, 0
        # The number of the first sample of each batch, and of the one after the last.
        first = risk.ranks.first
        self._starts = [*itertools.accumulate(risk.batch_sizes, initial=first)]
        self._cuts: dict[int, Sequence[Tensor]] = {}
        for factor in factors:
            self._width += factor.width
        # What the columns of a batch take if all are formed; a rank may have none.
        entries = max(risk.batch_sizes, default=0) * self._width * risk.num_params
        self._formed_bytes = entries * risk.dtype.itemsize
        self.names, self.takes = set[str](), _DEMANDS[0]
        memory = risk.kept.columns_budget()
        self._memory = max(memory, LEAST_BYTES)
        for total in totals:
            total.memory = memory
            self.names.update(total.names)
            self.takes = max(self.takes, total.takes, key=_DEMANDS.index)
            # Of each column, what is taken as a row is formed in addition.
            if total.takes == "rows":
                d = sum(map(self._sizes.__getitem__, total.names))
                self._formed = max(self._formed, d)
        # Columns are let go as soon as they have been added up; then they come one of
        # each sample at a time, but not on a GPU, where each would take launches of its
        # own, and the memory of a piece does for all.
        self._passes_by = self.takes in ("stream", "factors")
        self._in_parts = self._passes_by and risk.device.type == "cpu"

    def pieces(self, start: int = 0) -> Iterator[list[Piece]]:
        """Yield pieces, one for each factor, from a sample on that is one's first."""
        number = 0
        for batch, (X, _) in enumerate(self._risk.passes.batches("columns")):
            # Pieces have the same numbers in all passes.
            if self._starts[batch + 1] > start or self._risk.ranks.is_many:
                # What is learnt of the net meanwhile does not move them.
                if batch not in self._cuts:
                    self._cuts[batch] = self._cut(batch, X)
                while True:
                    try:
                        yield from self._of_batch(batch, X, start, number)
                        break
                    except NewlyOpaque:  # more each time, and before there is a piece
                        self._cuts[batch] = self._cut(batch, X)
                number += len(self._cuts[batch])

    def _of_batch(
        self, batch: int, X: Any, start: int, number: int
    ) -> Iterator[list[Piece]]:
        """Yield the pieces of one batch, from a sample on."""
        for at, index in enumerate(self._cuts[batch], number):
            if self._starts[batch] + int(index[0]) >= start:
                with explained(self._do_not_fit, len(index)):
                    for pieces in self._pieces(batch, X, index):
                        for piece in pieces:
                            piece.number = at
                        yield pieces

    @property
    def samples(self) -> tuple[int, int]:
        """The numbers of this process's first sample, and of the one after its last."""
        return self._starts[0], self._starts[-1]

    def only(self, factor: Cotangents) -> Pass:
        """Return the columns of one of the factors, in pieces of the same samples."""
        twin = copy.copy(self)
        twin._factors = [factor]
        return twin

    def held(self) -> Iterator[list[list[Piece]]]:
        """Yield as many pieces together as the memory can hold."""
        budget = self._memory
        together: list[list[Piece]] = []
        for pieces in self.pieces():
            size = 0
            for piece in pieces:
                size += piece.nbytes
            if together and size > budget:
                yield together
                budget, together = self._memory, []
            together.append(pieces)
            budget -= size
        if together:
            yield together

    def single(self) -> Iterator[Piece]:
        """Yield the pieces of the only factor."""
        for (piece,) in self.pieces():
            yield piece

    def held_over(self, ranks: Ranks) -> Iterator[list[Piece]]:
        """Yield what fits together, nothing while other ranks have more."""
        parts = self.held()
        while True:
            with ranks.together("columns held") as ballot:
                held = [piece for (piece,) in next(parts, [])]
                ballot.flag = bool(held)
            if not ballot.flag:
                return
            yield held

    def _do_not_fit(self, samples: int) -> str:
        device, free = self._risk.device, free_memory(self._risk.device)
        fitting = min(free, self._memory) // 4
        advice = (
            f"With EmpiricalRisk(..., memory={fitting}) fewer samples are taken at a "
            "time."
            if fitting >= LEAST_BYTES
            else "Columns are not cut into smaller parts: with mc_samples=1 a sample "
            "has one, and products with G need none."
        )
        return (
            f"memory: the columns of {samples} samples do not fit on {device}. They "
            f"were meant to take {self._memory / 1e9:.3g} GB, and {free / 1e9:.3g} GB "
            f"are free. {advice}"
        )

    def _cut(self, batch: int, X: Any) -> Sequence[Tensor]:
        """Cut a batch so that the columns of each part fit."""
        risk, width = self._risk, self._width
        n = risk.batch_sizes[batch]
        if self._fits_by_far:
            return [torch.arange(n, device="cpu")]
        formed = {name: self._sizes[name] for name in self._structure.opaque}
        sizes = sample_sizes(risk, batch, X, n)
        itemsize = risk.dtype.itemsize
        entries = sizes.entries(width, formed) + width * self._formed
        pieces = _PASSING_PIECES if self._passes_by else _PIECES
        size = max(1, self._memory // pieces // max(1, entries * itemsize))
        if self._in_parts:
            # One pass is not better than several that stay near the caches, unless
            # the first half of it has been made.
            near = _SIGNAL_BYTES // max(1, sizes.signal * itemsize)
            if not 0 < risk.kept.run_nbytes <= _LARGEST_RUN:
                size = min(size, max(near, _FEW_SAMPLES))
        # Two opposite ranks share the pairs of an even number of pieces.
        if risk.ranks.size % 2 == 0 and len(risk.batch_sizes) % 2:
            size = min(size, math.ceil(n / 2))
        index = torch.arange(n, device="cpu")
        if size >= n or not risk.kept.get_everywhere(
            ("runs in parts", batch),
            lambda: Capture.of_few(risk, X, n, 1, batch).num_samples < n,
        ):
            return [index]
        return index.tensor_split(math.ceil(n / size))

    @cached_property
    def _fits_by_far(self) -> bool:
        """Whether nothing needs to be known of the net for a batch to be one piece.

        What it shows then is learnt from that: backward passes through it take no
        longer than a run on a few samples.
        """
        risk = self._risk
        runs = risk.graph_bytes
        if self._passes_by or risk.ranks.is_many:
            return False
        if not 0 < min(runs) or max(runs) > SMALL_RUN:
            return False
        # Signals of all columns, and inputs as kernels see them.
        unfolded = max(p.shape[2:].numel() for p in risk.params.values())
        factors = (self._width + 1 + unfolded) * max(runs)
        return _PIECES * (2 * self._formed_bytes + factors) <= self._memory

    @cached_property
    def _structure(self) -> Structure:
        """What is known of the net on several samples.

        Pieces are certified when they are made. Where the memory would do for them
        however they are made, nothing needs to be certified before; nor where a batch
        can be cut again.
        """
        if self._fits_by_far:
            return known_structure(self._risk)
        later = self._formed_bytes <= self._memory or self._cuts_again
        return find_structure(self._risk, certify=not later)

    @property
    def _cuts_again(self) -> bool:
        """Whether a batch is cut anew where its first columns have to be formed."""
        return self.takes == "pairs" and not self._risk.ranks.is_many

    def _pieces(self, batch: int, X: Any, index: Tensor) -> Iterator[list[Piece]]:
        """Make the pieces of some samples of a batch."""
        if self._hides(index):
            yield from self._singly(batch, X, index)
            return
        some, capture = self._captured(batch, X, index)
        known = self._structure if len(index) > 1 else None
        begin, room = int(index[0]), None
        if known is not None and self._formed_bytes > self._memory:
            # Another cut must come before there are pieces.
            if self._cuts_again and begin == 0 and not known.certified:
                room = set(known.opaque)
        if known and not known.certified and self._risk.device.type == "cpu":
            # Where the graph shows the rest, few samples do for the certificate of all.
            # On a GPU another run takes as long.
            large = sum(self._risk.graph_bytes) > SMALL_RUN
            if large and self.names <= capture.in_layers:
                find_structure(self._risk)
        certified = CertifiedColumns(self._risk, some, capture, known, room)
        first = self._starts[batch] + begin
        samples = slice(first, first + len(index))
        pieces = []
        for factor in self._factors:
            own = factor.layout.place(batch, slice(begin, begin + len(index)))
            before = factor.layout.before
            place = slice(before + own.start, before + own.stop)
            cotangents = factor.cotangents(batch)
            cotangents = cotangents[index.to(cotangents.device)]
            # One column a sample is checked as it is, and so are those of which no part
            # would come before the others.
            takes, width = self.takes, cotangents.shape[2]
            parts = self._in_parts and width > 1 and capture.comes_in_parts(width)
            if takes == "stream" and not parts:
                takes = "columns"
            if parts:
                certified.certify_layers(cotangents, self.names)
            else:
                columns = certified.columns(cotangents, self.names, takes)
            if self._hides(index):  # which is learnt from its columns
                yield from self._singly(batch, X, index)
                return
            if not parts:
                pieces.append(Piece(place, samples, columns, self._sizes))
                continue
            for part in certified.parts(cotangents, self.names):
                yield [Piece(place, samples, part, self._sizes)]
        if pieces:
            yield pieces

    def _captured(self, batch: int, whole: Any, index: Tensor) -> tuple[Any, Capture]:
        """Return some samples of a batch, and a run of the net on them."""
        risk, n = self._risk, self._risk.batch_sizes[batch]
        run = risk.kept.take_run(whole)
        if run is not None and len(index) == n:
            return run.X, Capture(risk, run.X, n, run)
        del run  # with its graph, before another one is made
        # Columns may be kept, when the data are overwritten.
        few = len(index) < n
        X = risk.samples.take(whole, index) if few else copied(whole)
        # With the first samples, whether those of all are what they were.
        differ = risk.inputs_differ(batch, whole) if int(index[0]) == 0 else []
        capture = Capture(risk, X, len(index))
        risk.check_outputs(batch, capture.output.detach(), differ, index)
        return X, capture

    def _singly(self, batch: int, X: Any, index: Tensor) -> Iterator[list[Piece]]:
        """Make a piece of each sample."""
        for sample in index.split(1):
            yield from self._pieces(batch, X, sample)

    def _hides(self, index: Tensor) -> bool:
        """Whether weights have factors on one sample that they have not on several.

        Of one sample all axes are its own, wherever the samples of a batch are.
        """
        if self.takes != "factors" or len(index) == 1:
            return False
        hidden = {
            name
            for name in self._structure.opaque & self.names
            if self._risk.params[name].ndim > 1
        }
        return bool(hidden) and (
            not hidden <= find_structure(self._risk, alone=True).opaque
        )


# Sums over all of them --------------------------------------------------------------


def accumulate(
    factor: Cotangents, totals: Sequence[Total], stored: StoredColumns | None = None
) -> StoredColumns | None:
    """Compute several sums over the columns of one factor, stored or not, together.

    Each process adds up its own samples; pairs go round.

    Returns:
        All columns (of this process's samples), if they have been in memory together.
    """
    ranks, columns = factor.risk.ranks, Pass([factor], totals)
    if ranks.is_many or columns.takes == "factors":
        stored = None
    held: Sequence[Piece] = []
    with as_guest(factor.risk.device):
        if columns.takes == "pairs":
            held = _pair_all(columns, totals, ranks, stored)
        else:
            with ranks.together("sums over columns"):
                _add_all(stored.pieces if stored else columns.single(), totals)
    if ranks.is_many:
        for total in totals:
            total.finish(ranks)
    if not held or columns.names != set(factor.risk.params):
        return None
    return stored or StoredColumns.kept_on(factor.risk.device, held)


def accumulate_own(factor: Cotangents, totals: Sequence[Total]) -> None:
    """Likewise over the columns of this process's samples only, and not of pairs."""
    with as_guest(factor.risk.device):
        _add_all(Pass([factor], totals).single(), totals)


def _add_all(pieces: Iterable[Piece], totals: Sequence[Total]) -> None:
    for piece in pieces:
        for total in totals:
            total.add(piece, piece)


def _pair_all(
    columns: Pass,
    totals: Sequence[Total],
    ranks: Ranks,
    stored: StoredColumns | None,
) -> Sequence[Piece]:
    """Pair the columns of one factor with each other, each pair on one rank.

    As many pieces are held as fit; all others pass by, once for each such part.

    Returns:
        The pieces of this rank, if it has held all of them together; else none.
    """
    paired = [total for total in totals if total.takes == "pairs"]

    def pair(left: Piece, right: Piece) -> None:
        for total in paired:
            total.add(left, right)

    begin, last = columns.samples
    own = map(itertools.chain.from_iterable, columns.held())
    parts: Iterable[list[Piece]] = map(list, own)
    if stored is not None:
        parts = [stored.pieces]
    if ranks.is_many:
        parts = columns.held_over(ranks)
    whole, held = False, list[Piece]()
    for held in parts:
        end = held[-1].samples.stop if held else last
        whole = bool(held) and (held[0].samples.start, end) == (begin, last)
        # One process votes on nothing.
        with ranks.together("columns of this rank") if ranks.is_many else nullcontext():
            for index, left in enumerate(held):
                for total in totals:
                    total.add(left, left)
                for right in held[index + 1 :]:
                    pair(left, right)
            if end < last:
                for (right,) in columns.pieces(end):
                    for left in held:
                        pair(left, right)
        for distance in range(1, ranks.size // 2 + 1):
            use = _with_half(held, ranks, distance, pair)
            ranks.shifted(iter(held) if whole else columns.single(), distance, use)
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
