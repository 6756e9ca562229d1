"""Gram matrices of columns that are sums of outer products, and what they cost.

For two samples and their cotangents the inner product of the columns is
Σ_pq (a_npᵀ a_mq) (b_nrpᵀ b_msq). Which sum comes first is a choice between three
contractions: pairs of positions, blocks of formed columns, or samples one by one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vivit_linop.net.columns.base import ColumnCost, LayerColumns, add_product

# An elementwise pass over a matrix costs about what this many floating-point
# operations of a large matrix product do for each entry. An operation of many small
# products costs as much as some of a large one, and each small product something more.
ELEMENTWISE_COST = 40
_SMALL_PRODUCT_COST, _SMALL_PRODUCT_FLOPS = 2, 2e5
# On a GPU each call takes Python and a launch, in operations of a large product: some
# 20 microseconds were measured beside an H100.
_LAUNCH_FLOPS = 1e9
# How much is worked on at a time: on the CPU what caches hold, and what does not count
# beside the rest; on other devices enough to be busy.
_CACHED_BYTES, _PASSING_BYTES = 4 * 2**20, 64 * 2**20
_DEVICE_FACTOR = 64
# A symmetric product position by position, in an elementwise way, is halved while a
# block has twice this many rows; on other devices than the CPU twice the second.
_SYMMETRIC_PAIRS_LEAF, _DEVICE_PAIRS_LEAF = 140, 4096
# What a matrix that is multiplied entry by entry may take.
_OUTER_BYTES = 16 * 2**20
# The inputs of how many samples are multiplied together.
_TOGETHER = 4


class OuterSums(LayerColumns):
    """Factors of columns Σ_p b_nrp ⊗ a_np, whose Gram matrix needs no column formed.

    Attributes:
        inputs: a, ``[n, G, a, P]``.
        input_entries: How many entries they have.
        cotangents: b, ``[n, R, G, b, P]``.
        inputs_first: Whether the parameter is laid out as ``[G, a, b]`` instead of
            ``[G, b, a]``.
        positions: P.
    """

    inputs: Tensor
    input_entries: int
    cotangents: Tensor
    inputs_first: bool
    positions: int
    _groups: int
    _a: int
    _b: int

    def is_like(self, other: LayerColumns) -> bool:
        """Whether others have factors of the same channels, in the same layout."""
        return isinstance(other, OuterSums) and (
            (self.inputs_first, self._groups, self._a, self._b)
            == (other.inputs_first, other._groups, other._a, other._b)
        )

    @property
    def forward_flops(self) -> int:
        """The operations of the layer's forward pass, one sample."""
        return 2 * self.positions * self.numel

    def factor_entries(self, width: int) -> int:
        """Count the entries of the factors with a number of columns a sample."""
        each = self.cotangents.numel() // self.width
        return self.input_entries + width * each

    def formed_entries(self, width: int) -> int:
        """Count the entries of formed columns."""
        return self.num_samples * width * self.numel

    def gram_flops(
        self, samples: tuple[int, int], widths: tuple[int, int], other_positions: int
    ) -> dict[str, float]:
        """Count what all ways to a Gram matrix cost, in operations of a large product.

        Args:
            samples: How many samples these columns belong to, and the others.
            widths: How many columns a sample has of these, and of the others.
            other_positions: Over how many positions the others are sums.
        """
        pairs = samples[0] * samples[1]
        rows, columns = samples[0] * widths[0], samples[1] * widths[1]
        a, b, p, q = self._a, self._b, self.positions, other_positions
        each = 2 * pairs * a + rows * columns * (2 * b + ELEMENTWISE_COST)
        form = a * b * (rows * p + columns * q)
        # For a pair of samples: aᵀa', then b (aᵀa'), then its product with b'.
        products = p * q * (a + widths[0] * b) + q * widths[0] * widths[1] * b
        return {
            "pairs": float(self._groups * p * q * each),
            "blocks": float(2 * self._groups * (form + rows * columns * a * b)),
            "inputs": self._groups
            * pairs
            * (_SMALL_PRODUCT_COST * 2.0 * products + _SMALL_PRODUCT_FLOPS),
        }

    def cost(self, samples: int, width: int, shared: bool) -> ColumnCost:
        """By the cheapest contraction, stored as factors or formed."""
        flops = self.gram_flops((samples, samples), (width, width), self.positions)
        way = min(flops, key=flops.__getitem__)
        between = 2.0 * self._groups * (samples * self.positions) ** 2 * self._b
        forward, gram = float(samples * self.forward_flops), flops[way] / 2
        factors = self.factor_entries(0 if shared else width) / self.num_samples
        formed = self.formed_entries(width) / self.num_samples
        if self.positions > 1 and formed <= factors:
            entries = float(samples * formed)
            product = 2 * entries
            return ColumnCost("blocks", forward, gram, product, 2 * product, entries)
        entries = float(samples * factors)
        product = forward + 2 * entries
        inner = min(2 * product, between + 4 * entries)
        return ColumnCost(way, forward, gram, product, inner, entries)

    def contraction(self, other: OuterSums) -> str:
        """The cheapest way to the Gram matrix with others: see ``gram_flops``."""
        flops = self.gram_flops(
            (self.num_samples, other.num_samples),
            (self.width, other.width),
            other.positions,
        )
        if not self.cotangents.is_cpu:
            # Beside those of blocks, which are few.
            each = 3 * self._groups * _LAUNCH_FLOPS
            flops["pairs"] += each * self.positions * other.positions
            flops["inputs"] += each * other.num_samples
        return min(flops, key=flops.__getitem__)

    def add_gram(self, gram: Tensor, other: LayerColumns, memory: int) -> None:
        """In the cheapest of three ways."""
        if not isinstance(other, OuterSums) or not self.is_like(other):
            add_product(gram, self.rows(), other.rows(), False)
            return
        ways = {
            "pairs": self._add_pairs,
            "blocks": self._add_blocks,
            "inputs": self._add_inputs,
        }
        ways[self.contraction(other)](gram, other, memory)

    def _add_pairs(self, gram: Tensor, other: OuterSums, memory: int) -> None:
        """Σ_pq (a_p a_qᵀ) ∘ (b_p b_qᵀ), position by position."""
        if other is self:
            leaf = _SYMMETRIC_PAIRS_LEAF if gram.is_cpu else _DEVICE_PAIRS_LEAF
            split = len(gram) >= 2 * leaf
        else:
            limit = min(memory, _share(_OUTER_BYTES, gram.device))
            split = gram.numel() * gram.element_size() > limit
        self._order_by_position()
        other._order_by_position()
        if split and self.num_samples > 1:
            half = self.num_samples // 2
            first, second = self._samples(slice(half)), self._samples(slice(half, None))
            row = half * self.width
            if other is self:
                first._add_pairs(gram[:row, :row], first, memory)
                second._add_pairs(gram[row:, row:], second, memory)
                first._add_pairs(gram[:row, row:], second, memory)
            else:
                first._add_pairs(gram[:row], other, memory)
                second._add_pairs(gram[row:], other, memory)
            return
        n, R, m, Q = self.num_samples, self.width, other.num_samples, other.width
        target, others = gram.view(n, R, m, Q), other.inputs
        for group in range(self._groups):
            for p in range(self.positions):
                a, b = self.inputs[:, group, :, p], self.cotangents[:, :, group, :, p]
                for q in range(other.positions):
                    c = others[:, group, :, q]
                    d = other.cotangents[:, :, group, :, q]
                    outer = b.reshape(n * R, -1) @ d.reshape(m * Q, -1).T
                    weights = (a @ c.T)[:, None, :, None]
                    target.addcmul_(outer.view(n, R, m, Q), weights)

    def _add_blocks(self, gram: Tensor, other: OuterSums, memory: int) -> None:
        """Form the columns for some channels at a time, and multiply them."""
        itemsize = gram.element_size()
        bytes_per_channel = (gram.shape[0] + gram.shape[1]) * self._a * itemsize
        passing = min(memory, _share(_PASSING_BYTES, gram.device))
        chunk = max(1, min(self._b, passing // bytes_per_channel))
        for group in range(self._groups):
            for start in range(0, self._b, chunk):
                channels = slice(start, start + chunk)
                left = self.block(group, channels)
                right = left if other is self else other.block(group, channels)
                add_product(gram, left, right, other is self)

    def _add_inputs(self, gram: Tensor, other: OuterSums, memory: int) -> None:
        """⟨b (aᵀ a'), b'⟩ for pairs of samples, some samples n with each sample m."""
        n, R, m, Q = self.num_samples, self.width, other.num_samples, other.width
        target = gram.view(n, R, m, Q)
        self._order_by_position()
        other._order_by_position()
        per_sample = R * self._b * other.positions * gram.element_size()
        cached = min(memory, _share(_CACHED_BYTES, gram.device))
        chunk = max(1, min(n, cached // per_sample))
        for group in range(self._groups):
            c, d = other.inputs[:, group], other.cotangents[:, :, group].flatten(2)
            for start in range(0, n, chunk):
                part = self._samples(slice(start, start + chunk))
                a = part.inputs[:, group].mT.contiguous()
                b = part.cotangents[:, :, group].reshape(len(a), -1, self.positions)
                # Of a symmetric matrix, what is above the diagonal.
                others = range(start if other is self else 0, m)
                for m0, wide in _side_by_side(c, others):
                    products = (a @ wide).unflatten(2, (-1, other.positions))
                    for k, m1 in enumerate(range(m0, m0 + products.shape[2])):
                        size = min(m1 + 1 - start, len(a)) if other is self else len(a)
                        product = b[:size] @ products[:size, :, k]
                        block = product.reshape(-1, d.shape[2]) @ d[m1].T
                        rows = slice(start, start + size)
                        target[rows, :, m1] += block.view(-1, R, Q)

    @abstractmethod
    def _samples(self, samples: slice) -> OuterSums:
        """The columns of some samples."""

    def block(self, group: int, channels: slice) -> Tensor:
        """Columns as rows for some channels, ``[n·R, c·a]``."""
        b = self.cotangents[:, :, group, channels]
        n, R, c, P = b.shape
        product = torch.bmm(b.reshape(n, R * c, P), self.inputs[:, group].mT)
        return product.view(n * R, c * self._a)

    def _order_by_position(self) -> None:
        """Bring the inputs into the order in memory that products need, and keep it.

        They come in the order that is the fastest to write and does for sums. Of one
        position, cotangents that lie column by column are brought together as well.
        """
        if self.inputs.stride(2) != 1:
            self.inputs = self.inputs.mT.contiguous().mT
        if self.positions == 1:
            self.cotangents = self.cotangents.contiguous()


def _side_by_side(
    inputs: Tensor, samples: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Put the inputs ``[n, a, P]`` of a few samples at a time into one matrix.

    A large matrix product is faster than several small ones.

    Yields:
        The number of the first sample, and ``[a, few·P]``.
    """
    for first in samples[::_TOGETHER]:
        few = inputs[first : min(first + _TOGETHER, samples[-1] + 1)]
        yield first, few.transpose(0, 1).flatten(1)


def _share(size: int, device: torch.device) -> int:
    return size if device.type == "cpu" else size * _DEVICE_FACTOR
