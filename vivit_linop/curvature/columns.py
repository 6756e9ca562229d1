"""The columns of a pullback, a piece of samples at a time, layer by layer.

A column of Jᵀ B belongs to one sample, and its entries to one parameter. They are kept
in the structure of their layers (:mod:`vivit_linop.capture`). Parameters whose use has
no known structure get dense columns, by backward passes of single samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from vivit_linop.capture import (
    Capture,
    Structure,
    UnseenUseError,
    find_structure,
)
from vivit_linop.capture.layers import DenseColumns, LayerColumns, cotangents_key
from vivit_linop.risk.data import copied, leaves, map_leaves, take
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.memory import explained, free_memory
from vivit_linop.risk.model import Params, as_guest, strided

if TYPE_CHECKING:
    from vivit_linop.curvature.jacobian import Pullback

SampleOutputs = Callable[[Params, Any], Tensor]

# The share of free memory that the columns of one piece of samples may take.
_MEMORY_SHARE = 12
# Into how many pieces at least it is cut: one is made beside those that are held.
_PIECES = 4


@dataclass
class Piece:
    """The columns of some consecutive samples.

    Attributes:
        place: Which columns of the pullback they are.
        columns: By parameter; a parameter that is missing has zero columns.
    """

    place: slice
    columns: dict[str, LayerColumns]

    @property
    def nbytes(self) -> int:
        """What the columns take; those with the same cotangents share them."""
        sizes: dict[object, int] = {}
        for part in self.columns.values():
            key = cotangents_key(part)
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
        memory: The bytes that a piece may take.
        formed: How many entries of a column will be formed in addition.
        compact: Whether columns that are smaller than their factors are formed.

    Attributes:
        names: The parameters of interest.
        compact: Whether small columns are formed.
    """

    def __init__(
        self,
        pullbacks: Sequence[Pullback],
        names: Sequence[str],
        memory: int,
        formed: int = 0,
        compact: bool = True,
    ) -> None:
        self.compact = compact
        self._pullbacks, self._risk = pullbacks, pullbacks[0].risk
        self.names, self._memory = set(names), memory
        self._width = sum(pullback.width for pullback in pullbacks)
        itemsize = torch.finfo(self._risk.dtype).bits // 8
        self._formed_bytes = formed * self._width * itemsize

    def pieces(self, start: int = 0) -> Iterator[list[Piece]]:
        """Yield pieces, one for each pullback.

        Args:
            start: The sample to start from, the first of a piece.
        """
        risk = self._risk
        structure = find_structure(risk)
        first = 0
        for batch, (X, y) in enumerate(risk.batches("columns")):
            n = len(y)
            if first + n > start:
                for index in self._cut(X, n, structure):
                    if first + int(index[0]) >= start:
                        with explained(self._do_not_fit, len(index)):
                            pieces = self._pieces(batch, X, index, n, first, structure)
                        yield pieces
            first += n

    def only(self, pullback: Pullback) -> Columns:
        """Return the columns of one of the pullbacks, in pieces of the same samples."""
        columns = copy.copy(self)
        columns._pullbacks = [pullback]
        return columns

    def _do_not_fit(self, samples: int) -> str:
        device, free = self._risk.device, free_memory(self._risk.device)
        fitting = min(free, self._memory) // 4
        return (
            f"memory: the columns of {samples} samples do not fit on {device}. They "
            f"were meant to take {self._memory / 1e9:.3g} GB, and {free / 1e9:.3g} GB "
            f"are free. With EmpiricalRisk(..., memory={fitting}) fewer samples are "
            "taken at a time."
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

    def _cut(self, X: Any, n: int, structure: Structure) -> Iterable[Tensor]:
        """Cut a batch so that the columns of each part fit."""
        one = Capture(self._risk, take(X, torch.arange(1), self._risk.by_sample), 1)
        per_sample = one.bytes_per_sample(self._width, structure) + self._formed_bytes
        return torch.arange(n).split(
            max(1, min(n, self._memory // _PIECES // per_sample))
        )

    def _pieces(
        self,
        batch: int,
        X: Any,
        index: Tensor,
        n: int,
        first: int,
        structure: Structure,
    ) -> list[Piece]:
        if len(index) < n:
            X = take(X, index, self._risk.by_sample)
        else:
            X = copied(X)  # the columns may be kept
        capture = Capture(self._risk, X, len(index))
        self._risk.check_outputs(batch, capture.output.detach(), index)
        if not structure.fits(capture):
            structure = capture.check()
        begin = first + int(index[0])
        pieces = []
        for pullback in self._pullbacks:
            cotangents = pullback.cotangents(batch)
            cotangents = cotangents[index.to(cotangents.device)]
            try:
                columns = self._columns(X, capture, structure, cotangents)
            except UnseenUseError:
                structure = capture.check()
                columns = self._columns(X, capture, structure, cotangents)
            end = begin + len(index)
            place = slice(begin * pullback.width, end * pullback.width)
            pieces.append(Piece(place, columns))
        return pieces

    def _columns(
        self, X: Any, capture: Capture, structure: Structure, cotangents: Tensor
    ) -> dict[str, LayerColumns]:
        columns = capture.columns(cotangents, structure, self.names, self.compact)
        opaque = [
            name
            for name in self._risk.params
            if name in structure.opaque and name in self.names
        ]
        columns.update(_dense_columns(self._risk, X, cotangents, opaque))
        return columns


def memory_budget(risk: EmpiricalRisk) -> int:
    """The bytes that columns may take: the risk's, or a share of what is free."""
    if risk.memory is not None:
        return risk.memory
    return free_memory(risk.device) // _MEMORY_SHARE


def _dense_columns(
    risk: EmpiricalRisk, X: Any, cotangents: Tensor, names: Sequence[str]
) -> dict[str, LayerColumns]:
    """Pull back each sample's cotangents ``[n, C, R]`` to single parameters."""
    if not names:
        return {}
    fixed = {name: p.detach() for name, p in risk.params.items()}
    chosen = {name: fixed.pop(name) for name in names}
    weights = cotangents.mT  # [n, R, C]

    def outputs(params: Params, sample: Any) -> Tensor:
        return risk.model({**fixed, **params}, sample).reshape(-1)

    with as_guest(risk.device):
        try:
            columns = _vectorised(outputs, chosen, X, weights, risk.by_sample)
        # What cannot be vectorised (control flow on values, writing in place) is done
        # sample by sample; an error of the model itself is seen there.
        except Exception:
            columns = _one_by_one(outputs, chosen, X, weights, risk.by_sample)
    return {
        name: DenseColumns(part.reshape(*part.shape[:2], -1).detach())
        for name, part in columns.items()
    }


def _vectorised(
    outputs: SampleOutputs,
    chosen: Params,
    X: Any,
    weights: Tensor,
    by_sample: Sequence[bool],
) -> dict[str, Tensor]:
    def columns(sample_leaves: list[Tensor], weight: Tensor) -> dict[str, Tensor]:
        given, flags = iter(sample_leaves), iter(by_sample)
        sample = map_leaves(lambda leaf: next(given)[None] if next(flags) else leaf, X)
        pull_back = vjp(lambda params: outputs(params, sample), chosen)[1]
        (gradients,) = vmap(pull_back)(weight)
        result: dict[str, Tensor] = gradients
        return result

    batched = [leaf for leaf, flag in zip(leaves(X), by_sample, strict=True) if flag]
    with torch.no_grad():
        result: dict[str, Tensor] = vmap(columns)(batched, weights)
    return result


def _one_by_one(
    outputs: SampleOutputs,
    chosen: Params,
    X: Any,
    weights: Tensor,
    by_sample: Sequence[bool],
) -> dict[str, Tensor]:
    params = {name: p.clone().requires_grad_() for name, p in chosen.items()}
    columns: dict[str, list[Tensor]] = {name: [] for name in params}
    for index, weight in enumerate(weights):
        output = outputs(params, take(X, torch.tensor([index]), by_sample))
        for w in weight:
            gradients: Sequence[Tensor | None] = [None] * len(params)
            if output.requires_grad:  # a sample may take a way without them
                gradients = torch.autograd.grad(
                    output,
                    list(params.values()),
                    w,
                    retain_graph=True,
                    allow_unused=True,
                )
            for (name, p), g in zip(
                params.items(), map(strided, gradients), strict=True
            ):
                columns[name].append(torch.zeros_like(p) if g is None else g)
    width = weights.shape[1]
    return {
        name: torch.stack(parts).reshape(-1, width, *chosen[name].shape)
        for name, parts in columns.items()
    }
