"""V = Jᵀ B on some samples and parameters: pieces, made in passes or kept.

A column of V belongs to one sample, and its entries to one parameter. A :class:`Piece`
has those of consecutive samples, each parameter's in the structure of its layer; V is
one piece beside the other. A :class:`Pass` makes them, for whatever is summed over
columns (:class:`Total`). :class:`StoredColumns` are pieces that are kept: V u and Vᵀ x
are then one matrix product for each layer, of the size of its forward pass, and nothing
is pulled through the net; but all cotangents are read. In floating-point operations,
with f those of a forward pass over all samples: at most f and the reading of the
columns, against 2 f for a product on the linearisation of the net. Getting the columns
takes 2 R f once.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from vivit_linop.devices import explained, free_memory, fresh
from vivit_linop.net.capture import Capture, Takes, sample_sizes
from vivit_linop.net.certified import (
    CertifiedColumns,
    find_structure,
    read_structure,
)
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.columns.joins import merged
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.weighted import weighted
from vivit_linop.net.structure import Structure
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk import first_run
from vivit_linop.risk.data.containers import copied
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.row_layout import RowLayout

# The share of free memory that the columns of one piece of samples may take.
_MEMORY_SHARE = 12
# What the largest tensor of a pass on the CPU should take, if there are more than a few
# samples: fresh memory costs about as much as what is computed in it.
_SIGNAL_BYTES, _FEW_SAMPLES = 8 * 2**20, 16
# Into how many pieces at least it is cut, where one is made beside those that are held,
# and where it passes by.
_PIECES, _PASSING_PIECES = 4, 2
# Whatever the budget is, columns are held up to this: the fewer are held, the more
# often all others are made again.
LEAST_BYTES = 64 * 2**20
# What does with anything comes first; factors and pairs are never together.
_DEMANDS: list[Takes] = ["stream", "columns", "rows", "pairs", "factors"]


class Cotangents(Protocol):
    """What is pulled back to columns: R vectors at the outputs of each sample.

    Attributes:
        risk: The risk.
        shape: Of V, ``[D, N·R]``.
        width: R; the largest where samples have different numbers.
        layout: Which columns belong to which sample.
    """

    risk: EmpiricalRisk
    shape: tuple[int, int]
    width: int
    layout: RowLayout

    def cotangents(self, batch: int) -> Tensor:
        """Return those of one batch of n samples, ``[n, C, R]``."""


def memory_budget(risk: EmpiricalRisk) -> int:
    """The bytes that columns may take: the risk's, or a share of what is free."""
    return risk.kept.budget(_MEMORY_SHARE)


@dataclass
class Piece:
    """V on some consecutive samples and some parameters.

    Attributes:
        place: Which columns of V they are.
        samples: Of which samples.
        columns: By parameter; a parameter that is missing has zero columns.
        sizes: The numbers of entries of all parameters, in the order of V's rows.
        number: Which part of this process's samples it is of.
    """

    place: slice
    samples: slice
    columns: dict[str, LayerColumns]
    sizes: Mapping[str, int]
    number: int = 0

    @cached_property
    def groups(self) -> list[list[str]]:
        """The parameters with the same cotangents, as those of a weight and a bias.

        Their signals are needed once, and the cotangents are kept once.
        """
        groups: dict[Hashable, list[str]] = {}
        for name, part in self.columns.items():
            groups.setdefault(part.cotangents_key, []).append(name)
        return list(groups.values())

    @cached_property
    def nbytes(self) -> int:
        """What the columns take."""
        total = 0
        for group in self.groups:
            sizes = [self.columns[name].nbytes for name in group]
            total += max(sizes)
        return total

    def rows(self, names: Sequence[str], out: Tensor) -> Tensor:
        """Form the columns of some parameters, as rows side by side.

        Args:
            names: The parameters, d entries together.
            out: Where to, ``[n·R, d]``.
        """
        parts = out.split([self.sizes[name] for name in names], dim=1)
        for name, part in zip(names, parts, strict=True):
            if name in self.columns:
                part.copy_(self.columns[name].rows())
            else:
                part.zero_()
        return out

    def combine(self, weights: Tensor, parts: Mapping[str, Tensor], add: bool) -> None:
        """Write combinations of the columns.

        Args:
            weights: ``[K, n·R]``.
            parts: By parameter where to, ``[K, numel]`` with contiguous rows.
            add: Whether to add to what is there.
        """
        for group in self.groups:
            first = self.columns[group[0]]
            shape = len(weights), first.num_samples, first.width
            signals = first.signals(weights.view(shape))
            for name in group:
                self.columns[name].combine(signals, parts[name], add)
        if not add:
            for name in parts.keys() - self.columns.keys():
                parts[name].zero_()

    def components(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the components along the columns, ``[K, n·R]``.

        Args:
            parts: By parameter, of K vectors, ``[K, numel]``.
        """
        some = next(iter(parts.values()))
        total = some.new_zeros(len(some), self.place.stop - self.place.start)
        for group in self.groups:
            first = self.columns[group[0]]
            images = first.images(parts[group[0]])
            for name in group[1:]:
                images += self.columns[name].images(parts[name])
            total += first.components(images).flatten(1)
        return total

    def weighted(self, weights: Tensor) -> Piece:
        """Return the columns with a weight for each entry, ``[D]``.

        Parameters without any weight have zero columns.
        """
        parts = weights.split(list(self.sizes.values()))
        of = dict(zip(self.sizes, parts, strict=True))
        columns = {
            name: weighted(part, of[name])
            for name, part in self.columns.items()
            if of[name].any()
        }
        return Piece(self.place, self.samples, columns, self.sizes)

    def pairs(
        self, other: Piece, names: Sequence[str]
    ) -> list[tuple[LayerColumns, LayerColumns]]:
        """Return columns and others, whose inner products add up over parameters.

        Args:
            other: Of the same parameters.
            names: Some of these.
        """
        pairs = []
        for name in names:
            if name in self.columns and name in other.columns:
                pairs.append((self.columns[name], other.columns[name]))
        return merged(pairs)

    def can_be_followed_by(self, other: Piece) -> bool:
        """Whether columns of other samples are of the same structure."""
        mine, theirs = self.columns, other.columns
        return mine.keys() == theirs.keys() and all(
            theirs[name].continues(part) for name, part in mine.items()
        )

    def followed_by(self, others: Sequence[Piece]) -> Piece:
        """Return one piece of these samples and of others, whose columns it takes away.

        There is never more than one parameter's part twice.
        """
        ends = (self, *others)[-1]
        place = slice(self.place.start, ends.place.stop)
        samples = slice(self.samples.start, ends.samples.stop)
        columns: dict[str, LayerColumns] = {}
        for group in self.groups:
            whole: LayerColumns | None = None
            for name in group:
                part, *more = (piece.columns.pop(name) for piece in (self, *others))
                joined = part.followed_by(more)
                if isinstance(whole, KhatriRaoColumns):
                    whole.share_cotangents(joined)
                columns[name] = whole = joined
        return Piece(place, samples, columns, self.sizes, self.number)


class StoredColumns:
    """V in pieces that are kept, and products with it.

    Args:
        pieces: Those of all samples, in order.

    Attributes:
        pieces: The pieces.
        nbytes: What they take.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces, self._sizes = list(pieces), pieces[0].sizes
        self._first = self.pieces[0].place.start
        self.nbytes = sum(map(attrgetter("nbytes"), self.pieces))

    @classmethod
    def kept_on(cls, device: torch.device, pieces: Sequence[Piece]) -> Self:
        """Keep pieces that nobody else needs, on a GPU as one where they can be.

        There each would take launches of its own in every product.

        Args:
            device: Where they are.
            pieces: Those of all samples, in order; their columns are taken away.
        """
        first, *others = pieces
        alike = device.type != "cpu" and all(map(first.can_be_followed_by, others))
        return cls([first.followed_by(others)] if alike else pieces)

    def multiply(self, X: Tensor) -> Tensor:
        """Combine the columns, ``[N·R, K] -> [D, K]``."""
        rows = X.T.contiguous()
        result = fresh(X, len(rows), sum(self._sizes.values()))
        parts = split_rows(result, self._sizes)
        for index, piece in enumerate(self.pieces):
            place = piece.place.start - self._first, piece.place.stop - self._first
            piece.combine(rows[:, slice(*place)], parts, add=index > 0)
        return result.T

    def multiply_adjoint(self, X: Tensor) -> Tensor:
        """Return the components along all columns, ``[D, K] -> [N·R, K]``."""
        parts = split_rows(X.T, self._sizes)
        components = [piece.components(parts) for piece in self.pieces]
        return torch.cat(components, dim=1).T


def split_rows(rows: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Cut ``[K, D]`` into the parts of the parameters."""
    parts = rows.split(list(sizes.values()), dim=1)
    return dict(zip(sizes, parts, strict=True))


class Total(ABC):
    """Something that is summed over columns, or over pairs of columns.

    Attributes:
        names: The parameters that it is over.
        takes: How it takes columns, as in :data:`vivit_linop.net.capture.Takes`.
        memory: The bytes that temporaries may take; a pass sets it.
    """

    names: Sequence[str]
    takes: Takes = "columns"
    memory: int = 0

    @abstractmethod
    def add(self, left: Piece, right: Piece) -> None:
        """Add a pair of pieces; each single piece comes once, paired with itself."""

    def finish(self, ranks: Ranks) -> None:
        """Put together what processes have added, each of its own samples."""
        raise NotImplementedError(
            f"{type(self).__name__} is not summed over several processes."
        )


class Pass:
    """Passes over the data that make the columns of V, piece by piece.

    Its pieces are made inside of :class:`~vivit_linop.modes.as_guest`.

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
        self._cuts: dict[int, Sequence[Tensor]] = {}
        for factor in factors:
            self._width += factor.width
        self.names, self.takes = set[str](), _DEMANDS[0]
        memory = memory_budget(risk)
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
        """Yield pieces, one for each factor.

        Args:
            start: The sample to start from, the first of a piece.
        """
        ranks = self._risk.ranks
        first, number = ranks.first, 0
        for batch, (X, _) in enumerate(self._risk.batches("columns")):
            n = self._risk.batch_sizes[batch]
            # Pieces have the same numbers in all passes.
            if first + n > start or ranks.is_many:
                # What is learnt of the net meanwhile does not move them.
                if batch not in self._cuts:
                    self._cuts[batch] = self._cut(batch, X, n)
                for index in self._cuts[batch]:
                    if first + int(index[0]) >= start:
                        with explained(self._do_not_fit, len(index)):
                            for pieces in self._pieces(batch, X, index, n, first):
                                for piece in pieces:
                                    piece.number = number
                                yield pieces
                    number += 1
            first += n

    @property
    def samples(self) -> tuple[int, int]:
        """The numbers of this process's first sample, and of the one after its last."""
        first = self._risk.ranks.first
        return first, first + sum(self._risk.batch_sizes)

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

    def _cut(self, batch: int, X: Any, n: int) -> Sequence[Tensor]:
        """Cut a batch so that the columns of each part fit."""
        risk, width = self._risk, self._width
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
            if not 0 < first_run.nbytes_kept(risk.kept) <= LEAST_BYTES:
                size = min(size, max(near, _FEW_SAMPLES))
        # Two opposite ranks share the pairs of an even number of pieces.
        if risk.ranks.size % 2 == 0 and len(risk.batch_sizes) % 2:
            size = min(size, math.ceil(n / 2))
        index = torch.arange(n, device="cpu")
        if size >= n or not self._runs_in_parts(batch, X, n):
            return [index]
        return index.tensor_split(math.ceil(n / size))

    @cached_property
    def _structure(self) -> Structure:
        """What is known of the net on several samples.

        Pieces are certified when they are made. Where the memory would do for them
        however they are made, nothing needs to be certified before.
        """
        risk = self._risk
        formed = max(risk.batch_sizes) * self._width * risk.num_params
        enough = formed * risk.dtype.itemsize <= self._memory
        return read_structure(risk) if enough else find_structure(risk)

    def _runs_in_parts(self, batch: int, X: Any, n: int) -> bool:
        """Whether the net runs on fewer samples than a batch has."""
        risk = self._risk
        return risk.kept.get_everywhere(
            ("runs in parts", batch),
            lambda: Capture.of_few(risk, X, n, 1, batch).num_samples < n,
        )

    def _pieces(
        self, batch: int, whole: Any, index: Tensor, n: int, first: int
    ) -> Iterator[list[Piece]]:
        """Make the pieces of some samples of a batch of n."""
        if self._hides(index):
            yield from self._singly(batch, whole, index, n, first)
            return
        X, capture = self._captured(batch, whole, index, n)
        known = self._structure if len(index) > 1 else None
        certified = CertifiedColumns(self._risk, X, capture, known)
        begin = int(index[0])
        samples = slice(first + begin, first + begin + len(index))
        pieces = []
        for factor in self._factors:
            own = factor.layout.place(batch, slice(begin, begin + len(index)))
            before = factor.layout.before
            place = slice(before + own.start, before + own.stop)
            cotangents = factor.cotangents(batch)
            cotangents = cotangents[index.to(cotangents.device)]
            # One column a sample is checked as it is.
            takes, parts = self.takes, self._in_parts and cotangents.shape[2] > 1
            if takes == "stream" and not parts:
                takes = "columns"
            columns: dict[str, LayerColumns] | None = None
            if not parts:
                columns = certified.columns(cotangents, self.names, takes)
            else:
                certified.certify_layers(cotangents, self.names)
            if self._hides(index):  # which is learnt from its columns
                yield from self._singly(batch, whole, index, n, first)
                return
            if columns is not None:
                pieces.append(Piece(place, samples, columns, self._sizes))
                continue
            for part in certified.parts(cotangents, self.names):
                yield [Piece(place, samples, part, self._sizes)]
        if pieces:
            yield pieces

    def _captured(
        self, batch: int, whole: Any, index: Tensor, n: int
    ) -> tuple[Any, Capture]:
        """Return some samples of a batch of n, and a run of the net on them."""
        risk = self._risk
        run = first_run.taken(risk.kept, whole)
        if run is not None and len(index) == n:
            return run.X, Capture(risk, run.X, n, run)
        del run  # with its graph, before another one is made
        # Columns may be kept, when the data are overwritten.
        few = len(index) < n
        X = risk.samples.take(whole, index) if few else copied(whole)
        capture = Capture(risk, X, len(index))
        risk.check_outputs(batch, capture.output.detach(), index)
        return X, capture

    def _singly(
        self, batch: int, whole: Any, index: Tensor, n: int, first: int
    ) -> Iterator[list[Piece]]:
        """Make a piece of each sample."""
        for sample in index.split(1):
            yield from self._pieces(batch, whole, sample, n, first)

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
        if not hidden:
            return False
        return not hidden <= find_structure(self._risk, alone=True).opaque
