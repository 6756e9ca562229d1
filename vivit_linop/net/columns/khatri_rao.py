"""Columns that are sums of outer products: of layers whose weights multiply.

For samples n and cotangents r, the weight's part of column (n, r) of Jᵀ B is b_nr ⊗ a_n
in a linear layer, with a_n its input and b_nr the cotangent at its output. Where a
weight is shared (convolutions, tokens, a weight used twice) it is a sum over positions,
Σ_p b_nrp ⊗ a_np.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Self

import torch
from torch import Tensor

from vivit_linop.devices import fresh
from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.net.columns.outer_sums import ELEMENTWISE_COST, OuterSums
from vivit_linop.net.columns.products import add_outer_products, images
from vivit_linop.net.columns.unfolded import UnfoldedInputs
from vivit_linop.noise import Noise

# Into so many rows a matrix is compressed whose norm is asked for.
_SKETCH_ROWS = 8
# All rows of it take no longer than calls do, up to so many products of numbers.
_FEW_PRODUCTS = 2**19
# Temporaries that are read again right away should still be in a cache.
_WORKING_SET = 8 * 2**20
# What is unfolded, multiplied and let go: in the cache of each core.
_NEAR_BYTES = 3 * 2**20


def _near() -> int:
    return _NEAR_BYTES * torch.get_num_threads()


@dataclass(eq=False)
class SharedCotangents:
    """What columns with the same cotangents, as of a weight and a bias, compute once.

    Attributes:
        norms: |b_nr|, ``[n, R, G]``.
        outer: Σ b bᵀ, ``[G, b, b]``, not written into while the columns are used.
        combined: The last weights, and Σ_r w_nr b_nr, for the others to take.
    """

    norms: Tensor | None = None
    outer: Tensor | None = None
    combined: tuple[Tensor, Tensor] | None = None


class KhatriRaoColumns(OuterSums):
    """Columns Σ_p b_nrp ⊗ a_np, for each of G groups of channels.

    Args:
        inputs: a, ``[n, G, a, P]``; or how they are made, of all samples or of some.
        cotangents: b, ``[n, R, G, b, P]``.
        inputs_first: Whether the parameter is laid out as ``[G, a, b]`` instead of
            ``[G, b, a]``.
    """

    of_data = frozenset({"_unmade"})
    # What makes the inputs, until they are made.
    _unmade: UnfoldedInputs | None = None
    # Whether inputs are known to be ones, as those of a bias.
    of_ones = False

    def __init__(
        self,
        inputs: Tensor | UnfoldedInputs,
        cotangents: Tensor,
        inputs_first: bool = False,
    ) -> None:
        self.cotangents = cotangents
        if isinstance(inputs, UnfoldedInputs):
            self._unmade, self._a = inputs, inputs.channels
        else:
            self.inputs, self._a = inputs, inputs.shape[2]
        self.inputs_first, self.cotangents_key = inputs_first, object()
        self.num_samples, self.width, self._groups, b, self.positions = cotangents.shape
        self._b = b
        shape = self.num_samples, self._groups, self._a, self.positions
        if isinstance(inputs, Tensor) and inputs.shape != shape:
            raise ValueError(f"inputs: found {[*inputs.shape]}; expected {[*shape]}.")
        self.numel = self._groups * self._a * b
        self.input_entries = self.num_samples * self._groups * self._a * self.positions
        # Of layers without positions: their sums are made of matrices.
        self._is_plain = self._groups == self.positions == 1

    @cached_property
    def inputs(self) -> Tensor:  # type: ignore[override]
        """Those of all samples; made once, where they were not given."""
        assert self._unmade is not None
        made, self._unmade = self._unmade.whole, None
        return made

    def some_inputs(self, part: slice) -> Tensor:
        """Those of some samples, which are not kept."""
        if self._unmade is not None:
            return self._unmade.some(part)
        return self.inputs[part]

    @property
    def given(self) -> Tensor | UnfoldedInputs:
        """The inputs, as far as they are made: one object for columns with the same."""
        return self._unmade or self.inputs

    def inputs_in_parts(self) -> Iterator[Tensor]:
        """Yield the inputs, of some samples after the other where they are not made."""
        if self._unmade is None:
            yield self.inputs
            return
        for part in self._parts(self._groups * self._a * self.positions, _near()):
            yield self._unmade.some(part)

    @property
    def nbytes(self) -> int:
        return self.cotangents.nbytes + self.input_entries * self.cotangents.itemsize

    def _samples(self, samples: slice) -> KhatriRaoColumns:
        inputs = self.some_inputs(samples)
        return KhatriRaoColumns(inputs, self.cotangents[samples], self.inputs_first)

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

    # Put together -------------------------------------------------------------------

    def share_cotangents(self, other: LayerColumns) -> None:
        """Mark the columns of the same use as of the same cotangents."""
        if isinstance(other, KhatriRaoColumns):
            if self.positions == 1 and self.cotangents.shape == other.cotangents.shape:
                self.cotangents_key = other.cotangents_key = SharedCotangents()

    def compacted(self) -> LayerColumns:
        """Formed, unless columns have more entries than the factors."""
        R = self.width
        if self.positions == 1 or self.formed_entries(R) > self.factor_entries(R):
            return self
        return DenseColumns(self.rows().view(self.num_samples, self.width, -1))

    def transposed(self, shape: torch.Size) -> KhatriRaoColumns:
        """The same factors, laid out the other way; there is one group."""
        twin = KhatriRaoColumns(self.given, self.cotangents, not self.inputs_first)
        twin.cotangents_key = self.cotangents_key
        return twin

    def joined(self, others: Sequence[LayerColumns]) -> LayerColumns:
        """More uses are more positions."""
        alike = [other for other in others if isinstance(other, KhatriRaoColumns)]
        if len(alike) == len(others) and all(map(self.is_like, alike)):
            return self.with_more(alike)
        return super().joined(others)

    def beside(self, others: Sequence[Self]) -> KhatriRaoColumns:
        """Their inputs are one longer input."""
        inputs = map(attrgetter("inputs"), (self, *others))
        return KhatriRaoColumns(torch.cat([*inputs], dim=2), self.cotangents)

    def continues(self, other: LayerColumns) -> bool:
        """With factors of the same shapes; kinds of their own keep more than these."""
        return (
            type(other) is type(self) is KhatriRaoColumns
            and self.is_like(other)
            and (self.width, self.positions) == (other.width, other.positions)
        )

    def followed_by(self, others: Sequence[Self]) -> KhatriRaoColumns:
        return self._with(others, dim=0)

    def with_more(self, others: Sequence[KhatriRaoColumns]) -> KhatriRaoColumns:
        """Add the columns of other uses, of the same layout."""
        return self._with(others, dim=-1)

    def _with(self, others: Sequence[KhatriRaoColumns], dim: int) -> KhatriRaoColumns:
        """The factors of these columns and of others, along samples or positions."""
        inputs = torch.cat([part.inputs for part in (self, *others)], dim)
        cotangents = torch.cat([part.cotangents for part in (self, *others)], dim)
        return KhatriRaoColumns(inputs, cotangents, self.inputs_first)

    def rows(self) -> Tensor:
        if self._unmade is not None and self._groups == 1 and not self.inputs_first:
            return self._rows_by_parts()
        if self._is_plain and self._a == 1:
            formed = self.cotangents.flatten(1) * self.inputs.flatten(1)
            return formed.view(-1, self.numel)
        order = "ngap,nrgbp->nrgab" if self.inputs_first else "ngap,nrgbp->nrgba"
        formed = torch.einsum(order, self.inputs, self.cotangents)
        return formed.reshape(-1, self.numel)

    def _rows_by_parts(self) -> Tensor:
        """Form them of some samples at a time, whose inputs are let go."""
        n, R, b = self.num_samples, self.width, self._b
        formed = fresh(self.cotangents, n, R * b, self._a)
        for part in self._parts(R * b * (self._a + self.positions), _near()):
            B = self.cotangents[part].reshape(-1, R * b, self.positions)
            torch.bmm(B, self.some_inputs(part)[:, 0].mT, out=formed[part])
        return formed.view(-1, self.numel)

    # Squares and sums of entries, without forming all columns ------------------------

    def sizes(self) -> Tensor:
        """√Σ_p |a_np|² |b_nrp|²."""
        if self._is_plain:
            inputs = torch.linalg.vector_norm(self.inputs, dim=(1, 2))
            return self._norms().squeeze(2) * inputs
        if self._unmade is not None:
            inputs = self._unmade.squared_norms(self._groups)
        else:
            inputs = self._summed_squares(self.inputs, 2)
        cotangents = self._squares()
        n, R = cotangents.shape[:2]
        products = cotangents.reshape(n, R, -1) @ inputs.reshape(n, -1, 1)
        return products.squeeze(2).sqrt()

    def _norms(self) -> Tensor:
        """|b_nr| of one position, ``[n, R, G]``."""
        shared = self.cotangents_key
        norms = shared.norms if isinstance(shared, SharedCotangents) else None
        if norms is None:
            norms = torch.linalg.vector_norm(self.cotangents, dim=(3, 4))
            if isinstance(shared, SharedCotangents):
                shared.norms = norms
        return norms

    def _squares(self) -> Tensor:
        """|b_nrp|², ``[n, R, G, P]``."""
        if self.positions == 1:
            return self._norms().square().unsqueeze(3)
        return self._summed_squares(self.cotangents, 3)

    def _summed_squares(self, factor: Tensor, dim: int) -> Tensor:
        """Σ of squares along an axis, where torch's own norms are slow."""
        each = factor[:1].numel()
        sums = [
            factor[part].square().sum(dim) for part in self._parts(each, factor.nbytes)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def combination(self, weights: Tensor) -> Tensor:
        """Σ_np (Σ_r w_nr b_nrp) ⊗ a_np."""
        return self.with_cotangents(self._combined(weights)).entry_sums()

    def residual(self, weights: Tensor, expected: Tensor) -> Tensor:
        """A few random combinations of the rows of the difference.

        All rows would take as long as the gradient of the weight.
        """
        few = self.num_samples * self.positions * self.numel <= _FEW_PRODUCTS
        combined = self._combined(weights)
        if few or min(self._a, self._b) <= 2 * _SKETCH_ROWS:
            return self.with_cotangents(combined).entry_sums() - expected
        mixing = _mixing(self._b, expected.dtype, expected.device)
        mixed = torch.einsum("kb,nrgbp->nrgkp", mixing, combined)
        sums = self.with_cotangents(mixed).entry_sums()
        if self.inputs_first:
            matrix = expected.reshape(self._groups, self._a, self._b) @ mixing.T
        else:
            matrix = mixing @ expected.reshape(self._groups, self._b, self._a)
        return sums - matrix.flatten()

    def _combined(self, weights: Tensor) -> Tensor:
        """Σ_r w_nr b_nrp, as cotangents of one column a sample."""
        shared, b = self.cotangents_key, self.cotangents
        if isinstance(shared, SharedCotangents):
            known, shared.combined = shared.combined, None  # it is taken once
            if known is not None and known[0] is weights:
                return known[1]
        # Positions may come before channels in memory.
        turned = b.mT.is_contiguous() and not b.is_contiguous()
        b = b.mT if turned else b
        sums = torch.bmm(weights.unsqueeze(1), b.reshape(*weights.shape, -1))
        sums = sums.view(self.num_samples, 1, *b.shape[2:])
        sums = sums.mT if turned else sums
        if isinstance(shared, SharedCotangents):
            shared.combined = weights, sums
        return sums

    def with_cotangents(self, cotangents: Tensor) -> KhatriRaoColumns:
        """Columns of the same inputs."""
        inputs = self._unmade or self.inputs
        return KhatriRaoColumns(inputs, cotangents, self.inputs_first)

    def squared_norms(self, memory: int) -> Tensor:
        """Σ_pq (a_pᵀ a_q)(b_pᵀ b_q) for each column, or from its block if cheaper."""
        if self.positions == 1:
            norms = self._squares().squeeze(3)
            norms = norms * self.inputs.square().sum((2, 3)).unsqueeze(1)
            return norms.sum(2).reshape(-1)
        a, b, P = self._a, self._b, self.positions
        pairs = P * P * (2 * b + 2 * a / self.width + ELEMENTWISE_COST)
        blocks = a * b * (2 * P + ELEMENTWISE_COST)
        by_pairs = pairs < blocks
        entries = self._groups * (P * P if by_pairs else a * b)
        norms = self.cotangents.new_empty(self.num_samples, self.width)
        if self._unmade is not None:
            memory = min(memory, _near())
        for part in self._parts(entries * (self.width + 1), memory):
            A, B = self.some_inputs(part), self.cotangents[part]
            if by_pairs:
                products = torch.einsum("nrgbp,nrgbq->nrgpq", B, B)
                products *= (A.mT @ A).unsqueeze(1)
                # Of pairs that cancel, rounding may leave less than nothing.
                norms[part] = products.sum((2, 3, 4)).clamp_(min=0.0)
            else:
                products = torch.einsum("ngap,nrgbp->nrgba", A, B).flatten(2)
                norms[part] = torch.linalg.vector_norm(products, dim=2).square_()
        return norms.reshape(-1)

    def sample_grams(self, other: LayerColumns, memory: int) -> Tensor:
        """By pairs of positions, or where these are many by blocks."""
        if not isinstance(other, KhatriRaoColumns) or not self.is_like(other):
            return super().sample_grams(other, memory)
        if self._pairs_pay(other):
            return self._sample_grams_by_pairs(other)
        n, R, Q = self.num_samples, self.width, other.width
        total = self.cotangents.new_zeros(n, R, Q)
        bytes_per_channel = n * (R + Q) * self._a * total.element_size()
        chunk = max(1, min(self._b, memory // bytes_per_channel))
        for group in range(self._groups):
            for start in range(0, self._b, chunk):
                part = slice(start, start + chunk)
                block = self.block(group, part).view(n, R, -1)
                theirs = block if other is self else other.block(group, part)
                total += block @ theirs.view(n, Q, -1).mT
        return total

    def _pairs_pay(self, other: KhatriRaoColumns) -> bool:
        """Whether pairs of positions of a sample cost less than blocks."""
        a, b, R, Q, P = self._a, self._b, self.width, other.width, self.positions
        return P * (a + R * b + R * Q * b / P) <= R * b * a * (1 + Q / P)

    def _sample_grams_by_pairs(self, other: KhatriRaoColumns) -> Tensor:
        n, R = self.num_samples, self.width
        total = self.cotangents.new_zeros(n, R, other.width)
        products = self._input_products(other)
        for g in range(self._groups):
            mixed = self.cotangents[:, :, g].flatten(1, 2) @ products[:, g]
            total += mixed.view(n, R, -1) @ other.cotangents[:, :, g].flatten(2).mT
        return total

    def _input_products(self, other: KhatriRaoColumns) -> Tensor:
        """a_npᵀ a'_nq, ``[n, G, P, P']``."""
        return self.inputs.mT @ other.inputs

    def entry_squares(self, memory: int) -> Tensor:
        """(Σ_r b_r²)ᵀ (a²), a matrix product; with positions, from pairs or blocks."""
        return self._entry_squares(memory, by_sample=False)[0]

    def sample_entry_squares(self, memory: int) -> Tensor:
        return self._entry_squares(memory, by_sample=True)

    def _entry_squares(self, memory: int, by_sample: bool) -> Tensor:
        """Those of each sample, or of all together, ``[n or 1, numel]``."""
        a, b, P, R = self._a, self._b, self.positions, self.width
        samples = self.num_samples if by_sample else 1
        total = self.cotangents.new_zeros(samples, self._groups, b, a)
        by_pairs = squares_by_pairs(a, b, P, R)
        size = P * (P + 1) // 2 * (a + b) if by_pairs else R * a * b
        for part in self._parts(self._groups * size, memory):
            place = total[part if by_sample else 0]
            if by_pairs:
                A, B = self._pair_products(part)
                order = "ngbk,ngak->ngba" if by_sample else "ngbk,ngak->gba"
                place += torch.einsum(order, B, A)
                continue
            for group in range(self._groups):
                squares = self.sample_blocks(part, group).square_()
                place[..., group, :, :] += squares.sum(1 if by_sample else (0, 1))
        return self._laid_out(total.clamp_(min=0.0))

    def entry_sums(self) -> Tensor:
        """Σ b aᵀ over all columns and positions."""
        B = self.cotangents
        B = B.squeeze(1) if self.width == 1 else B.sum(1)
        if self.positions <= self._b and self._unmade is None:
            # Positions beside samples: one product for a group, for a copy of both.
            left = B.permute(1, 2, 0, 3).flatten(2)
            right = self.inputs.permute(1, 2, 0, 3).flatten(2)
            return self._laid_out(left @ right.mT)
        total = B.new_zeros(self._groups, self._b, self._a)
        for part in self._parts(self.numel, _WORKING_SET):
            total += (B[part] @ self.some_inputs(part).mT).sum(0)
        return self._laid_out(total)

    def _pair_products(self, part: slice) -> tuple[Tensor, Tensor]:
        """Products over pairs p ≤ q of inputs, and of cotangents summed over columns.

        Pairs p < q count twice: ``[n, G, a, pairs]``, ``[n, G, b, pairs]``.
        """
        A, B = self.some_inputs(part), self.cotangents[part]
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
        inputs = self.some_inputs(part)[:, group]
        product = torch.bmm(B.reshape(n, R * b, P), inputs.mT)
        return product.view(n, R, b, self._a)

    def _parts(self, entries: int, memory: int) -> Iterator[slice]:
        """Cut the samples so that temporaries of so many entries a sample fit.

        With the inputs, where these are made of some samples at a time.
        """
        if self._unmade is not None:
            entries += self._groups * self._a * self.positions
        itemsize = self.cotangents.itemsize
        limit = min(memory, _WORKING_SET) if self.cotangents.is_cpu else memory
        # Where a sample takes another way, a layer has no positions.
        size = max(1, limit // max(1, entries * itemsize))
        for start in range(0, self.num_samples, size):
            yield slice(start, min(start + size, self.num_samples))

    def _laid_out(self, entries: Tensor) -> Tensor:
        """From ``[…, G, b, a]`` to the layout of the parameter, ``[…, numel]``."""
        return (entries.mT if self.inputs_first else entries).flatten(-3)


@lru_cache(maxsize=16)
def _mixing(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a matrix with so many rows is compressed by, ``[k, rows]``."""
    like = torch.empty(0, dtype=dtype, device=device)
    return Noise(4)(_SKETCH_ROWS, rows, like=like) / _SKETCH_ROWS**0.5


def squares_by_pairs(inputs: int, outputs: int, positions: int, width: int) -> bool:
    """Whether pairs of P positions cost less than blocks ``[a, b]`` of R columns."""
    if positions == 1:
        return True
    pairs = positions * (positions + 1) // 2
    block = inputs * outputs
    # The products of pairs are written, blocks are written and squared.
    by_pairs = pairs * (
        2 * block + ELEMENTWISE_COST * (inputs + outputs) + 2 * width * outputs
    )
    return by_pairs < width * block * (2 * positions + ELEMENTWISE_COST)
