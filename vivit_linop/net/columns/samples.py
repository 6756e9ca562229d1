"""Inner products between the columns of each sample alone."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.stacked import StackedColumns
from vivit_linop.net.columns.tables import TableColumns
from vivit_linop.net.columns.weighted import WeightedKhatriRao


def sample_grams(left: LayerColumns, right: LayerColumns, memory: int) -> Tensor:
    """Return the inner products of each sample's columns alone, ``[n, R, Q]``.

    Args:
        left: n·R columns.
        right: n·Q columns of the same parameter and the same samples.
        memory: The bytes that columns formed on the way may take.
    """
    if isinstance(left, KhatriRaoColumns) and isinstance(right, KhatriRaoColumns):
        if left.is_like(right):
            return _of_khatri_rao(left, right, memory)
    if isinstance(left, StackedColumns) and isinstance(right, StackedColumns):
        if left.parts.keys() == right.parts.keys():
            parts = [
                sample_grams(part, right.parts[place], memory)
                for place, part in left.parts.items()
            ]
            return torch.stack(parts).sum(0)
    rows, others = (c.rows().view(c.num_samples, c.width, -1) for c in (left, right))
    return rows @ others.mT


def _of_khatri_rao(
    left: KhatriRaoColumns, right: KhatriRaoColumns, memory: int
) -> Tensor:
    """By pairs of positions, or where these are many by blocks."""
    b, d = left.cotangents, right.cotangents
    n, R, groups, channels, P = b.shape
    Q, inputs = d.shape[1], left.numel // (groups * channels)
    by_pairs = P * (inputs + R * channels + R * Q * channels / P)
    by_blocks = R * channels * inputs * (1 + Q / P)
    if isinstance(left, WeightedKhatriRao):
        if P * d.shape[4] <= R:
            return _of_weighted(left, right)
    elif isinstance(left, TableColumns) or by_pairs <= by_blocks:
        if isinstance(left, TableColumns) and isinstance(right, TableColumns):
            same = left.index[:, :, None] == right.index[:, None, :]
            products = same.to(b).unsqueeze(1)
        else:
            products = left.inputs.mT @ right.inputs  # [n, G, P, P]
        total = b.new_zeros(n, R, Q)
        for g in range(groups):
            mixed = b[:, :, g].flatten(1, 2) @ products[:, g]
            total += mixed.view(n, R, -1) @ d[:, :, g].flatten(2).mT
        return total
    total = b.new_zeros(n, R, Q)
    bytes_per_channel = n * (R + Q) * inputs * b.element_size()
    chunk = max(1, min(channels, memory // bytes_per_channel))
    for g in range(groups):
        for start in range(0, channels, chunk):
            part = slice(start, start + chunk)
            block = left.block(g, part).view(n, R, -1)
            other = block if right is left else right.block(g, part).view(n, Q, -1)
            total += block @ other.mT
    return total


def _of_weighted(left: WeightedKhatriRao, right: KhatriRaoColumns) -> Tensor:
    """By pairs of positions: Σ_ba β_b β'_b w_ba α_a α'_a, the inputs' sums first."""
    weights = left.weights
    if isinstance(right, WeightedKhatriRao):
        weights = weights * right.weights
    b, d = left.cotangents, right.cotangents
    total = b.new_zeros(len(b), b.shape[1], d.shape[1])
    for p, q in itertools.product(range(b.shape[4]), range(d.shape[4])):
        inputs = left.inputs[:, :, None, :, p] * right.inputs[:, :, None, :, q]
        channels = (inputs @ weights.mT).squeeze(2)  # [n, G, b]
        mixed = b[..., p] * channels.unsqueeze(1)
        total += mixed.flatten(2) @ d[..., q].flatten(2).mT
    return total
