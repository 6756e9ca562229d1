"""The columns that one parameter has in a pullback, in the structure of its layer.

For samples n and cotangent columns r, a parameter's part of column (n, r) of Jᵀ B is

- for the weight of a linear layer b_nr ⊗ a_n, with a_n the layer's input and b_nr the
  cotangent at its output; with weight sharing (convolutions, tokens, a weight used
  twice) a sum Σ_p b_nrp ⊗ a_np over positions: :class:`KhatriRaoColumns`;
- for biases and the weights of norms a short vector: :class:`DenseColumns`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

# An elementwise pass over a matrix costs about what this many floating-point
# operations of a matrix product do for each entry.
_ELEMENTWISE_COST = 40


class LayerColumns(ABC):
    """The columns of one parameter, ``n·R`` of them, for n samples.

    Attributes:
        width: R.
        num_samples: n.
        numel: The number of entries of the parameter.
    """

    width: int
    num_samples: int
    numel: int

    @abstractmethod
    def add_gram(self, gram: Tensor, other: LayerColumns, memory: int) -> None:
        """Add the inner products of these columns with others to ``[n·R, m·Q]``.

        Args:
            gram: What to add to, in place.
            other: Of the same kind and parameter; itself for a symmetric product.
            memory: The bytes that temporaries may take.
        """

    @abstractmethod
    def rows(self) -> Tensor:
        """The columns as rows, ``[n·R, numel]``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory that they take."""


class DenseColumns(LayerColumns):
    """Columns that are formed.

    Args:
        values: ``[n, R, numel]``.
    """

    def __init__(self, values: Tensor) -> None:
        self.num_samples, self.width, self.numel = values.shape
        self._rows = values.reshape(-1, self.numel)

    def rows(self) -> Tensor:
        """The rows."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """The formed columns."""
        return self._rows.numel() * self._rows.element_size()

    def add_gram(self, gram: Tensor, other: LayerColumns, memory: int) -> None:
        """By one matrix product."""
        add_product(gram, self.rows(), other.rows(), other is self)


class KhatriRaoColumns(LayerColumns):
    """Columns Σ_p b_nrp ⊗ a_np, for each of G groups of channels.

    Args:
        inputs: a, ``[n, G, a, P]``.
        cotangents: b, ``[n, R, G, b, P]``.
        inputs_first: Whether the parameter is laid out as ``[G, a, b]`` instead of
            ``[G, b, a]``.
    """

    def __init__(
        self, inputs: Tensor, cotangents: Tensor, inputs_first: bool = False
    ) -> None:
        self.inputs, self.cotangents = inputs, cotangents
        self._inputs_first = inputs_first
        self.num_samples, self.width, self._groups, b, self.positions = cotangents.shape
        self._a, self._b = inputs.shape[2], b
        self.numel = self._groups * self._a * b

    @property
    def nbytes(self) -> int:
        """Inputs and cotangents."""
        entries = self.inputs.numel() + self.cotangents.numel()
        return entries * self.cotangents.element_size()

    def gram_flops(
        self, rows: int, columns: int, samples: int, other_positions: int
    ) -> dict[str, float]:
        """Count the floating-point operations of both ways to a Gram matrix.

        Args:
            rows: How many columns these are.
            columns: How many columns they are multiplied with.
            samples: How many pairs of samples these belong to.
            other_positions: Over how many positions the others are sums.
        """
        pairs = self._groups * self.positions * other_positions
        entries = rows * columns
        form = self.numel * (rows * self.positions + columns * other_positions)
        each = 2 * samples * self._a + entries * (2 * self._b + _ELEMENTWISE_COST)
        return {
            "pairs": float(pairs * each),
            "blocks": float(2 * form + 2 * entries * self.numel),
        }

    def _contraction(self, other: KhatriRaoColumns) -> str:
        flops = self.gram_flops(
            self.num_samples * self.width,
            other.num_samples * other.width,
            self.num_samples * other.num_samples,
            other.positions,
        )
        return min(flops, key=lambda way: flops[way])

    def add_gram(self, gram: Tensor, other: LayerColumns, memory: int) -> None:
        """In the cheaper of two ways."""
        assert isinstance(other, KhatriRaoColumns)
        if self._contraction(other) == "pairs":
            self._add_pairs(gram, other)
        else:
            self._add_blocks(gram, other, memory)

    def _add_pairs(self, gram: Tensor, other: KhatriRaoColumns) -> None:
        """Σ_pq (a_p a_qᵀ) ∘ (b_p b_qᵀ), position by position."""
        n, R, m, Q = self.num_samples, self.width, other.num_samples, other.width
        target = gram.view(n, R, m, Q)
        for group in range(self._groups):
            for p in range(self.positions):
                a, b = self.inputs[:, group, :, p], self.cotangents[:, :, group, :, p]
                for q in range(other.positions):
                    c = other.inputs[:, group, :, q]
                    d = other.cotangents[:, :, group, :, q]
                    outer = b.reshape(n * R, -1) @ d.reshape(m * Q, -1).T
                    weights = (a @ c.T)[:, None, :, None]
                    target.addcmul_(outer.view(n, R, m, Q), weights)

    def _add_blocks(self, gram: Tensor, other: KhatriRaoColumns, memory: int) -> None:
        """Form the columns for some channels at a time, and multiply them."""
        itemsize = gram.element_size()
        bytes_per_channel = (gram.shape[0] + gram.shape[1]) * self._a * itemsize
        chunk = max(1, min(self._b, memory // bytes_per_channel))
        for group in range(self._groups):
            for start in range(0, self._b, chunk):
                channels = slice(start, start + chunk)
                left = self._block(group, channels)
                right = left if other is self else other._block(group, channels)
                add_product(gram, left, right, other is self)

    def _block(self, group: int, channels: slice) -> Tensor:
        """Columns as rows for some channels, ``[n·R, c·a]``."""
        b = self.cotangents[:, :, group, channels]
        n, R, c, P = b.shape
        product = torch.bmm(b.reshape(n, R * c, P), self.inputs[:, group].mT)
        return product.view(n * R, c * self._a)

    def rows(self) -> Tensor:
        """Form the columns."""
        order = "ngap,nrgbp->nrgab" if self._inputs_first else "ngap,nrgbp->nrgba"
        formed = torch.einsum(order, self.inputs, self.cotangents)
        return formed.reshape(-1, self.numel)


def joined(parts: list[LayerColumns]) -> LayerColumns:
    """Add up the columns of several uses of one parameter."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if all(_alike(first, part) for part in parts):
        alike = [part for part in parts if isinstance(part, KhatriRaoColumns)]
        # More uses are more positions.
        return KhatriRaoColumns(
            torch.cat([part.inputs for part in alike], dim=-1),
            torch.cat([part.cotangents for part in alike], dim=-1),
            alike[0]._inputs_first,
        )
    rows = torch.stack([part.rows() for part in parts]).sum(0)
    return DenseColumns(rows.view(first.num_samples, first.width, -1))


def add_product(gram: Tensor, left: Tensor, right: Tensor, symmetric: bool) -> None:
    """Add ``left @ right.T`` to a matrix; half of it is enough if it is symmetric."""
    size = len(left)
    if not symmetric or size < 512:
        gram.addmm_(left, right.T)
        return
    # The diagonal blocks by recursion, the block beside them once.
    half = size // 2
    top, bottom = left[:half], left[half:]
    add_product(gram[:half, :half], top, top, True)
    add_product(gram[half:, half:], bottom, bottom, True)
    corner = top @ bottom.T
    gram[:half, half:] += corner
    gram[half:, :half] += corner.T


def _alike(left: LayerColumns, right: LayerColumns) -> bool:
    if not isinstance(left, KhatriRaoColumns) or not isinstance(
        right, KhatriRaoColumns
    ):
        return False
    return left._inputs_first == right._inputs_first and (
        left._groups,
        left._a,
        left._b,
    ) == (right._groups, right._a, right._b)
