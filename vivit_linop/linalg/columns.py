"""Columns of operators, some at a time: the rules of ``column_pieces``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.elementary import Dense, Product, Scaled
from vivit_linop.operators.parts import HStack
from vivit_linop.operators.random_projection import RandomProjection
from vivit_linop.operators.verbs import column_pieces

# Columns that are multiplied at a time: enough to batch, few enough to fit.
_CHUNK = 256


@column_pieces.register
def column_pieces_of_operator(
    op: TorchLinearOperator,
) -> Iterator[tuple[slice, Tensor]]:
    """By products with the identity's columns."""
    n = op.shape[1]
    for start in range(0, n, _CHUNK):
        place = slice(start, min(start + _CHUNK, n))
        size = place.stop - start
        unit = torch.zeros(n, size, dtype=op.torch_dtype, device=op.device)
        unit[place].fill_diagonal_(1.0)
        yield place, op.apply(unit)


@column_pieces.register
def column_pieces_of_dense(op: Dense) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the matrix."""
    for start in range(0, op.shape[1], _CHUNK):
        place = slice(start, min(start + _CHUNK, op.shape[1]))
        yield place, op.matrix[:, place]


@column_pieces.register
def column_pieces_of_random_projection(
    op: RandomProjection,
) -> Iterator[tuple[slice, Tensor]]:
    """The blocks that its products make."""
    for place, block in op.blocks(op.torch_dtype, op.device):
        yield place, block.T


@column_pieces.register
def column_pieces_of_scaled(op: Scaled) -> Iterator[tuple[slice, Tensor]]:
    for place, columns in column_pieces(op.operator):
        yield place, op.factor * columns


@column_pieces.register
def column_pieces_of_product(op: Product) -> Iterator[tuple[slice, Tensor]]:
    """A times the columns of B, whatever these are made by."""
    for place, columns in column_pieces(op.factors[-1]):
        for factor in reversed(op.factors[:-1]):
            columns = factor.apply(columns)
        yield place, columns


@column_pieces.register
def column_pieces_of_stack(op: HStack) -> Iterator[tuple[slice, Tensor]]:
    """Those of one part after the other."""
    start = 0
    for part in op.parts:
        for place, columns in column_pieces(part):
            yield slice(start + place.start, start + place.stop), columns
        start += part.shape[1]
