"""Sums over columns that Kronecker-factored approximations are made of.

The factors of weights, and the squares of columns' entries in their eigenbases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn.functional import pad

from vivit_linop.curvature import plan
from vivit_linop.curvature.column_sums import sum_columns
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.net.certified import share_structure
from vivit_linop.net.columns.base import LayerColumns, add_product, mirror, pays_whole
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns, SharedCotangents
from vivit_linop.net.columns.transposed import TransposedConvolutionColumns
from vivit_linop.net.pieces import Piece
from vivit_linop.net.totals import Total
from vivit_linop.operators.kronecker import Kronecker
from vivit_linop.ranks.alone import Ranks

Seen: TypeAlias = dict[str, ReferenceType[object]]
"""The last inputs, by parameter."""


@dataclass
class LayerFactors:
    """The factors of a weight, for each of its G groups of channels.

    Attributes:
        B: Of outputs, ``[G, b, b]``.
        A: Of inputs, ``[G, a, a]``.
        inputs_first: Whether the inputs' axis comes first in the weight's layout.
        order: Where the weight's entries are, ``[G, b, a]``, unless in their own order.
    """

    B: Tensor
    A: Tensor
    inputs_first: bool
    order: Tensor | None


def _at_outputs(columns: KhatriRaoColumns) -> KhatriRaoColumns:
    """The columns as sums over positions of what the layer gives."""
    if isinstance(columns, TransposedConvolutionColumns):
        return columns.at_outputs()
    return columns


class _ChangedUseError(ValueError):
    """A weight has factors on some samples, and other columns on others."""


def _are_new(seen: Seen, name: str, inputs: object) -> bool:
    """Whether inputs are others than last time: columns of a layer in parts share."""
    last, seen[name] = seen.get(name), ref(inputs)
    return last is None or last() is not inputs


class KroneckerSums(Total):
    """The factors of all weights, and the exact blocks of small other parameters.

    Attributes:
        factors: The factors by weight.
        outer: The exact blocks by parameter.
    """

    takes = "factors"

    def __init__(self, factor: Pullback, sharing: str, affine: Sequence[str]) -> None:
        self.names = list(factor.risk.params)
        # Biases have an exact block.
        self._weights = {name for name, p in factor.risk.params.items() if p.ndim > 1}
        self._sharing, self._affine = sharing, set(affine)
        self._num_samples = factor.risk.num_samples
        self.factors: dict[str, LayerFactors] = {}
        self.outer: dict[str, Tensor] = {}
        self._formed: set[str] = set()
        # Of each weight, how many samples were seen, and positions of all of them.
        self._positions: dict[str, tuple[int, int]] = {}
        self._seen: Seen = {}

    @classmethod
    def over(
        cls, factor: Pullback, sharing: str, affine: Sequence[str]
    ) -> KroneckerSums:
        """Return the sums over all columns."""
        # Other ranks raise errors of the same kind.
        changed = ValueError if factor.ranks.is_many else _ChangedUseError
        share_structure(factor.risk)
        try:
            sums = sum_columns(factor, cls(factor, sharing, affine))
        # What was learnt of the net on the way now holds from the first sample on.
        except changed:
            share_structure(factor.risk)
            sums = sum_columns(factor, cls(factor, sharing, affine))
        for name in sorted(sums.factors):  # all ranks in one order
            sums.factors[name].A.div_(sums._divisor(name, factor.ranks))
        return sums

    def add(self, left: Piece, right: Piece) -> None:
        """Add a piece's sums."""
        for name, columns in left.columns.items():
            if isinstance(columns, KhatriRaoColumns) and name in self._weights:
                if not columns.positions:  # the net takes another way
                    continue
                self._add_factors(name, columns)
                continue
            self._formed.add(name)
            if columns.numel <= plan.LARGEST_DENSE_BLOCK:
                self.outer[name] = self.outer.get(name, 0.0) + _outer_product(columns)
        self._check_uses()

    def finish(self, ranks: Ranks) -> None:
        """Add up, also what only some ranks have."""
        factors = self.factors
        notes = {n: (f.inputs_first, f.order) for n, f in factors.items()}
        for others, formed in ranks.gathered((notes, self._formed)):
            notes, self._formed = others | notes, self._formed | formed
        self.outer = _summed_by_name(self.outer, ranks)
        B = _summed_by_name({n: f.B for n, f in factors.items()}, ranks)
        A = _summed_by_name({n: f.A for n, f in factors.items()}, ranks)
        self.factors = {n: LayerFactors(B[n], A[n], *notes[n]) for n in B}
        self._check_uses()

    def _divisor(self, name: str, ranks: Ranks) -> float:
        """N, times the positions that a sample has on average where each counts."""
        seen = ranks.gathered(self._positions.get(name, (0, 0)))
        n, positions = map(sum, zip(*seen, strict=True))
        each = positions / n if self._sharing == "expand" else 1.0
        return self._num_samples * each

    def _check_uses(self) -> None:
        if both := set(self.factors) & self._formed:
            raise _ChangedUseError(
                f"data: how the model uses {both.pop()!r} could be told for some "
                "batches only. Give other batches, or one sample in each."
            )

    def _add_factors(self, name: str, columns: KhatriRaoColumns) -> None:
        order, inputs_are_new = None, _are_new(self._seen, name, columns.given)
        if isinstance(columns, TransposedConvolutionColumns):
            order = columns.by_outputs(torch.arange(columns.numel, device="cpu"))
        columns = _at_outputs(columns)
        B = _cotangent_sums(columns, reduced=self._sharing != "expand")
        before = self.factors.get(name)
        if before is not None:
            B = before.B.add_(B)  # a bias of this piece may have B too
        if before is None or inputs_are_new:
            affine = name in self._affine and not columns.inputs_first
            A = _input_sums(columns, self._sharing == "reduce", affine)
            n, positions = self._positions.get(name, (0, 0))
            own = columns.num_samples
            self._positions[name] = n + own, positions + own * columns.positions
            if before is not None:
                A += before.A
        else:
            A = before.A
        self.factors[name] = LayerFactors(B, A, columns.inputs_first, order)


def _cotangent_sums(columns: KhatriRaoColumns, reduced: bool) -> Tensor:
    """Σ b bᵀ over all columns, ``[G, b, b]``; reduced, of sums over positions."""
    shared = columns.cotangents_key  # of one position
    if isinstance(shared, SharedCotangents) and shared.outer is not None:
        return shared.outer
    B = columns.cotangents
    B = B.sum(4, keepdim=True) if reduced else B
    sums = _outer_sums([B.permute(2, 3, 0, 1, 4).flatten(2)])
    if isinstance(shared, SharedCotangents):
        shared.outer = sums
    return sums


def _outer_product(columns: LayerColumns) -> Tensor:
    """Σ v vᵀ over all columns, ``[d, d]``."""
    if isinstance(columns, KhatriRaoColumns) and columns.of_ones:
        return _cotangent_sums(columns, reduced=False)[0]
    return _outer_sums([columns.rows().T.unsqueeze(0)])[0]


def _input_sums(columns: KhatriRaoColumns, reduced: bool, affine: bool) -> Tensor:
    """Σ a aᵀ over samples and positions, ``[G, a, a]``; reduced, of means over these.

    Affine ones have a 1 appended, for a bias.
    """

    def rows(A: Tensor) -> Tensor:
        A = A.mean(3, keepdim=True) if reduced else A
        return _with_ones(A, affine).permute(1, 2, 0, 3).flatten(2)

    return _outer_sums(map(rows, columns.inputs_in_parts()))


def _with_ones(inputs: Tensor, affine: bool) -> Tensor:
    """Append a 1 to inputs ``[n, G, a, P]``, for a bias."""
    return pad(inputs, (0, 0, 0, 1), value=1.0) if affine else inputs


def _outer_sums(parts: Iterable[Tensor]) -> Tensor:
    """Sums of outer products of columns, ``[G, d, k] -> [G, d, d]``, symmetric."""
    sums: Tensor | None = None
    whole = False
    for columns in parts:
        if sums is None:
            sums = columns.new_zeros(*columns.shape[:2], columns.shape[1])
        # On other devices, launching the parts of a half takes longer than the whole.
        whole = not columns.is_cpu or pays_whole(columns[0])
        if whole:
            sums.baddbmm_(columns, columns.mT)
            continue
        for total, group in zip(sums, columns, strict=True):
            add_product(total, group, group, True)
    assert sums is not None  # there is a sample in each piece
    if whole:
        return (sums + sums.mT).div_(2)
    for total in sums:
        mirror(total)
    return sums


class EigenvalueSums(Total):
    """The sums of squared entries of all columns in the eigenbases of their blocks.

    Args:
        factor: V.
        bases: By weight, the Kronecker blocks of its groups, ``[out, in]`` or, for
            parameters with the inputs' axis first, ``[in, out]``.

    Attributes:
        sums: By weight ``[G, n]``, in the order of the blocks' eigenvectors.
    """

    takes = "factors"

    def __init__(
        self, factor: Pullback, bases: Mapping[str, Sequence[Kronecker]]
    ) -> None:
        self.names, self._bases = list(bases), bases
        # Found here, by one rank, where all ranks are at the same place.
        self._eigenpairs = {
            name: [block.factor_eigenpairs for block in blocks]
            for name, blocks in bases.items()
        }
        self._seen, self._rotated_inputs = Seen(), dict[str, Tensor]()
        self.sums: dict[str, Tensor] = {}

    def add(self, left: Piece, right: Piece) -> None:
        """Add the squares of a piece's columns."""
        for name in self.names:
            columns = left.columns.get(name)
            if columns is not None:
                squares = self._squares(name, columns)
                self.sums[name] = self.sums.get(name, 0.0) + squares

    def finish(self, ranks: Ranks) -> None:
        """Add up."""
        self.sums = _summed_by_name(self.sums, ranks)

    def _squares(self, name: str, columns: LayerColumns) -> Tensor:
        """The sums of squares of one piece, ``[G, n]``."""
        blocks = self._bases[name]
        if isinstance(columns, KhatriRaoColumns):
            rotated = self._rotated(name, columns)
            return rotated.entry_squares(self.memory).view(len(blocks), -1)
        # This part of the data does not confirm the layer's structure.
        rows = columns.rows()
        rows = rows.view(len(rows), len(blocks), -1)
        if rows.shape[2] != blocks[0].shape[0]:
            raise ValueError(
                f"model: in some batches it uses {name!r} as no layer, so its block "
                "cannot be joined with that of a bias. Give joint_bias=False."
            )
        return torch.stack(
            [
                block.eigenvectors.T.apply(part.T).square().sum(1)
                for block, part in zip(blocks, rows.unbind(1), strict=True)
            ]
        )

    def _rotated(self, name: str, columns: KhatriRaoColumns) -> KhatriRaoColumns:
        """The columns in the eigenbases: (Q_B ⊗ Q_A)ᵀ (b ⊗ a) = Q_Bᵀ b ⊗ Q_Aᵀ a."""
        inputs_are_new = _are_new(self._seen, name, columns.inputs)
        columns = _at_outputs(columns)
        pairs = self._eigenpairs[name]
        first, second = (
            torch.stack([pair[number][1] for pair in pairs]) for number in (0, 1)
        )
        QB, QA = (second, first) if columns.inputs_first else (first, second)
        if inputs_are_new:
            A = columns.inputs
            joined = QA.shape[1] > A.shape[2]  # with a bias
            self._rotated_inputs[name] = QA.mT @ _with_ones(A, joined)
        inputs, cotangents = self._rotated_inputs[name], QB.mT @ columns.cotangents
        return KhatriRaoColumns(inputs, cotangents, columns.inputs_first)


def _summed_by_name(parts: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Add up tensors by name, over ranks of which some may have none."""
    mine = {name: (part.shape, part.dtype) for name, part in parts.items()}
    layout: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for each in ranks.gathered(mine):
        layout |= each
    device = next((part.device for part in parts.values()), torch.device("cpu"))
    return {
        name: ranks.total(
            parts[name]
            if name in parts
            else torch.zeros(shape, dtype=dtype, device=device)
        )
        for name, (shape, dtype) in sorted(layout.items())
    }
