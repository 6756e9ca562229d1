"""The columns of a table whose rows are looked up: embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.outer_sums import ELEMENTWISE_COST


class TableColumns(KhatriRaoColumns):
    """Khatri–Rao columns whose inputs are one-hot, kept as numbers of rows.

    Position p of sample n looks up row i_np, and its column has b_nrp there. What is
    computed never has the length of the table, unless the result has.

    Args:
        index: i, ``[n, P]``.
        cotangents: b, ``[n, R, 1, b, P]``; zero at positions of padding.
        rows: How many rows the table has.
        padding: Which positions use no row, ``[n, P]``; None if there are none.
    """

    of_data = frozenset({"_distinct", "_places"})

    def __init__(
        self,
        index: Tensor,
        cotangents: Tensor,
        rows: int,
        padding: Tensor | None = None,
    ) -> None:
        self.index, self.cotangents = index, cotangents
        self.inputs_first, self._groups, self.cotangents_key = True, 1, object()
        self.num_samples, self.width, _, self._b, self.positions = cotangents.shape
        self._a = rows
        self.numel, self._padding = rows * self._b, padding

    @property
    def inputs(self) -> Tensor:  # type: ignore[override]
        """The one-hot inputs, formed anew, ``[n, 1, rows, P]``."""
        one_hot = F.one_hot(self.index, self._a)
        if self._padding is not None:
            one_hot = one_hot * ~self._padding.unsqueeze(2)
        return one_hot.mT.unsqueeze(1).to(self.cotangents)

    @property
    def _is_padding(self) -> Tensor:
        if self._padding is None:
            return torch.zeros_like(self.index, dtype=torch.bool)
        return self._padding

    @property
    def forward_flops(self) -> int:
        """Looking up costs what copying does."""
        return 2 * self.positions * self._b

    @property
    def nbytes(self) -> int:
        """The inputs are their numbers."""
        return self.index.nbytes + self.cotangents.nbytes

    def factor_entries(self, width: int) -> int:
        return self.index.numel() + width * self.cotangents.numel() // self.width

    def gram_flops(
        self, samples: tuple[int, int], widths: tuple[int, int], other_positions: int
    ) -> dict[str, float]:
        """Count the only way, as if all samples looked up the same rows."""
        entries = samples[0] * widths[0] * samples[1] * widths[1]
        each = min(self.positions, other_positions) * (2 * self._b + ELEMENTWISE_COST)
        return {"rows": float(entries * each)}

    @cached_property
    def _distinct(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that each sample looks up, each once, in the order of the rows.

        Numbers of rows ``[M]`` and of samples ``[M]``, and the sums of the cotangents
        over the positions that are alike, ``[M, R, b]``.
        """
        n, P = self.index.shape
        samples = torch.arange(n, device=self.index.device).unsqueeze(1)
        keys, places = (self.index * n + samples).unique(return_inverse=True)
        b = self.cotangents.squeeze(2).permute(0, 3, 1, 2).reshape(n * P, -1)
        sums = b.new_zeros(len(keys), b.shape[1]).index_add_(0, places.reshape(-1), b)
        return keys // n, keys % n, sums.view(len(keys), self.width, self._b)

    def add_gram(self, gram: Tensor, other: LayerColumns, memory: int) -> None:
        """Row by row of the table, between the samples that look it up."""
        if not isinstance(other, TableColumns):
            formed = KhatriRaoColumns(self.inputs, self.cotangents, inputs_first=True)
            formed.add_gram(gram, other, memory)
            return
        target = gram.view(self.num_samples, self.width, other.num_samples, other.width)
        _, samples, sums = self._distinct
        _, others, other_sums = other._distinct
        places, other_places = self._places, other._places
        for row in places.keys() & other_places.keys():
            left, right = places[row], other_places[row]
            b, d = sums[left], other_sums[right]
            block = b.flatten(0, 1) @ d.flatten(0, 1).T
            block = block.view(len(b), self.width, len(d), other.width)
            # Samples are there once each.
            index = samples[left, None], others[right]
            target.transpose(1, 2)[index] += block.transpose(1, 2)

    @cached_property
    def _places(self) -> dict[int, slice]:
        """Where each row is among the distinct ones."""
        # On the host, which needs all of them.
        rows, counts = self._distinct[0].cpu().unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return dict(zip(rows.tolist(), map(slice, starts, ends), strict=True))

    def combine(self, signals: Tensor, out: Tensor, add: bool) -> None:
        if not add:
            out.zero_()
        shape = len(self.index), self._b, self.positions
        for signal, table in zip(signals, out, strict=True):
            parts = signal.reshape(shape).mT.reshape(-1, self._b)
            table.view(-1, self._b).index_add_(0, self.index.reshape(-1), parts)

    def images(self, rows: Tensor) -> Tensor:
        found = rows.view(len(rows), -1, self._b)[:, self.index]  # [K, n, P, b]
        return found.mT.reshape(len(rows), len(self.index), -1)

    def rows(self) -> Tensor:
        rows, samples, sums = self._distinct
        shape = self.num_samples, self._a, self.width, self._b
        formed = sums.new_zeros(shape)
        formed[samples, rows] = sums
        return formed.transpose(1, 2).reshape(-1, self.numel)

    def sizes(self) -> Tensor:
        return torch.linalg.vector_norm(self.cotangents, dim=(2, 3, 4))

    def residual(self, weights: Tensor, expected: Tensor) -> Tensor:
        """All of the difference: rows are only added up."""
        return LayerColumns.residual(self, weights, expected)

    def with_cotangents(self, cotangents: Tensor) -> KhatriRaoColumns:
        return TableColumns(self.index, cotangents, self._a, self._padding)

    def squared_norms(self, memory: int) -> Tensor:
        _, samples, sums = self._distinct
        norms = sums.new_zeros(self.num_samples, self.width)
        return norms.index_add_(0, samples, sums.square().sum(2)).reshape(-1)

    def _pairs_pay(self, other: KhatriRaoColumns) -> bool:
        return True

    def _input_products(self, other: KhatriRaoColumns) -> Tensor:
        if not isinstance(other, TableColumns):
            return super()._input_products(other)
        same = self.index[:, :, None] == other.index[:, None, :]
        return same.to(self.cotangents).unsqueeze(1)

    def entry_squares(self, memory: int) -> Tensor:
        rows, _, sums = self._distinct
        return self._placed(rows, sums.square().sum(1))

    def sample_entry_squares(self, memory: int) -> Tensor:
        rows, samples, sums = self._distinct
        squares = sums.new_zeros(self.num_samples, self._a, self._b)
        squares[samples, rows] = sums.square().sum(1)
        return squares.flatten(1)

    def entry_sums(self) -> Tensor:
        rows, _, sums = self._distinct
        return self._placed(rows, sums.sum(1))

    def _placed(self, rows: Tensor, entries: Tensor) -> Tensor:
        table = entries.new_zeros(self._a, self._b)
        return table.index_add_(0, rows, entries).reshape(-1)

    def with_more(self, others: Sequence[KhatriRaoColumns]) -> KhatriRaoColumns:
        """More look-ups are more positions."""
        tables = [part for part in (self, *others) if isinstance(part, TableColumns)]
        if len(tables) <= len(others):
            return super().with_more(others)
        return TableColumns(
            torch.cat([part.index for part in tables], dim=1),
            torch.cat([part.cotangents for part in tables], dim=-1),
            self._a,
            torch.cat([part._is_padding for part in tables], dim=1),
        )
