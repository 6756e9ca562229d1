"""The columns that one parameter has in a pullback, in the structure of its layer.

For samples n and cotangent columns r, a parameter's part of column (n, r) of Jᵀ B is

- for the weight of a linear layer b_nr ⊗ a_n, with a_n the layer's input and b_nr the
  cotangent at its output; with weight sharing (convolutions, tokens, a weight used
  twice) a sum Σ_p b_nrp ⊗ a_np over positions: :class:`KhatriRaoColumns`;
- for biases and the weights of norms a short vector: :class:`DenseColumns`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

# An elementwise pass over a matrix costs about what this many floating-point
# operations of a matrix product do for each entry.
_ELEMENTWISE_COST = 40
# Temporaries that are read again right away should still be in a cache.
_WORKING_SET = 8 * 2**20


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

    def squared_norms(self, memory: int) -> Tensor:
        """The squared norms of the columns, ``[n·R]``.

        Args:
            memory: The bytes that temporaries may take, here and below.
        """
        return self.rows().square().sum(1)

    def entry_squares(self, memory: int) -> Tensor:
        """The squares of the entries, summed over all columns, ``[numel]``."""
        return self.rows().square().sum(0)

    def sample_entry_squares(self, memory: int) -> Tensor:
        """The squares of the entries, summed over each sample, ``[n, numel]``."""
        rows = self.rows().view(self.num_samples, self.width, self.numel)
        return rows.square().sum(1)

    def entry_sums(self) -> Tensor:
        """The sum of all columns, ``[numel]``."""
        return self.rows().sum(0)

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

    # Squares and sums of entries, without forming all columns ------------------------

    def squared_norms(self, memory: int) -> Tensor:
        """Σ_pq (a_pᵀ a_q)(b_pᵀ b_q) for each column, or from its block if cheaper."""
        a, b, P = self._a, self._b, self.positions
        if P == 1:
            norms = self.cotangents.square().sum((3, 4))
            norms = norms * self.inputs.square().sum((2, 3)).unsqueeze(1)
            return norms.sum(2).reshape(-1)
        pairs = P * P * (2 * b + 2 * a / self.width + _ELEMENTWISE_COST)
        blocks = a * b * (2 * P + _ELEMENTWISE_COST)
        by_pairs = pairs < blocks
        entries = self._groups * (P * P if by_pairs else a * b)
        norms = self.cotangents.new_empty(self.num_samples, self.width)
        for part in self._parts(entries * (self.width + 1), memory):
            A, B = self.inputs[part], self.cotangents[part]
            if by_pairs:
                products = torch.einsum("nrgbp,nrgbq->nrgpq", B, B)
                products *= (A.mT @ A).unsqueeze(1)
            else:
                products = torch.einsum("ngap,nrgbp->nrgba", A, B).square_()
            # Of pairs that cancel, rounding may leave less than nothing.
            norms[part] = products.sum((2, 3, 4)).clamp_(min=0.0)
        return norms.reshape(-1)

    def entry_squares(self, memory: int) -> Tensor:
        """(Σ_r b_r²)ᵀ (a²), a matrix product; with positions, from pairs or blocks."""
        a, b, P = self._a, self._b, self.positions
        total = self.inputs.new_zeros(self._groups, b, a)
        by_pairs = self._squares_by_pairs()
        size = P * (P + 1) // 2 * (a + b) if by_pairs else self.width * a * b
        for part in self._parts(self._groups * size, memory):
            if by_pairs:
                A, B = self._pair_products(part)
                total += torch.einsum("ngbk,ngak->gba", B, A)
            else:
                for group in range(self._groups):
                    block = self._sample_blocks(part, group)
                    total[group] += block.square_().sum((0, 1))
        return self._laid_out(total.clamp_(min=0.0))

    def sample_entry_squares(self, memory: int) -> Tensor:
        """As ``entry_squares``, sample by sample."""
        a, b, P = self._a, self._b, self.positions
        total = self.inputs.new_empty(self.num_samples, self._groups, b, a)
        by_pairs = self._squares_by_pairs()
        size = P * (P + 1) // 2 * (a + b) if by_pairs else self.width * a * b
        for part in self._parts(self._groups * size, memory):
            if by_pairs:
                A, B = self._pair_products(part)
                total[part] = B @ A.mT
            else:
                for group in range(self._groups):
                    block = self._sample_blocks(part, group)
                    total[part, group] = block.square_().sum(1)
        return self._laid_out(total.clamp_(min=0.0))

    def entry_sums(self) -> Tensor:
        """Σ b aᵀ over all columns and positions."""
        A, B = self.inputs, self.cotangents.sum(1)
        if self.positions <= self._b:
            # Positions beside samples: one product for a group, for a copy of both.
            left, right = (X.permute(1, 2, 0, 3).flatten(2) for X in (B, A))
            return self._laid_out(left @ right.mT)
        total = A.new_zeros(self._groups, self._b, self._a)
        for part in self._parts(self.numel, _WORKING_SET):
            total += (B[part] @ A[part].mT).sum(0)
        return self._laid_out(total)

    def kronecker_sums(
        self, reduced_cotangents: bool, reduced_inputs: bool, affine: bool
    ) -> tuple[Tensor, Tensor]:
        """Sums of outer products of cotangents and of inputs, group by group.

        Args:
            reduced_cotangents: Whether cotangents are first summed over positions.
            reduced_inputs: Whether inputs are first averaged over positions.
            affine: Whether a 1 is appended to the inputs, for a bias.

        Returns:
            Σ b bᵀ ``[G, b, b]`` and Σ a aᵀ ``[G, a, a]``.
        """
        A, B = self.inputs, self.cotangents
        if reduced_inputs:
            A = A.mean(3, keepdim=True)
        if reduced_cotangents:
            B = B.sum(4, keepdim=True)
        if affine:
            A = torch.cat([A, torch.ones_like(A[:, :, :1])], dim=2)
        A = A.permute(1, 2, 0, 3).flatten(2)
        B = B.permute(2, 3, 0, 1, 4).flatten(2)
        return _outer_sums(B), _outer_sums(A)

    @property
    def inputs_first(self) -> bool:
        """Whether the parameter is laid out as ``[G, a, b]``."""
        return self._inputs_first

    def _squares_by_pairs(self) -> bool:
        """Whether pairs of positions cost less than the blocks of all columns."""
        pairs = self.positions * (self.positions + 1) // 2
        a, b, R = self._a, self._b, self.width
        # The products of pairs are written, blocks are written and squared.
        by_pairs = pairs * (2 * a * b + _ELEMENTWISE_COST * (a + b) + 2 * R * b)
        return by_pairs < R * a * b * (2 * self.positions + _ELEMENTWISE_COST)

    def _pair_products(self, part: slice) -> tuple[Tensor, Tensor]:
        """Products over pairs p ≤ q of inputs, and of cotangents summed over columns.

        Pairs p < q count twice: ``[n, G, a, pairs]``, ``[n, G, b, pairs]``.
        """
        A, B = self.inputs[part], self.cotangents[part]
        if self.positions == 1:
            return A.square(), B.square().sum(1)
        p, q = torch.triu_indices(self.positions, self.positions, device=A.device)
        inputs = A[..., p] * A[..., q]
        columns = B.permute(0, 2, 3, 1, 4)
        cotangents = (columns.mT @ columns)[..., p, q]
        cotangents[..., p != q] *= 2.0
        return inputs, cotangents

    def _sample_blocks(self, part: slice, group: int) -> Tensor:
        """Columns of some samples as blocks, ``[n, R, b, a]``."""
        B = self.cotangents[part, :, group]
        n, R, b, P = B.shape
        product = torch.bmm(B.reshape(n, R * b, P), self.inputs[part, group].mT)
        return product.view(n, R, b, self._a)

    def _parts(self, entries: int, memory: int) -> Iterator[slice]:
        """Cut the samples so that temporaries of so many entries a sample fit."""
        itemsize = self.inputs.element_size()
        limit = min(memory, _WORKING_SET) if self.inputs.is_cpu else memory
        size = max(1, limit // (entries * itemsize))
        for start in range(0, self.num_samples, size):
            yield slice(start, min(start + size, self.num_samples))

    def _laid_out(self, entries: Tensor) -> Tensor:
        """From ``[…, G, b, a]`` to the layout of the parameter, ``[…, numel]``."""
        return (entries.mT if self._inputs_first else entries).flatten(-3)


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


def _outer_sums(columns: Tensor) -> Tensor:
    """Sums of outer products of columns, ``[G, d, k] -> [G, d, d]``."""
    sums = columns.new_zeros(*columns.shape[:2], columns.shape[1])
    for total, group in zip(sums, columns, strict=True):
        add_product(total, group, group, True)
    return sums


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
