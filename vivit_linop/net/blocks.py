"""The columns of a pullback, a piece of samples at a time, layer by layer.

A column of Jᵀ B belongs to one sample, and its entries to one parameter. They are kept
in the structure of their layers (:mod:`vivit_linop.net`). Parameters whose use has
no known structure get dense columns, by backward passes of single samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vivit_linop.net.capture import Capture, sample_sizes
from vivit_linop.net.certified import CertifiedColumns, find_structure
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.risk.data import copied, take
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.memory import explained, free_memory
from vivit_linop.risk.model import Params

SampleOutputs = Callable[[Params, Any], Tensor]

# The share of free memory that the columns of one piece of samples may take.
_MEMORY_SHARE = 12
# What the largest tensor of a pass on the CPU should take, if there are more than a few
# samples: fresh memory costs about as much as what is computed in it.
_SIGNAL_BYTES, _FEW_SAMPLES = 8 * 2**20, 16
# Into how many pieces at least it is cut: one is made beside those that are held.
_PIECES = 4
# Whatever the budget is, columns are held up to this: the fewer are held, the more
# often all others are made again.
_LEAST_BYTES = 64 * 2**20


Takes = Literal["stream", "columns", "pairs", "factors"]


class Cotangents(Protocol):
    """What is pulled back to columns: R vectors at the outputs of each sample.

    Attributes:
        risk: The risk.
        width: R.
    """

    risk: EmpiricalRisk
    width: int

    def cotangents(self, batch: int) -> Tensor:
        """Return those of one batch of n samples, ``[n, C, R]``."""


def num_columns(factor: Cotangents) -> int:
    """N·R."""
    return factor.risk.num_samples * factor.width


@dataclass
class Piece:
    """The columns of some consecutive samples.

    Attributes:
        place: Which columns of the pullback they are.
        columns: By parameter; a parameter that is missing has zero columns.
        again: Whether it has other columns of the same layers as a piece before.
    """

    place: slice
    columns: dict[str, LayerColumns]
    again: bool = False

    @property
    def nbytes(self) -> int:
        """What the columns take; those with the same cotangents share them."""
        sizes: dict[object, int] = {}
        for part in self.columns.values():
            key = part.cotangents_key
            sizes[key] = max(part.nbytes, sizes.get(key, 0))
        return sum(sizes.values())

    def rows(self, names: Sequence[str], risk: EmpiricalRisk) -> Tensor:
        """Form the columns of some parameters, as rows side by side."""
        height = self.place.stop - self.place.start
        parts = [
            self.columns[name].rows()
            if name in self.columns
            else torch.zeros(
                height,
                risk.params[name].numel(),
                dtype=risk.dtype,
                device=risk.device,
            )
            for name in names
        ]
        return torch.cat(parts, dim=1)


class Columns:
    """The columns of one or several pullbacks of one risk, piece by piece.

    Args:
        pullbacks: Jᵀ B for several B.
        names: The parameters of interest.
        memory: The bytes that the columns which are held may take; 64 MiB at least.
        formed: How many entries of a column will be formed in addition.
        takes: How they come: ``"columns"`` or ``"pairs"``, the columns of a sample and
            parameter together, formed where that is smaller; ``"stream"``, in several
            pieces as they are made, of one factor; ``"factors"``, also so, and never
            formed where there are factors.

    Attributes:
        names: The parameters of interest.
        takes: How they come.
    """

    def __init__(
        self,
        pullbacks: Sequence[Cotangents],
        names: Sequence[str],
        memory: int,
        formed: int = 0,
        takes: Takes = "columns",
    ) -> None:
        self.takes: Takes = takes
        self._pullbacks, self._risk = pullbacks, pullbacks[0].risk
        self.names, self._memory = set(names), max(memory, _LEAST_BYTES)
        self._width = sum(pullback.width for pullback in pullbacks)
        self._formed = formed

    def pieces(self, start: int = 0) -> Iterator[list[Piece]]:
        """Yield pieces, one for each pullback.

        Args:
            start: The sample to start from, the first of a piece.
        """
        risk = self._risk
        first = 0
        for batch, (X, y) in enumerate(risk.batches("columns")):
            n = len(y)
            if first + n > start:
                for index in self._cut(batch, X, n):
                    if first + int(index[0]) >= start:
                        with explained(self._do_not_fit, len(index)):
                            yield from self._pieces(batch, X, index, n, first)
            first += n

    def only(self, pullback: Cotangents) -> Columns:
        """Return the columns of one of the pullbacks, in pieces of the same samples."""
        columns = copy.copy(self)
        columns._pullbacks = [pullback]
        return columns

    def _do_not_fit(self, samples: int) -> str:
        device, free = self._risk.device, free_memory(self._risk.device)
        fitting = min(free, self._memory) // 4
        advice = (
            f"With EmpiricalRisk(..., memory={fitting}) fewer samples are taken at a "
            "time."
            if fitting >= _LEAST_BYTES
            else "Columns are not cut into smaller parts: with mc_samples=1 a sample "
            "has one, and products with G need none."
        )
        return (
            f"memory: the columns of {samples} samples do not fit on {device}. They "
            f"were meant to take {self._memory / 1e9:.3g} GB, and {free / 1e9:.3g} GB "
            f"are free. {advice}"
        )

    def held(self) -> Iterator[list[list[Piece]]]:
        """Yield as many pieces together as the memory can hold."""
        budget = self._memory
        together: list[list[Piece]] = []
        for pieces in self.pieces():
            size = sum(piece.nbytes for piece in pieces)
            if together and size > budget:
                yield together
                budget, together = self._memory, []
            together.append(pieces)
            budget -= size
        yield together

    def _cut(self, batch: int, X: Any, n: int) -> Iterable[Tensor]:
        """Cut a batch so that the columns of each part fit."""
        risk = self._risk
        itemsize = torch.finfo(risk.dtype).bits // 8
        formed = {
            name: risk.params[name].numel() for name in find_structure(risk).opaque
        }
        sizes = sample_sizes(risk, batch, X, n)
        entries = sizes.entries(self._width, formed) + self._width * self._formed
        size = max(1, self._memory // _PIECES // max(1, entries * itemsize))
        if self.takes in ("stream", "factors") and risk.device.type == "cpu":
            # One pass is not better than several that stay near the caches.
            near = _SIGNAL_BYTES // max(1, sizes.signal * itemsize)
            size = min(size, max(near, _FEW_SAMPLES))
        index = torch.arange(n, device="cpu")
        if size >= n or not self._runs_in_parts(batch, X, n):
            return [index]
        return index.tensor_split(math.ceil(n / size))

    def _runs_in_parts(self, batch: int, X: Any, n: int) -> bool:
        """Whether the net runs on fewer samples than a batch has."""
        risk = self._risk
        return risk.kept.get_everywhere(
            ("runs in parts", batch),
            lambda: Capture.of_few(risk, X, n, 1, batch).num_samples < n,
        )

    def _pieces(
        self,
        batch: int,
        X: Any,
        index: Tensor,
        n: int,
        first: int,
    ) -> Iterator[list[Piece]]:
        whole = X
        if len(index) < n:
            X = take(X, index, self._risk.by_sample)
        else:
            X = copied(X)  # the columns may be kept
        capture = Capture(self._risk, X, len(index))
        self._risk.check_outputs(batch, capture.output.detach(), index)
        certified = CertifiedColumns(self._risk, X, capture)
        begin, end = first + int(index[0]), first + int(index[0]) + len(index)
        pieces = []
        for pullback in self._pullbacks:
            place = slice(begin * pullback.width, end * pullback.width)
            cotangents = pullback.cotangents(batch)
            cotangents = cotangents[index.to(cotangents.device)]
            # One column a sample is checked as it is.
            factors = self.takes == "factors"
            in_parts = factors or (self.takes == "stream" and cotangents.shape[2] > 1)
            if in_parts:
                certified.certify_layers(cotangents, self.names)
            if factors and len(index) > 1 and self._hides():
                for sample in index.split(1):
                    yield from self._pieces(batch, whole, sample, n, first)
                return
            if in_parts:
                for part, again in certified.parts(cotangents, self.names):
                    yield [Piece(place, part, again)]
                continue
            columns = certified.columns(cotangents, self.names)
            pieces.append(Piece(place, columns))
        if pieces:
            yield pieces

    def _hides(self) -> bool:
        """Whether weights have factors on one sample that they have not on several.

        Of one sample all axes are its own, wherever the samples of a batch are.
        """
        hidden = {
            name
            for name in find_structure(self._risk).opaque & self.names
            if self._risk.params[name].ndim > 1
        }
        return not hidden <= find_structure(self._risk, alone=True).opaque


def memory_budget(risk: EmpiricalRisk) -> int:
    """The bytes that columns may take: the risk's, or a share of what is free."""
    return risk.kept.budget(_MEMORY_SHARE)
