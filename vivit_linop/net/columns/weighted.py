"""Columns whose entries have weights: diag(w) Jᵀ B, parameter by parameter."""

from __future__ import annotations

import itertools

from torch import Tensor

from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.outer_sums import OuterSums
from vivit_linop.net.columns.stacked import StackedColumns
from vivit_linop.net.columns.tables import TableColumns


def weighted(columns: LayerColumns, weights: Tensor) -> LayerColumns:
    """Return columns with a weight for each entry, ``[d]``, in the layer's structure.

    Weights of whole layers, of inputs, of outputs or of rows of a table are those of
    inputs or cotangents. Others are multiplied with columns formed for some channels.
    """
    if isinstance(columns, StackedColumns):
        parts = {
            place: weighted(part, weights[slice(*place)])
            for place, part in columns.parts.items()
        }
        return StackedColumns(parts, columns.numel)
    if isinstance(columns, TableColumns):
        rows = weights.view(-1, columns.cotangents.shape[3])[columns.index]
        return columns.with_cotangents(columns.cotangents * rows.mT[:, None, None])
    if isinstance(columns, KhatriRaoColumns):
        return _weighted_khatri_rao(columns, weights)
    rows = columns.rows() * weights
    return DenseColumns(rows.view(columns.num_samples, columns.width, -1))


def _weighted_khatri_rao(columns: KhatriRaoColumns, weights: Tensor) -> LayerColumns:
    groups, channels = columns.cotangents.shape[2:4]
    inputs = columns.inputs.shape[2]
    first, second = (inputs, channels) if columns.inputs_first else (channels, inputs)
    W = weights.view(groups, first, second)
    W = W.mT if columns.inputs_first else W
    if (W == W[:, :1]).all():
        a = columns.inputs * W[:, 0, :, None]
        result = KhatriRaoColumns(a, columns.cotangents, columns.inputs_first)
        result.cotangents_key = columns.cotangents_key
        return result
    if (W == W[:, :, :1]).all():
        b = columns.cotangents * W[:, :, 0, None]
        return KhatriRaoColumns(columns.inputs, b, columns.inputs_first)
    return WeightedKhatriRao(columns, W)


class WeightedKhatriRao(KhatriRaoColumns):
    """Khatri–Rao columns, each multiplied entry by entry with weights ``[G, b, a]``."""

    def __init__(self, columns: KhatriRaoColumns, weights: Tensor) -> None:
        super().__init__(columns.inputs, columns.cotangents, columns.inputs_first)
        self.weights = weights

    def contraction(self, other: OuterSums) -> str:
        """Weights do not separate."""
        return "blocks"

    def block(self, group: int, channels: slice) -> Tensor:
        weights = self.weights[group, channels].reshape(-1)
        return super().block(group, channels) * weights

    def rows(self) -> Tensor:
        return super().rows() * self._laid_out(self.weights)

    squared_norms = LayerColumns.squared_norms

    def _pairs_pay(self, other: KhatriRaoColumns) -> bool:
        return self.positions * other.positions <= self.width

    def _sample_grams_by_pairs(self, other: KhatriRaoColumns) -> Tensor:
        """Σ_ba β_b β'_b w_ba α_a α'_a, the inputs' sums first."""
        weights, b, d = self.weights, self.cotangents, other.cotangents
        if isinstance(other, WeightedKhatriRao):
            weights = weights * other.weights
        total = b.new_zeros(self.num_samples, self.width, other.width)
        for p, q in itertools.product(range(self.positions), range(other.positions)):
            inputs = self.inputs[:, :, None, :, p] * other.inputs[:, :, None, :, q]
            channels = (inputs @ weights.mT).squeeze(2)  # [n, G, b]
            mixed = b[..., p] * channels.unsqueeze(1)
            total += mixed.flatten(2) @ d[..., q].flatten(2).mT
        return total
