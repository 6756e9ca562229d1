"""Sandwiches Aᵀ S B of pulled-back columns with one block of S for each parameter.

With S_b = R Rᵀ for each block b they are inner products of the columns Rᵀ A and Rᵀ B:
in the structure of a layer where R is that of Kronecker factors, (F ⊗ E)ᵀ (b ⊗ a) =
Fᵀ b ⊗ Eᵀ a, with weights for eigenvalues of their own. So KFAC's and EKFAC's inverses
are never multiplied with columns of D entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from vivit_linop.curvature.blocks import places_of
from vivit_linop.curvature.column_sums import blocks_of_samples, sum_columns
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.linalg.reductions import matrix_of_operator
from vivit_linop.linalg.sandwiches import diagonal_blocks_of_product
from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.weighted import weighted
from vivit_linop.net.cross_grams import cross_gram
from vivit_linop.net.pieces import Piece
from vivit_linop.net.totals import GramTotal, SampleGrams, Weights
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op, TorchLinearOperator
from vivit_linop.operators.elementary import Dense, Diagonal, Product, Scaled
from vivit_linop.operators.kronecker import BlockDiagonal, Kronecker
from vivit_linop.risk.empirical import EmpiricalRisk

Transform = Callable[[LayerColumns], LayerColumns]


class BlockSandwich(Product):
    """The product Aᵀ S B of pulled-back columns and a block-diagonal operator.

    S is self-adjoint, with one block for each parameter of the risks. The matrix and
    the blocks on its diagonal come from the columns in the structure of their layers,
    where the blocks of S have roots that keep it.
    """

    @property
    def sides(self) -> tuple[Pullback, Pullback]:
        """A and B."""
        left, _, right = self.factors
        factor = verbs.adjoint(left)
        assert isinstance(factor, Pullback) and isinstance(right, Pullback)
        return factor, right

    def roots(self) -> Roots | None:
        """Return the roots of the blocks of S, None if one has no structure."""
        _, middle, right = self.factors
        assert isinstance(middle, BlockDiagonal) and isinstance(right, Pullback)
        transforms: dict[str, Transform] = {}
        for name, block in zip(right.risk.params, middle.blocks, strict=True):
            try:
                transform = _transform(verbs.sqrt(block))
            except (TypeError, ValueError):  # it has no closed form, or is indefinite
                return None
            if transform is None:
                return None
            transforms[name] = transform
        return Roots(transforms)


class Roots(Weights):
    """What stands between left and right columns: transformations, by parameter."""

    def __init__(self, transforms: Mapping[str, Transform]) -> None:
        self._transforms = transforms

    def inside(self, left: Piece, right: Piece) -> tuple[Piece, Piece]:
        """Transform them."""
        first = self._transformed(left)
        return first, first if right is left else self._transformed(right)

    def _transformed(self, piece: Piece) -> Piece:
        columns = {name: self._transforms[name](c) for name, c in piece.columns.items()}
        return Piece(piece.place, piece.samples, columns, piece.sizes)


@verbs.matmul.rule(Product, Pullback)
def product_of_blocks_and_pullback(A: Product, B: Pullback) -> Op:
    """(Aᵀ S) B."""
    return _sandwich(*A.factors, B) if len(A.factors) == 2 else NotImplemented


@verbs.matmul.rule(TorchLinearOperator, Product)
def product_of_pullback_and_blocks(A: Op, B: Product) -> Op:
    """Aᵀ (S B)."""
    return _sandwich(A, *B.factors) if len(B.factors) == 2 else NotImplemented


def _sandwich(left: Op, middle: Op, right: Op) -> Op:
    if not isinstance(middle, BlockDiagonal) or not isinstance(right, Pullback):
        return NotImplemented
    factor = verbs.adjoint(left)
    if not isinstance(factor, Pullback) or factor.risk.sizes != right.risk.sizes:
        return NotImplemented
    if middle.requires_grad or not middle.self_adjoint:
        return NotImplemented
    if not _is_by_parameter(middle, right.risk):
        return NotImplemented
    return BlockSandwich(left, middle, right)


def _is_by_parameter(op: BlockDiagonal, risk: EmpiricalRisk) -> bool:
    """Whether each block is of all entries of one parameter, in their order."""
    if [block.shape[0] for block in op.blocks] != risk.sizes:
        return False
    rows = places_of(risk, [[name] for name in risk.params])
    return op.indices is None or all(
        torch.equal(index.to(own.device), own)
        for index, own in zip(op.indices, rows, strict=True)
    )


@verbs.adjoint.register
def adjoint_of_block_sandwich(op: BlockSandwich) -> Op:
    """Bᵀ S A."""
    if op.self_adjoint:
        return op
    left, middle, right = op.factors
    return BlockSandwich(verbs.adjoint(right), middle, verbs.adjoint(left))


@verbs.to_dense.register
def matrix_of_block_sandwich(op: BlockSandwich) -> Tensor:
    """Layer by layer; by products where S has no roots with structure."""
    roots, (left, right) = op.roots(), op.sides
    if roots is None:
        return matrix_of_operator(op)
    if left is not right:
        return cross_gram(left, right, roots)
    total = GramTotal(left, left, list(left.risk.params), roots)
    return sum_columns(left, total).matrix


@verbs.diagonal.register
def diagonal_of_block_sandwich(op: BlockSandwich) -> Tensor:
    """Of blocks of one entry."""
    return verbs.diagonal_blocks(op, 1).flatten()


@verbs.diagonal_blocks.register
def diagonal_blocks_of_block_sandwich(op: BlockSandwich, size: int) -> Tensor:
    """From the columns of each sample alone."""
    roots, (left, right) = op.roots(), op.sides
    whole = left.layout.is_uniform and not left.width % size
    if roots is None or left is not right or not whole:
        return diagonal_blocks_of_product(op, size)
    grams = sum_columns(left, SampleGrams(left, left, roots)).matrices
    return blocks_of_samples(grams, size)


def _transform(root: Op) -> Transform | None:
    """Return columns ↦ Rᵀ columns for an R that keeps their structure, or is small."""
    if isinstance(root, Diagonal):
        return partial(weighted, weights=root.entries)
    if isinstance(root, Dense):
        return partial(_formed, root=root)
    if isinstance(root, Kronecker) and len(root.factors) == 2:
        first, second = map(verbs.to_dense, root.factors)
        return partial(_rotated, root=root, first=first, second=second)
    if isinstance(root, Scaled) and isinstance(root.operator, Kronecker):
        factor, *others = root.operator.factors
        return _transform(Kronecker(verbs.scale(factor, root.factor), *others))
    if isinstance(root, Product) and len(root.factors) == 2:
        inner, scales = _transform(root.factors[0]), root.factors[1]
        if inner is not None and isinstance(scales, Diagonal):
            rotate, entries = inner, scales.entries
            return lambda columns: weighted(rotate(columns), entries)
    return None


def _rotated(
    columns: LayerColumns, root: Kronecker, first: Tensor, second: Tensor
) -> LayerColumns:
    """Return (F ⊗ E)ᵀ (b ⊗ a), or of a ⊗ b where the layer has inputs first."""
    if type(columns) is not KhatriRaoColumns:
        return _formed(columns, root)
    inputs, cotangents = columns.inputs, columns.cotangents
    for_inputs, for_cotangents = (
        (first, second) if columns.inputs_first else (second, first)
    )
    fits = inputs.shape[1] == 1 and len(for_inputs) == inputs.shape[2]
    if not fits or len(for_cotangents) != cotangents.shape[3]:
        return _formed(columns, root)
    return KhatriRaoColumns(
        for_inputs.T @ inputs, for_cotangents.T @ cotangents, columns.inputs_first
    )


def _formed(columns: LayerColumns, root: Op) -> LayerColumns:
    rows = root.T.apply(columns.rows().T).T
    return DenseColumns(rows.reshape(columns.num_samples, columns.width, -1))
