"""The columns of a pullback by layer, and what is summed over them.

A column of Jᵀ B belongs to one sample, and its entries to one parameter. The columns
are taken a piece of samples at a time and kept in the structure of their layers
(:mod:`vivit_linop.capture`); the Gram matrix is a sum over layers of products that need
no column formed. Parameters whose use has no known structure get dense columns, by
backward passes of single samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from vivit_linop.capture import Capture, Structure, find_structure
from vivit_linop.capture.layers import DenseColumns, LayerColumns
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.verbs import gram_matrix, row_norms_squared, to_dense
from vivit_linop.risk.data import leaves, map_leaves, take
from vivit_linop.risk.empirical import EmpiricalRisk, free_memory
from vivit_linop.risk.model import Params, as_guest

SampleOutputs = Callable[[Params, Any], Tensor]

# The share of free memory that the columns of one piece of samples may take.
_MEMORY_SHARE = 4


@dataclass
class Piece:
    """The columns of some consecutive samples.

    Attributes:
        place: Which columns of the pullback they are.
        columns: By parameter; a parameter that is missing has zero columns.
    """

    place: slice
    columns: dict[str, LayerColumns]


class Columns:
    """The columns of one or several pullbacks of one risk, piece by piece.

    Args:
        pullbacks: Jᵀ B for several B.
        names: The parameters of interest, by default all.
        memory: The bytes that a piece may take; by default the risk's budget, or a
            share of the memory that is free.
    """

    def __init__(
        self,
        pullbacks: Sequence[Pullback],
        names: Sequence[str] | None = None,
        memory: int | None = None,
    ) -> None:
        self._pullbacks, self._risk = pullbacks, pullbacks[0].risk
        self._names = set(self._risk.params if names is None else names)
        self.memory = memory_budget(self._risk) if memory is None else memory

    def pieces(self, start_sample: int = 0) -> Iterator[list[Piece]]:
        """Yield pieces, one for each pullback; from a sample on that starts one."""
        risk = self._risk
        structure = find_structure(risk)
        width = sum(pullback.width for pullback in self._pullbacks)
        first = 0
        for batch, (X, y) in enumerate(risk.batches()):
            n = len(y)
            if first + n <= start_sample:
                first += n
                continue
            cotangents = [p.cotangents(batch) for p in self._pullbacks]
            capture = self._capture(X, n)
            per_sample = capture.bytes_per_sample(width, structure)
            size = max(1, min(n, self.memory // max(per_sample, 1)))
            for index in torch.arange(n).split(size):
                if first + int(index[-1]) < start_sample:
                    continue
                if len(index) < n:
                    part = take(X, index, n)
                    capture = self._capture(part, len(index))
                else:
                    part = X
                own = structure if structure.fits(capture) else capture.check()
                begin = first + int(index[0])
                pieces = []
                for pullback, C in zip(self._pullbacks, cotangents, strict=True):
                    columns = self._columns(part, capture, own, C[index.to(C.device)])
                    place = slice(
                        begin * pullback.width, (begin + len(index)) * pullback.width
                    )
                    pieces.append(Piece(place, columns))
                yield pieces
            first += n

    def _capture(self, X: Any, n: int) -> Capture:
        return Capture(self._risk, X, n)

    def _columns(
        self, X: Any, capture: Capture, structure: Structure, cotangents: Tensor
    ) -> dict[str, LayerColumns]:
        columns = capture.columns(cotangents, structure, self._names)
        opaque = [
            name
            for name in self._risk.params
            if name in structure.opaque and name in self._names
        ]
        columns.update(_dense_columns(self._risk, X, cotangents, opaque))
        return columns


def gram_over_groups(
    left: Pullback, right: Pullback, groups: Sequence[Sequence[str]]
) -> list[Tensor]:
    """Return Σ over the parameters of each group of (left columns)ᵀ (right columns).

    One pass over the data (a forward pass and as many backward passes without weight
    gradients as a sample has columns) if the columns of all samples fit into memory in
    the structure of their layers; else the data are passed over once for each piece.

    Args:
        left: Jᵀ A, ``[D, R]``.
        right: Jᵀ B, ``[D, Q]``.
        groups: Names of parameters; each group gives one matrix.

    Returns:
        One ``[R, Q]`` matrix for each group.
    """
    _check_same_parameters(left.risk, right.risk)
    grams = [
        torch.zeros(
            left.shape[1], right.shape[1], dtype=left.torch_dtype, device=left.device
        )
        for _ in groups
    ]
    names = [name for group in groups for name in group]
    if left is right:
        _symmetric_grams(grams, left, groups, names)
    elif left.risk is right.risk:
        _grams(grams, left, right, groups, names)
    else:
        for (a,) in Columns([left], names).pieces():
            for (b,) in Columns([right], names).pieces():
                _add(grams, a, b, groups, memory_budget(left.risk))
    return grams


def _symmetric_grams(
    grams: list[Tensor],
    factor: Pullback,
    groups: Sequence[Sequence[str]],
    names: Sequence[str],
) -> None:
    budget = memory_budget(factor.risk)
    for (a,) in Columns([factor], names).pieces():
        _add(grams, a, a, groups, budget)
        if a.place.stop == factor.shape[1]:
            return
        rest = Columns([factor], names).pieces(a.place.stop // factor.width)
        for (b,) in rest:
            _add(grams, a, b, groups, budget)
            for gram in grams:
                gram[b.place, a.place] = gram[a.place, b.place].T


def _grams(
    grams: list[Tensor],
    left: Pullback,
    right: Pullback,
    groups: Sequence[Sequence[str]],
    names: Sequence[str],
) -> None:
    budget = memory_budget(left.risk)
    for a, b in Columns([left, right], names).pieces():
        _add(grams, a, b, groups, budget)
        if a.place.start == 0 and a.place.stop == left.shape[1]:
            return
        for (c,) in Columns([right], names).pieces():
            if c.place != b.place:
                _add(grams, a, c, groups, budget)


def _add(
    grams: list[Tensor],
    left: Piece,
    right: Piece,
    groups: Sequence[Sequence[str]],
    memory: int,
) -> None:
    for gram, group in zip(grams, groups, strict=True):
        block = gram[left.place, right.place]
        if block.is_contiguous():
            target = block
        else:
            target = torch.zeros_like(block, memory_format=torch.contiguous_format)
        for name in group:
            if name in left.columns and name in right.columns:
                left.columns[name].add_gram(target, right.columns[name], memory)
        if target is not block:
            block += target


def memory_budget(risk: EmpiricalRisk) -> int:
    """The bytes that columns may take: the risk's, or a share of what is free."""
    if risk.memory is not None:
        return risk.memory
    return free_memory(risk.device) // _MEMORY_SHARE


def _check_same_parameters(left: EmpiricalRisk, right: EmpiricalRisk) -> None:
    if left is right:
        return
    shapes = [{n: tuple(p.shape) for n, p in r.params.items()} for r in (left, right)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        raise ValueError(
            "Factors of risks with different parameters have no cross-Gram matrix: "
            f"{shapes[0]} and {shapes[1]}."
        )


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
            columns = _vectorised(outputs, chosen, X, weights)
        # What cannot be vectorised (control flow on values, writing in place) is done
        # sample by sample; an error of the model itself is seen there.
        except Exception:
            columns = _one_by_one(outputs, chosen, X, weights)
    return {
        name: DenseColumns(part.flatten(2).detach()) for name, part in columns.items()
    }


def _vectorised(
    outputs: SampleOutputs, chosen: Params, X: Any, weights: Tensor
) -> dict[str, Tensor]:
    n = len(weights)

    def is_by_sample(leaf: Tensor) -> bool:
        return leaf.ndim > 0 and len(leaf) == n

    def columns(sample_leaves: list[Tensor], weight: Tensor) -> dict[str, Tensor]:
        given = iter(sample_leaves)
        sample = map_leaves(
            lambda leaf: next(given)[None] if is_by_sample(leaf) else leaf, X
        )
        pull_back = vjp(lambda params: outputs(params, sample), chosen)[1]
        (gradients,) = vmap(pull_back)(weight)
        result: dict[str, Tensor] = gradients
        return result

    by_sample = [leaf for leaf in leaves(X) if is_by_sample(leaf)]
    with torch.no_grad():
        result: dict[str, Tensor] = vmap(columns)(by_sample, weights)
    return result


def _one_by_one(
    outputs: SampleOutputs, chosen: Params, X: Any, weights: Tensor
) -> dict[str, Tensor]:
    params = {name: p.clone().requires_grad_() for name, p in chosen.items()}
    columns: dict[str, list[Tensor]] = {name: [] for name in params}
    for index, weight in enumerate(weights):
        output = outputs(params, take(X, torch.tensor([index]), len(weights)))
        for w in weight:
            gradients = torch.autograd.grad(
                output, list(params.values()), w, retain_graph=True, allow_unused=True
            )
            for (name, p), g in zip(params.items(), gradients, strict=True):
                columns[name].append(torch.zeros_like(p) if g is None else g)
    width = weights.shape[1]
    return {
        name: torch.stack(parts).reshape(-1, width, *chosen[name].shape)
        for name, parts in columns.items()
    }


def _rows(piece: Piece, risk: EmpiricalRisk) -> Iterator[tuple[slice, Tensor]]:
    """Yield the formed columns of each parameter, and its place among all."""
    start = 0
    for name, size in zip(risk.params, risk.sizes, strict=True):
        if name in piece.columns:
            yield slice(start, start + size), piece.columns[name].rows()
        start += size


def _small_pieces(op: Pullback) -> Iterator[Piece]:
    """Pieces whose columns can be formed."""
    memory = memory_budget(op.risk)
    itemsize = torch.finfo(op.torch_dtype).bits // 8
    dense = op.shape[0] * op.width * itemsize
    # Forming them must fit as well as keeping them by layer.
    share = min(1.0, memory / (dense * op.risk.num_samples))
    for (piece,) in Columns([op], memory=math.ceil(memory * share)).pieces():
        yield piece


@gram_matrix.register
def _(left: Pullback, right: TorchLinearOperator) -> Tensor:
    if not isinstance(right, Pullback):
        return left.T.apply(to_dense(right))
    return gram_over_groups(left, right, [list(left.risk.params)])[0]


@to_dense.register
def _(op: Pullback) -> Tensor:
    result = torch.zeros(op.shape, dtype=op.torch_dtype, device=op.device)
    for piece in _small_pieces(op):
        for place, rows in _rows(piece, op.risk):
            result[place, piece.place] = rows.T
    return result


@row_norms_squared.register
def _(op: Pullback) -> Tensor:
    result = torch.zeros(op.shape[0], dtype=op.torch_dtype, device=op.device)
    for piece in _small_pieces(op):
        for place, rows in _rows(piece, op.risk):
            result[place] += rows.square().sum(0)
    return result


@to_dense.register
def _(op: LowRank) -> Tensor:
    """Σ V_s V_sᵀ over pieces of columns where the factor is a pullback."""
    factor = op.factor
    if not isinstance(factor, Pullback):
        dense = to_dense(factor)
        return op.scale * (dense @ dense.T)
    result = torch.zeros(op.shape, dtype=op.torch_dtype, device=op.device)
    for piece in _small_pieces(factor):
        width = piece.place.stop - piece.place.start
        rows = result.new_zeros(width, factor.shape[0])
        for place, part in _rows(piece, factor.risk):
            rows[:, place] = part
        result.addmm_(rows.T, rows, alpha=op.scale)
    return result
