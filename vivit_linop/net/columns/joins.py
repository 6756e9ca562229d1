"""Columns put together: of several uses, of parts of a parameter, of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import torch

from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.stacked import Place, StackedColumns, placed
from vivit_linop.net.views import View


def assembled(uses: Sequence[tuple[View, LayerColumns]], numel: int) -> LayerColumns:
    """Add up the columns of the uses of one parameter.

    Args:
        uses: What is used, and the columns of that.
        numel: The number of entries of the parameter.
    """
    by_place: dict[Place, list[LayerColumns]] = {}
    for view, columns in uses:
        if view.transposed:
            columns = _transposed(columns, view)
        by_place.setdefault(view.place, []).append(columns)
    parts = {place: joined(columns) for place, columns in sorted(by_place.items())}
    if (0, numel) in parts and len(parts) == 1:
        return parts[0, numel]
    places = list(parts)
    ends = itertools.pairwise(places)
    if all(left[1] <= right[0] for left, right in ends):
        return StackedColumns(parts, numel)
    first = next(iter(parts.values()))
    rows = placed([(place, part.rows()) for place, part in parts.items()], numel)
    return DenseColumns(rows.view(first.num_samples, first.width, numel))


def _transposed(columns: LayerColumns, view: View) -> LayerColumns:
    """The same columns, for the matrix of which the view is the transpose."""
    if isinstance(columns, KhatriRaoColumns):
        return columns.transposed()
    n, R = columns.num_samples, columns.width
    matrices = columns.rows().view(n, R, *view.shape).mT
    return DenseColumns(matrices.reshape(n, R, -1))


def joined(parts: list[LayerColumns]) -> LayerColumns:
    """Add up the columns of several uses of one parameter."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if isinstance(first, KhatriRaoColumns):
        alike = [part for part in parts if isinstance(part, KhatriRaoColumns)]
        if all(first.is_like(part) for part in parts):
            return first.with_more(alike[1:])
    rows = torch.stack([part.rows() for part in parts]).sum(0)
    return DenseColumns(rows.view(first.num_samples, first.width, -1))


def compacted(columns: LayerColumns) -> LayerColumns:
    """Form columns that take less memory than their factors."""
    if not isinstance(columns, KhatriRaoColumns) or columns.positions == 1:
        return columns
    width = columns.width
    if columns.formed_entries(width) > columns.factor_entries(width):
        return columns
    shape = columns.num_samples, width, columns.numel
    return DenseColumns(columns.rows().view(shape))


def share_signal(weight: LayerColumns, bias: LayerColumns) -> None:
    """Mark the columns of one use as of the same cotangents."""
    if isinstance(weight, KhatriRaoColumns) and isinstance(bias, KhatriRaoColumns):
        if weight.cotangents.shape == bias.cotangents.shape:
            bias.signal = weight.signal


def merged(
    pairs: Sequence[tuple[LayerColumns, LayerColumns]],
) -> list[tuple[LayerColumns, LayerColumns]]:
    """Put columns with the same cotangents together, such as a weight's and a bias's.

    The Gram matrix of all is the same, and that of the cotangents is needed once.
    """
    groups: dict[Hashable, list[tuple[LayerColumns, LayerColumns]]] = {}
    for left, right in pairs:
        key = left.cotangents_key, right.cotangents_key
        groups.setdefault(key, []).append((left, right))
    stacked = []
    for group in groups.values():
        left = _side_by_side([left for left, _ in group])
        same = all(left is right for left, right in group)
        stacked.append(
            (left, left if same else _side_by_side([right for _, right in group]))
        )
    return stacked


def _side_by_side(parts: list[LayerColumns]) -> LayerColumns:
    if len(parts) == 1:
        return parts[0]
    alike = [part for part in parts if isinstance(part, KhatriRaoColumns)]
    inputs = torch.cat([part.inputs for part in alike], dim=2)
    return KhatriRaoColumns(inputs, alike[0].cotangents)
