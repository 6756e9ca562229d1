"""Products with VᵀV on stored columns: through the parameters, or between samples.

In a layer with columns Σ_p b_nrp ⊗ a_np, a inputs and b outputs, let M = n P count the
positions of all samples. Through the parameters, Vᵀ(V x) takes 4 M a b operations.
Between the samples,

    (VᵀV x)_nr = Σ_p ⟨b_nrp, Σ_mq (a_npᵀ a_mq) Σ_s x_ms b_msq⟩

takes 2 M² b, once the inner products of the inputs are known, which take 2 M² a. So it
is the cheaper way for few samples of wide layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.pieces import Piece, StoredColumns, counted_from

# What is worked on at a time.
CACHED_BYTES = 2**22


class InnerProducts:
    """Multiplies with VᵀV, each layer in its cheaper way.

    Args:
        columns: V.
        vectors: How many vectors are expected to be multiplied, one with another.
    """

    def __init__(self, columns: StoredColumns, vectors: int) -> None:
        pieces = columns.pieces
        self._places = [piece.place for piece in pieces]
        self._between: list[BetweenSamples] = []
        through = {name for piece in pieces for name in piece.columns}
        for names in pieces[0].groups:
            if parts := _alike(pieces, names):
                if between_pays(parts, vectors):
                    self._between.append(BetweenSamples(parts))
                    through -= set(names)
        self._through: StoredColumns | None = None
        if through:
            self._through = StoredColumns([_only(piece, through) for piece in pieces])

    def multiply(self, X: Tensor) -> Tensor:
        """Return VᵀV X, ``[N·R, K] -> [N·R, K]``."""
        first = self._places[0].start
        places = [counted_from(first, place) for place in self._places]
        rows = X.T.contiguous()
        parts = [rows[:, place] for place in places]
        total = rows.new_zeros(rows.shape)
        for layer in self._between:
            layer.add_product(parts, [total[:, place] for place in places])
        if self._through is not None:
            through = self._through.multiply_adjoint(self._through.multiply(X))
            return total.T.add_(through)
        return total.T


class BetweenSamples:
    """VᵀV of a layer, by the inner products of its inputs.

    Args:
        parts: The columns, some samples after the other.
    """

    def __init__(self, parts: Sequence[KhatriRaoColumns]) -> None:
        self._parts = parts
        rows = torch.cat([part.positions_as_rows() for part in parts], dim=1)
        self._products = rows @ rows.mT

    def add_product(self, weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Add VᵀV times ``[K, n·R]`` of each part to the same.

        Some vectors at a time: memory that is used again is faster than fresh memory.
        """
        entries = sum(part.positions * part.num_samples for part in self._parts)
        entries *= self._parts[0].cotangents[0, 0, ..., 0].numel()
        chunk = max(1, CACHED_BYTES // (entries * weights[0].element_size()))
        for start in range(0, len(weights[0]), chunk):
            few = slice(start, start + chunk)
            images = self._products @ self._signals([rows[few] for rows in weights])
            first = 0
            for part, target in zip(self._parts, out, strict=True):
                last = first + part.num_samples * part.positions
                target[few] += _components(part, images[:, first:last], target[few])
                first = last

    def _signals(self, weights: Sequence[Tensor]) -> Tensor:
        """Σ_s x_ns b_nsp: groups, positions of all samples, vectors side by side."""
        signals = []
        for part, rows in zip(self._parts, weights, strict=True):
            _, _, groups, channels, positions = part.cotangents.shape
            given = part.signals(rows.reshape(len(rows), part.num_samples, part.width))
            given = given.unflatten(2, (groups, channels, positions))
            turned = given.permute(2, 1, 4, 0, 3)
            signals.append(turned.reshape(groups, -1, len(rows) * channels))
        return torch.cat(signals, dim=1) if len(signals) > 1 else signals[0]


def _components(part: KhatriRaoColumns, images: Tensor, like: Tensor) -> Tensor:
    """⟨b_nr, image_n⟩ of images as signals were laid out, ``[K, n·R]``."""
    groups, channels = part.cotangents.shape[2:4]
    shape = groups, part.num_samples, part.positions, len(like), channels
    turned = images.reshape(shape).permute(3, 1, 0, 4, 2)
    return part.components(turned.reshape(len(like), part.num_samples, -1)).flatten(1)


def between_pays(parts: Sequence[KhatriRaoColumns], vectors: int) -> bool:
    """Whether a product between samples takes fewer operations.

    Args:
        parts: The columns of a layer, some samples after the other.
        vectors: How many are multiplied, for the inner products of the inputs.
    """
    positions = sum(part.num_samples * part.positions for part in parts)
    inputs, outputs = parts[0].inputs.shape[2], parts[0].cotangents.shape[3]
    between = 2 * positions * (vectors * outputs + inputs)
    return between < 4 * vectors * inputs * outputs


def _alike(pieces: Sequence[Piece], names: list[str]) -> list[KhatriRaoColumns]:
    """The columns of parameters with the same cotangents, as of one; [] for others."""
    parts = []
    for piece in pieces:
        # Sums over positions, of inputs as they are; subclasses have others.
        columns = [
            part
            for name in names
            if type(part := piece.columns.get(name)) is KhatriRaoColumns
        ]
        if names not in piece.groups or len(columns) < len(names):
            return []
        first, *others = columns  # of one alone nothing is copied
        parts.append(first.beside(others) if others else first)
    return parts


def _only(piece: Piece, names: set[str]) -> Piece:
    """The columns of some parameters."""
    columns = {name: part for name, part in piece.columns.items() if name in names}
    sizes = {name: size for name, size in piece.sizes.items() if name in names}
    return Piece(piece.place, piece.samples, columns, sizes, piece.number)
