"""Columns that are sums of outer products: of layers whose weights multiply.

For samples n and cotangents r, the weight's part of column (n, r) of Jᵀ B is b_nr ⊗ a_n
in a linear layer, with a_n its input and b_nr the cotangent at its output. Where a
weight is shared (convolutions, tokens, a weight used twice) it is a sum over positions,
Σ_p b_nrp ⊗ a_np.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vivit_linop.net.columns.base import (
    ColumnCost,
    DenseColumns,
    LayerColumns,
    add_product,
)
from vivit_linop.net.columns.products import add_outer_products, images
from vivit_linop.noise import Noise

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
# Into so many rows a matrix is compressed whose norm is asked for.
_SKETCH_ROWS = 8
# Temporaries that are read again right away should still be in a cache.
_WORKING_SET = 8 * 2**20


class SharedCotangents:
    """What columns with the same cotangents, as of a weight and a bias, compute once.

    Attributes:
        squares: |b_nr|², ``[n, R, G]``.
        combined: The last weights, and Σ_r w_nr b_nr, for the others to take.
    """

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.combined: tuple[Tensor, Tensor] | None = None

    def taken(self, weights: Tensor) -> Tensor | None:
        """Give what was combined with these weights, and keep it no longer."""
        found, self.combined = self.combined, None
        return found[1] if found is not None and found[0] is weights else None


class KhatriRaoColumns(LayerColumns):
    """Columns Σ_p b_nrp ⊗ a_np, for each of G groups of channels.

    Args:
        inputs: a, ``[n, G, a, P]``.
        cotangents: b, ``[n, R, G, b, P]``.
        inputs_first: Whether the parameter is laid out as ``[G, a, b]`` instead of
            ``[G, b, a]``.
    """

    def __init__(
        self,
        inputs: Tensor,
        cotangents: Tensor,
        inputs_first: bool = False,
    ) -> None:
        self.inputs, self.cotangents = inputs, cotangents
        self.inputs_first, self.cotangents_key = inputs_first, object()
        self.num_samples, self.width, self._groups, b, self.positions = cotangents.shape
        self._a, self._b = inputs.shape[2], b
        self.numel = self._groups * self._a * b

    @property
    def nbytes(self) -> int:
        """Inputs and cotangents."""
        return self.factor_entries(self.width) * self.cotangents.element_size()

    def is_like(self, other: LayerColumns) -> bool:
        """Whether others have factors of the same channels, in the same layout."""
        return isinstance(other, KhatriRaoColumns) and (
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
        return self.inputs.numel() + width * each

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

    def cost(self, samples: int, width: int, shared: bool, alone: bool) -> ColumnCost:
        """By the cheapest contraction, stored as factors or formed."""
        flops = self.gram_flops((samples, samples), (width, width), self.positions)
        way = min(flops, key=flops.__getitem__)
        between = 2.0 * self._groups * (samples * self.positions) ** 2 * self._b
        forward, gram = float(samples * self.forward_flops), flops[way] / 2
        factors = self.factor_entries(0 if shared else width) / self.num_samples
        formed = self.formed_entries(width) / self.num_samples
        if alone and self.positions > 1 and formed <= factors:
            entries = float(samples * formed)
            product = 2 * entries
            return ColumnCost("blocks", forward, gram, product, 2 * product, entries)
        entries = float(samples * factors)
        product = forward + 2 * entries
        inner = min(2 * product, between + 4 * entries)
        return ColumnCost(way, forward, gram, product, inner, entries)

    def contraction(self, other: KhatriRaoColumns) -> str:
        """The cheapest way to the Gram matrix with others: see ``gram_flops``."""
        flops = self.gram_flops(
            (self.num_samples, other.num_samples),
            (self.width, other.width),
            other.positions,
        )
        if not self.inputs.is_cpu:
            # Beside those of blocks, which are few.
            each = 3 * self._groups * _LAUNCH_FLOPS
            flops["pairs"] += each * self.positions * other.positions
            flops["inputs"] += each * other.num_samples
        return min(flops, key=flops.__getitem__)

    def add_gram(
        self,
        gram: Tensor,
        other: LayerColumns,
        memory: int,
        contraction: str | None = None,
    ) -> None:
        """In the cheapest of three ways, or in the one that is asked for."""
        if not isinstance(other, KhatriRaoColumns) or not self.is_like(other):
            add_product(gram, self.rows(), other.rows(), False)
            return
        ways = {
            "pairs": self._add_pairs,
            "blocks": self._add_blocks,
            "inputs": self._add_inputs,
        }
        ways[contraction or self.contraction(other)](gram, other, memory)

    def _add_pairs(self, gram: Tensor, other: KhatriRaoColumns, memory: int) -> None:
        """Σ_pq (a_p a_qᵀ) ∘ (b_p b_qᵀ), position by position."""
        if other is self:
            leaf = _SYMMETRIC_PAIRS_LEAF if gram.is_cpu else _DEVICE_PAIRS_LEAF
            split = len(gram) >= 2 * leaf
        else:
            limit = min(memory, _share(_OUTER_BYTES, gram.device))
            split = gram.numel() * gram.element_size() > limit
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
        target = gram.view(n, R, m, Q)
        self._order_by_position()
        other._order_by_position()
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
        passing = min(memory, _share(_PASSING_BYTES, gram.device))
        chunk = max(1, min(self._b, passing // bytes_per_channel))
        for group in range(self._groups):
            for start in range(0, self._b, chunk):
                channels = slice(start, start + chunk)
                left = self.block(group, channels)
                right = left if other is self else other.block(group, channels)
                add_product(gram, left, right, other is self)

    def _add_inputs(self, gram: Tensor, other: KhatriRaoColumns, memory: int) -> None:
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

    def _samples(self, samples: slice) -> KhatriRaoColumns:
        """The columns of some samples."""
        return KhatriRaoColumns(
            self.inputs[samples], self.cotangents[samples], self.inputs_first
        )

    def block(self, group: int, channels: slice) -> Tensor:
        """Columns as rows for some channels, ``[n·R, c·a]``."""
        b = self.cotangents[:, :, group, channels]
        n, R, c, P = b.shape
        product = torch.bmm(b.reshape(n, R * c, P), self.inputs[:, group].mT)
        return product.view(n * R, c * self._a)

    def signals(self, weights: Tensor) -> Tensor:
        """Σ_r w_nr b_nr."""
        cotangents = self.cotangents.reshape(self.num_samples, self.width, -1)
        return torch.bmm(weights.transpose(0, 1), cotangents).transpose(0, 1)

    def combine(self, signals: Tensor, out: Tensor, add: bool) -> None:
        """Σ_np signal_np ⊗ a_np."""
        shape = self.num_samples, self._groups, self._b, self.positions
        signals = signals.reshape(len(signals), *shape)
        inputs = self.positions_as_rows()
        add_outer_products(out, signals, inputs, self.inputs_first, add)

    def images(self, rows: Tensor) -> Tensor:
        """X a_np."""
        inputs = self.positions_as_rows()
        return images(rows, inputs, self.positions, self.inputs_first)

    def components(self, images: Tensor) -> Tensor:
        """⟨b_nr, image_n⟩."""
        cotangents = self.cotangents.reshape(self.num_samples, self.width, -1)
        return torch.bmm(cotangents, images.permute(1, 2, 0)).permute(2, 0, 1)

    def positions_as_rows(self) -> Tensor:
        """The inputs as ``[G, n·P, a]``."""
        self._order_by_position()
        return self.inputs.permute(1, 0, 3, 2).reshape(self._groups, -1, self._a)

    def _order_by_position(self) -> None:
        """Bring the inputs into the order in memory that products need, and keep it.

        They come in the order that is the fastest to write and does for sums.
        """
        if self.inputs.stride(2) != 1:
            self.inputs = self.inputs.mT.contiguous().mT

    # Put together -------------------------------------------------------------------

    def share_cotangents(self, other: LayerColumns) -> None:
        """Mark the columns of the same use as of the same cotangents."""
        if isinstance(other, KhatriRaoColumns):
            if self.positions == 1 and self.cotangents.shape == other.cotangents.shape:
                self.cotangents_key = other.cotangents_key = SharedCotangents()

    def compacted(self) -> LayerColumns:
        """Formed, unless there are more entries of columns than of factors."""
        if self.positions == 1:
            return self
        if self.formed_entries(self.width) > self.factor_entries(self.width):
            return self
        return DenseColumns(self.rows().view(self.num_samples, self.width, -1))

    def transposed(self, shape: torch.Size) -> KhatriRaoColumns:
        """The same factors, laid out the other way; there is one group."""
        twin = KhatriRaoColumns(self.inputs, self.cotangents, not self.inputs_first)
        twin.cotangents_key = self.cotangents_key
        return twin

    def joined(self, others: Sequence[LayerColumns]) -> LayerColumns:
        """More uses are more positions."""
        alike = [other for other in others if isinstance(other, KhatriRaoColumns)]
        if len(alike) == len(others) and all(map(self.is_like, alike)):
            return self.with_more(alike)
        return super().joined(others)

    def beside(self, others: Sequence[LayerColumns]) -> KhatriRaoColumns:
        """Their inputs are one longer input."""
        inputs = [self.inputs]
        for other in others:
            assert isinstance(other, KhatriRaoColumns)
            inputs.append(other.inputs)
        return KhatriRaoColumns(torch.cat(inputs, dim=2), self.cotangents)

    def continues(self, other: LayerColumns) -> bool:
        """With factors of the same shapes; kinds of their own keep more than these."""
        return (
            type(other) is type(self) is KhatriRaoColumns
            and self.is_like(other)
            and (self.width, self.positions) == (other.width, other.positions)
        )

    def followed_by(self, others: Sequence[LayerColumns]) -> KhatriRaoColumns:
        """Sample below sample."""
        parts = [self]
        for other in others:
            assert isinstance(other, KhatriRaoColumns)
            parts.append(other)
        cotangents = torch.cat([part.cotangents for part in parts])
        inputs = torch.cat([part.inputs for part in parts])
        return KhatriRaoColumns(inputs, cotangents, self.inputs_first)

    def with_more(self, others: Sequence[KhatriRaoColumns]) -> KhatriRaoColumns:
        """Add the columns of other uses, of the same layout."""
        parts = [self, *others]
        return KhatriRaoColumns(
            torch.cat([part.inputs for part in parts], dim=-1),
            torch.cat([part.cotangents for part in parts], dim=-1),
            self.inputs_first,
        )

    def rows(self) -> Tensor:
        """Form the columns."""
        order = "ngap,nrgbp->nrgab" if self.inputs_first else "ngap,nrgbp->nrgba"
        formed = torch.einsum(order, self.inputs, self.cotangents)
        return formed.reshape(-1, self.numel)

    # Squares and sums of entries, without forming all columns ------------------------

    def sizes(self) -> Tensor:
        """√Σ_p |a_np|² |b_nrp|²."""
        if self._groups == self.positions == 1:
            inputs = torch.linalg.vector_norm(self.inputs, dim=(1, 2))
            return torch.linalg.vector_norm(self.cotangents, dim=(2, 3, 4)) * inputs
        inputs = torch.linalg.vector_norm(self.inputs, dim=2).square()
        cotangents = self._squares()
        n, R = cotangents.shape[:2]
        products = cotangents.reshape(n, R, -1) @ inputs.reshape(n, -1, 1)
        return products.squeeze(2).sqrt()

    def _squares(self) -> Tensor:
        """|b_nrp|², ``[n, R, G, P]``."""
        shared = self.cotangents_key
        if not isinstance(shared, SharedCotangents):
            return torch.linalg.vector_norm(self.cotangents, dim=3).square()
        if shared.squares is None:  # of one position
            norms = torch.linalg.vector_norm(self.cotangents.squeeze(4), dim=3)
            shared.squares = norms.square()
        return shared.squares.unsqueeze(3)

    def combination(self, weights: Tensor) -> Tensor:
        """Σ_np (Σ_r w_nr b_nrp) ⊗ a_np."""
        return self.with_cotangents(self._combined(weights)).entry_sums()

    def residual(self, weights: Tensor, expected: Tensor) -> Tensor:
        """A few random combinations of the rows of the difference.

        All rows would take as long as the gradient of the weight.
        """
        if min(self._a, self._b) <= 2 * _SKETCH_ROWS:
            return self.combination(weights) - expected
        mixing = Noise(4)(_SKETCH_ROWS, self._b, like=expected) / _SKETCH_ROWS**0.5
        mixed = torch.einsum("kb,nrgbp->nrgkp", mixing, self._combined(weights))
        few = self.with_cotangents(mixed).entry_sums()
        if self.inputs_first:
            matrix = expected.reshape(self._groups, self._a, self._b) @ mixing.T
        else:
            matrix = mixing @ expected.reshape(self._groups, self._b, self._a)
        return few - matrix.flatten()

    def _combined(self, weights: Tensor) -> Tensor:
        """Σ_r w_nr b_nrp, as cotangents of one column a sample."""
        shared, b = self.cotangents_key, self.cotangents
        if isinstance(shared, SharedCotangents):
            if (known := shared.taken(weights)) is not None:
                return known
        # Positions may come before channels in memory.
        turned = b.mT.is_contiguous() and not b.is_contiguous()
        b = b.mT if turned else b
        sums = weights.unsqueeze(1) @ b.reshape(*weights.shape, -1)
        sums = sums.view(self.num_samples, 1, *b.shape[2:])
        sums = sums.mT if turned else sums
        if isinstance(shared, SharedCotangents):
            shared.combined = weights, sums
        return sums

    def with_cotangents(self, cotangents: Tensor) -> KhatriRaoColumns:
        """Columns of the same inputs."""
        return KhatriRaoColumns(self.inputs, cotangents, self.inputs_first)

    def squared_norms(self, memory: int) -> Tensor:
        """Σ_pq (a_pᵀ a_q)(b_pᵀ b_q) for each column, or from its block if cheaper."""
        a, b, P = self._a, self._b, self.positions
        if P == 1:
            norms = self._squares().squeeze(3)
            norms = norms * self.inputs.square().sum((2, 3)).unsqueeze(1)
            return norms.sum(2).reshape(-1)
        pairs = P * P * (2 * b + 2 * a / self.width + ELEMENTWISE_COST)
        blocks = a * b * (2 * P + ELEMENTWISE_COST)
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
                    block = self.sample_blocks(part, group)
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
                    block = self.sample_blocks(part, group)
                    total[part, group] = block.square_().sum(1)
        return self._laid_out(total.clamp_(min=0.0))

    def entry_sums(self) -> Tensor:
        """Σ b aᵀ over all columns and positions."""
        A, B = self.inputs, self.cotangents
        B = B.squeeze(1) if self.width == 1 else B.sum(1)
        if self.positions <= self._b:
            # Positions beside samples: one product for a group, for a copy of both.
            left = B.permute(1, 2, 0, 3).flatten(2)
            right = A.permute(1, 2, 0, 3).flatten(2)
            return self._laid_out(left @ right.mT)
        total = A.new_zeros(self._groups, self._b, self._a)
        for part in self._parts(self.numel, _WORKING_SET):
            total += (B[part] @ A[part].mT).sum(0)
        return self._laid_out(total)

    def _squares_by_pairs(self) -> bool:
        return squares_by_pairs(self._a, self._b, self.positions, self.width)

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
        cotangents *= 1.0 + (p != q).to(cotangents)
        return inputs, cotangents

    def sample_blocks(self, part: slice, group: int) -> Tensor:
        """Columns of some samples as blocks, ``[n, R, b, a]``."""
        B = self.cotangents[part, :, group]
        n, R, b, P = B.shape
        product = torch.bmm(B.reshape(n, R * b, P), self.inputs[part, group].mT)
        return product.view(n, R, b, self._a)

    def _parts(self, entries: int, memory: int) -> Iterator[slice]:
        """Cut the samples so that temporaries of so many entries a sample fit."""
        itemsize = self.inputs.element_size()
        limit = min(memory, _WORKING_SET) if self.inputs.is_cpu else memory
        # Where a sample takes another way, a layer has no positions.
        size = max(1, limit // max(1, entries * itemsize))
        for start in range(0, self.num_samples, size):
            yield slice(start, min(start + size, self.num_samples))

    def _laid_out(self, entries: Tensor) -> Tensor:
        """From ``[…, G, b, a]`` to the layout of the parameter, ``[…, numel]``."""
        return (entries.mT if self.inputs_first else entries).flatten(-3)


def squares_by_pairs(inputs: int, outputs: int, positions: int, width: int) -> bool:
    """Whether pairs of positions cost less than the blocks of all columns.

    Args:
        inputs: a.
        outputs: b.
        positions: P.
        width: R.
    """
    if positions == 1:
        return True
    pairs = positions * (positions + 1) // 2
    block = inputs * outputs
    # The products of pairs are written, blocks are written and squared.
    by_pairs = pairs * (
        2 * block + ELEMENTWISE_COST * (inputs + outputs) + 2 * width * outputs
    )
    return by_pairs < width * block * (2 * positions + ELEMENTWISE_COST)


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
