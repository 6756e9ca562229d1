"""Moore–Penrose inverses: the rules of ``pinv``."""

from __future__ import annotations

import torch

from vivit_linop.linalg.decompositions import GramEigenpairs
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.damped import Damped, DampedDense, DampedInverse
from vivit_linop.operators.elementary import (
    Adjoint,
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
)
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    Kronecker,
)
from vivit_linop.operators.lowrank import DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.verbs import (
    adjoint,
    eigh,
    gram,
    inv,
    pinv,
    scale,
    to_dense,
)

Op = TorchLinearOperator


@pinv.register
def pinv_of_operator(op: TorchLinearOperator, rcond: float | None = None) -> Op:
    """By eigenpairs of A, or A⁺ = (AᵀA)⁺ Aᵀ = Aᵀ (A Aᵀ)⁺ on the smaller side."""
    if op.self_adjoint:
        return _of_eigenpairs(op, rcond)
    tall = op.shape[0] >= op.shape[1]
    factor = op if tall else adjoint(op)
    # The eigenvalues of the Gram matrix are the squares of the singular values.
    small = pinv(gram(factor), None if rcond is None else rcond**2)
    return Product(small, adjoint(op)) if tall else Product(adjoint(op), small)


def _of_eigenpairs(op: Op, rcond: float | None) -> Op:
    """E Λ⁻¹ Eᵀ over the eigenvalues that are not zero."""
    if rcond is None:
        rcond = max(10.0, op.shape[0] ** 0.5) * torch.finfo(op.torch_dtype).eps
    evals, evecs = eigh(op, rcond=rcond)
    if not len(evals):
        return _zero(op)
    E = Dense(evecs)
    return Product(E, Diagonal(1.0 / evals), adjoint(E))


def _zero(op: Op) -> Op:
    """The zero operator of the shape of the adjoint."""
    return scale(adjoint(op), 0.0)


@pinv.register
def pinv_of_low_rank(op: LowRank, rcond: float | None = None) -> Op:
    """(V W)(V W)ᵀ, with the eigenpairs e = V w' of c V Vᵀ and W = w'/√λ."""
    if not op.semidefinite:
        return _of_eigenpairs(op, rcond)
    pairs = eigh(op, rcond=rcond)
    if not len(pairs):
        return _zero(op)
    roots = pairs.eigenvalues.sqrt()
    if isinstance(pairs, GramEigenpairs):
        weights = Dense(pairs.coefficients / roots)
        return LowRank(Product(pairs.operator.factor, weights))
    return LowRank(Dense(pairs.eigenvectors / roots))


@pinv.register
def pinv_of_dense(op: Dense | DampedDense, rcond: float | None = None) -> Op:
    rtol = rcond or max(op.shape) * torch.finfo(op.torch_dtype).eps
    matrix = torch.linalg.pinv(op.matrix, rtol=rtol, hermitian=op.self_adjoint)
    return Dense(matrix)


@pinv.register
def pinv_of_gram(op: Gram, rcond: float | None = None) -> Op:
    """Rounding errors of a Gram matrix are those of its eigenvalues."""
    if rcond is None:
        rcond = max(10.0, op.shape[0] ** 0.5) * torch.finfo(op.torch_dtype).eps
    return pinv_of_dense(Dense(op.matrix), rcond)


@pinv.register
def pinv_of_diagonal(op: Diagonal, rcond: float | None = None) -> Op:
    sizes = op.entries.abs()
    eps = torch.finfo(op.torch_dtype).eps
    nonzero = sizes > (eps if rcond is None else rcond) * sizes.max()
    ones = torch.ones_like(op.entries)
    inverse = ones / torch.where(nonzero, op.entries, ones)
    return Diagonal(torch.where(nonzero, inverse, torch.zeros_like(ones)))


@pinv.register
def pinv_of_regular(
    op: Identity | Damped | DampedInverse | DenseInverse | Woodbury | DampedRoot,
    rcond: float | None = None,
) -> Op:
    """What is not singular."""
    return inv(op)


@pinv.register
def pinv_of_adjoint(op: Adjoint, rcond: float | None = None) -> Op:
    return adjoint(pinv(op.parent, rcond))


@pinv.register
def pinv_of_scaled(op: Scaled, rcond: float | None = None) -> Op:
    if op.factor == 0.0:
        return _zero(op.operator)
    return scale(pinv(op.operator, rcond), 1.0 / op.factor)


@pinv.register
def pinv_of_block_diagonal(op: BlockDiagonal, rcond: float | None = None) -> Op:
    """Block by block."""
    return op.like([pinv(block, rcond) for block in op.blocks])


@pinv.register
def pinv_of_kronecker(op: Kronecker, rcond: float | None = None) -> Op:
    """(A ⊗ B)⁺ = A⁺ ⊗ B⁺."""
    return Kronecker(*(pinv(factor, rcond) for factor in op.factors))


@pinv.register
def pinv_of_corrected_kronecker(
    op: CorrectedKronecker, rcond: float | None = None
) -> Op:
    """Q Λ⁺ Qᵀ."""
    inverse = pinv(Diagonal(op.eigenvalues), rcond)
    return CorrectedKronecker(op.basis, to_dense(inverse).diagonal())


@pinv.register
def pinv_of_product(op: Product, rcond: float | None = None) -> Op:
    """Of A B Aᵀ, on its small side; of others as of any operator."""
    if not op.self_adjoint:
        return pinv_of_operator(op, rcond)
    missing = "pinv: no closed form for this product, whose middle has no root. Take "
    return pinv(
        op.reduced_or(TypeError(missing + "Dense(op.to_dense()) if it is small.")),
        rcond,
    )
