"""Inverses and Moore–Penrose inverses: the rules of ``inv`` and ``pinv``.

Both dispatch on the node; the inverse of a damped node on what is damped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vivit_linop.arguments import Scalar, as_float, as_scalar
from vivit_linop.linalg.decompositions import (
    GramEigenpairs,
    coarsest,
    gram_rounding_error,
)
from vivit_linop.linalg.iterative import IterativeWoodbury
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import (
    Damped,
    DampedDense,
    DampedInverse,
    DiagonallyDamped,
    DiagonalWoodbury,
)
from vivit_linop.operators.dispatch import no_inverse
from vivit_linop.operators.elementary import (
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
    as_dense,
    dense_over,
)
from vivit_linop.operators.kronecker import BlockDiagonal, CorrectedKronecker, Kronecker
from vivit_linop.operators.lowrank import DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.parts import Restricted
from vivit_linop.operators.symmetric import without_noise

# An inverse without damping is to have at least two digits.
_DIGITS = 100.0


# Inverses ----------------------------------------------------------------------------


@verbs.inv.register
def inverse_of_identity(op: Identity) -> Op:
    return op


@verbs.inv.register
def inverse_of_dense(op: Dense) -> Op:
    return DenseInverse(op)


@verbs.inv.register
def inverse_of_gram(op: Gram) -> Op:
    return DenseInverse(as_dense(op))


@verbs.inv.register
def inverse_of_diagonal(op: Diagonal) -> Op:
    if (op.entries == 0).any():
        zero = int((op.entries == 0).nonzero()[0])
        raise ValueError(
            f"inv: the diagonal operator is singular, entry {zero} is 0. Add damping: "
            "(A + delta * Identity(n)).inv()."
        )
    return Diagonal(1.0 / op.entries)


@verbs.inv.register
def inverse_of_scaled(op: Scaled) -> Op:
    if op.factor == 0.0:
        raise ValueError("inv: the operator is scaled by 0 and has no inverse.")
    return verbs.scale(verbs.inv(op.operator), 1.0 / op.factor)


@verbs.inv.register
def inverse_of_product(op: Product) -> Op:
    """(A B)⁻¹ = B⁻¹ A⁻¹ for square factors."""
    if all(factor.shape[0] == factor.shape[1] for factor in op.factors):
        return Product(*(verbs.inv(factor) for factor in reversed(op.factors)))
    if op.self_adjoint:
        return verbs.inv(op.reduced_or(no_inverse(op)))
    raise TypeError(
        "inv: a product of rectangular operators has no closed-form inverse. "
        "op.solve(b) iterates."
    )


@verbs.inv.register
def inverse_of_block_diagonal(op: BlockDiagonal) -> Op:
    _check_parts(op.blocks, "block-diagonal operator with rectangular blocks")
    return op.like([block.inv() for block in op.blocks])


@verbs.inv.register
def inverse_of_kronecker(op: Kronecker) -> Op:
    """(A ⊗ B)⁻¹ = A⁻¹ ⊗ B⁻¹."""
    _check_parts(op.factors, "Kronecker product of rectangular factors")
    return Kronecker(*(factor.inv() for factor in op.factors))


@verbs.inv.register
def inverse_of_corrected_kronecker(op: CorrectedKronecker) -> Op:
    """Of eigenvalues that are squares, of numbers with rounding errors."""
    sizes = op.eigenvalues.abs()
    if not (sizes > _accuracy(op) ** 2 * sizes.max()).all():
        raise _singular(op)
    return verbs.damped_inv(op, 0.0)


@verbs.inv.register
def inverse_of_damped_root(op: DampedRoot) -> Op:
    return DampedRoot(op.operator, op.damping, not op.inverse)


@verbs.inv.register
def inverse_of_low_rank(op: LowRank) -> Op:
    """Through the D × D side, where V has full rank and is well-conditioned."""
    what = (
        f"inv: a low-rank operator {tuple(op.shape)} with a factor of "
        f"{op.factor.shape[1]} columns is singular"
    )
    advice = "Add damping: (G + delta * Identity(D)).inv()."
    if op.factor.shape[1] < op.shape[0]:
        zeros = op.shape[0] - op.factor.shape[1]
        raise ValueError(f"{what}: {zeros} of its eigenvalues are 0. {advice}")
    evals = verbs.eigvalsh(op)
    low, high = evals[0].item(), evals[-1].item()
    if not low > _DIGITS * gram_rounding_error(evals, len(evals)):
        condition = f"{high / low:.1e}" if low > 0.0 else "infinite"
        raise ValueError(
            f"{what} or close to it: its condition number is {condition} in "
            f"{op.torch_dtype}. {advice}"
        )
    matrix = verbs.to_dense(op)
    return DenseInverse(dense_over(op.ranks, (matrix + matrix.T) / 2))


@verbs.inv.register
def inverse_of_damped(op: Damped) -> Op:
    """By what is damped; for a δ that requires grad around that, if A does not."""
    A, damping = op.operator, op.damping
    if not isinstance(damping, Tensor) or A.requires_grad:
        return verbs.damped_inv(A, damping)
    return DampedInverse(A, damping, verbs.damped_inv(A, damping.item()))


@verbs.inv.register
def inverse_of_inverse(op: DenseInverse | DampedInverse | Woodbury) -> Op:
    return verbs.damp(op.operator, op.damping)


# (A + δ I)⁻¹ by what A is -----------------------------------------------------------


@verbs.damped_inv.register
def damped_inverse_of_diagonal(op: Diagonal | Identity | Damped, damping: Scalar) -> Op:
    """What absorbs a damping, also where a node was made that had not."""
    return verbs.inv(verbs.damp(op, damping))


@verbs.damped_inv.register
def damped_inverse_of_low_rank(op: LowRank, damping: Scalar) -> Op:
    """By a factor of the small side; by iteration, if processes share one too large."""
    if damping < 0.0:
        raise no_inverse(op, "a negatively damped ")
    try:
        return Woodbury(op, damping)
    except MemoryError:
        if not op.by_gram or op.gram.rows is None:
            raise
    return IterativeWoodbury(op, damping)


@verbs.damped_inv.register
def damped_inverse_of_inverse(op: Woodbury | DampedInverse, damping: Scalar) -> Op:
    """(A⁻¹ + δ I)⁻¹ = I/δ − (A + I/δ)⁻¹/δ², if that leaves half of the digits.

    For A = c V Vᵀ + d I and a negative δ, as of I − ε A⁻¹, if d + 1/δ is positive.
    """
    product = as_float(op.damping * damping)
    least = torch.finfo(op.torch_dtype).eps ** 0.5
    if not (product > least or product < -1.0 - least):
        raise no_inverse(op, "a damped ")
    inverse = verbs.inv(verbs.damp(op.operator, op.damping + 1.0 / damping))
    return verbs.damp(
        verbs.scale(verbs.scale(inverse, -1.0 / damping), 1.0 / damping), 1.0 / damping
    )


@verbs.damped_inv.register
def damped_inverse_of_matrix(
    op: DenseInverse | Gram | Restricted, damping: Scalar
) -> Op:
    return verbs.damped_inv(as_dense(op), damping)


@verbs.damped_inv.register
def damped_inverse_of_dense(op: Dense, damping: Scalar) -> Op:
    if isinstance(damping, Tensor):
        unit = torch.eye(op.shape[0], dtype=op.torch_dtype, device=op.device)
        return DenseInverse(op.like(op.matrix + damping * unit))
    return DenseInverse(op, damping)


@verbs.damped_inv.register
def damped_inverse_of_scaled(op: Scaled, damping: Scalar) -> Op:
    """(c A + δ I)⁻¹ = (A + δ/c I)⁻¹ / c."""
    if op.factor == 0.0:
        return verbs.scale(
            Identity(op.shape[0], op._own_dtype, op._own_device), 1 / damping
        )
    return verbs.scale(
        verbs.inv(verbs.damp(op.operator, damping / op.factor)), 1.0 / op.factor
    )


@verbs.damped_inv.register
def damped_inverse_of_product(op: Product, damping: Scalar) -> Op:
    return verbs.damped_inv(op.reduced_or(no_inverse(op, "a damped ")), damping)


@verbs.damped_inv.register
def damped_inverse_of_block_diagonal(op: BlockDiagonal, damping: Scalar) -> Op:
    if not op.has_square_blocks:
        return verbs.damped_inv(as_dense(op), damping)
    return op.like([verbs.inv(verbs.damp(block, damping)) for block in op.blocks])


@verbs.damped_inv.register
def damped_inverse_of_kronecker(op: Kronecker, damping: Scalar) -> Op:
    """Q (Λ + δ I)⁻¹ Qᵀ, with Q and Λ the Kronecker products of the factors'."""
    op._check_self_adjoint("inv of a damped Kronecker operator")
    return verbs.damped_inv(CorrectedKronecker(op, op.eigenvalues), damping)


@verbs.damped_inv.register
def damped_inverse_of_corrected_kronecker(
    op: CorrectedKronecker, damping: Scalar
) -> Op:
    """Positive definite for δ > 0 where Λ is but for rounding."""
    evals = without_noise(op.eigenvalues) if damping > 0.0 else op.eigenvalues
    sums = evals + damping
    # What a δ of the other sign leaves of an eigenvalue that is known up to rounding.
    rounding = _accuracy(op) * evals.abs().max()
    lost = (evals * damping < 0.0) & (sums.abs() <= rounding)
    if (lost | (sums == 0.0)).any():  # the one wait
        raise _singular(op)
    return CorrectedKronecker(op.basis, 1.0 / sums)


def _accuracy(op: Op) -> float:
    """What rounding may do to an eigenvalue, relative to the largest."""
    return max(10.0, min(op.shape) ** 0.5) * torch.finfo(coarsest(op)).eps


def _singular(op: Op) -> ValueError:
    return ValueError(
        f"inv: the operator is singular, or but for rounding in {op.torch_dtype}. Add "
        "damping: (A + delta * Identity(n)).inv()."
    )


def _check_parts(parts: Sequence[Op], what: str) -> None:
    if any(part.shape[0] != part.shape[1] for part in parts):
        raise ValueError(f"inv: a {what} is singular: it has less than full rank.")


# Moore–Penrose inverses --------------------------------------------------------------


@verbs.pinv.register
def pinv_of_operator(op: Op, rcond: float | None = None) -> Op:
    """By eigenpairs of A, or A⁺ = (AᵀA)⁺ Aᵀ = Aᵀ (A Aᵀ)⁺ on the smaller side."""
    if op.self_adjoint:
        return _of_eigenpairs(op, rcond)
    fine = rcond is not None and rcond**2 < _accuracy(op)
    if op.requires_grad or fine:  # squares, and their derivatives, lose the digits
        return verbs.pinv(as_dense(op), rcond)
    tall = op.shape[0] >= op.shape[1]
    # The eigenvalues of the Gram matrix are the squares of the singular values.
    squares = as_dense(verbs.gram(op if tall else op.T))
    info = torch.finfo(op.torch_dtype)
    if not info.tiny / info.eps**2 <= squares.matrix.abs().max() < math.inf:
        return verbs.pinv(as_dense(op), rcond)  # of such numbers, squares are none
    accuracy = _accuracy(op) if rcond is None else rcond**2
    small = pinv_of_dense(squares, accuracy)
    return Product(small, op.T) if tall else Product(op.T, small)


def _of_eigenpairs(op: Op, rcond: float | None) -> Op:
    """E (Λ⁺ − ρ⁺ I) Eᵀ + ρ⁺ I with the eigenvalue ρ of all other vectors."""
    rcond = _accuracy(op) if rcond is None else rcond
    decomposition = verbs.eigendecomposition(op)
    if decomposition.rest is not None and isinstance(op, Damped):
        A = op.operator
        if isinstance(A, BlockDiagonal):  # each block has its own ρ
            return verbs.pinv(
                A.like([verbs.damp(block, op.damping) for block in A.blocks]), rcond
            )
    evals, evecs = decomposition.pairs(decomposition.default())
    rest = torch.as_tensor(decomposition.rest or 0.0).to(evals)
    all_evals = Diagonal(torch.cat([evals, rest.reshape(1)]))
    inverses = verbs.diagonal(pinv_of_diagonal(all_evals, rcond))
    others = as_scalar(inverses[-1])
    if not len(evals):
        return verbs.damp(_zero(op), others)
    E = dense_over(op.ranks, evecs)
    weights = Diagonal(inverses[:-1] - others)
    return verbs.damp(Product(E, weights, E.T), others)


def _zero(op: Op) -> Op:
    """The zero operator of the shape of the adjoint."""
    return verbs.scale(op.T, 0.0)


@verbs.pinv.register
def pinv_of_low_rank(op: LowRank, rcond: float | None = None) -> Op:
    """(V W)(V W)ᵀ, with the eigenpairs e = V w' of c V Vᵀ and W = w'/√λ."""
    if not op.semidefinite:
        return _of_eigenpairs(op, rcond)
    pairs = verbs.eigh(op, rcond=rcond)
    if not len(pairs):
        return _zero(op)
    roots = pairs.eigenvalues.sqrt()
    if isinstance(pairs, GramEigenpairs):
        weights = dense_over(op.ranks, pairs.coefficients / roots)
        return LowRank(Product(pairs.operator.factor, weights))
    return LowRank(dense_over(op.ranks, pairs.eigenvectors / roots))


@verbs.pinv.register
def pinv_of_dense(op: Dense | DampedDense, rcond: float | None = None) -> Op:
    if rcond is None:
        rcond = max(op.shape) * torch.finfo(op.torch_dtype).eps
    found = partial(torch.linalg.pinv, rtol=rcond, hermitian=op.self_adjoint)
    return dense_over(op.ranks, op.ranks.led(found, op.matrix))


@verbs.pinv.register
def pinv_of_gram(op: Gram, rcond: float | None = None) -> Op:
    """Rounding errors of a Gram matrix are those of its eigenvalues."""
    rcond = _accuracy(op) if rcond is None else rcond
    return pinv_of_dense(as_dense(op), rcond)


@verbs.pinv.register
def pinv_of_diagonal(op: Diagonal, rcond: float | None = None) -> Op:
    sizes = op.entries.abs()
    eps = torch.finfo(op.torch_dtype).eps
    nonzero = sizes > (eps if rcond is None else rcond) * sizes.max()
    ones = torch.ones_like(op.entries)
    inverse = ones / torch.where(nonzero, op.entries, ones)
    return Diagonal(torch.where(nonzero, inverse, torch.zeros_like(ones)))


@verbs.pinv.register
def pinv_of_regular(
    op: Identity
    | Damped
    | DampedInverse
    | DampedRoot
    | DenseInverse
    | DiagonallyDamped
    | DiagonalWoodbury
    | Woodbury,
    rcond: float | None = None,
) -> Op:
    """What is not singular, unless eigenvalues are to count as zero."""
    regular = rcond is None
    if rcond is not None and op.self_adjoint:
        sizes = verbs.eigvalsh(op).abs()
        regular = bool(sizes.min() > rcond * sizes.max())
    if regular:
        with contextlib.suppress(TypeError, ValueError):  # I − P is singular
            return verbs.inv(op)
    return pinv_of_operator(op, rcond)


@verbs.pinv.register
def pinv_of_scaled(op: Scaled, rcond: float | None = None) -> Op:
    if op.factor == 0.0:
        return _zero(op.operator)
    return verbs.scale(verbs.pinv(op.operator, rcond), 1.0 / op.factor)


@verbs.pinv.register
def pinv_of_kronecker(op: Kronecker, rcond: float | None = None) -> Op:
    """(A ⊗ B)⁺ = A⁺ ⊗ B⁺."""
    return Kronecker(*(verbs.pinv(factor, rcond) for factor in op.factors))


@verbs.pinv.register
def pinv_of_corrected_kronecker(
    op: CorrectedKronecker, rcond: float | None = None
) -> Op:
    """Q Λ⁺ Qᵀ."""
    inverse = verbs.pinv(Diagonal(op.eigenvalues), rcond)
    return CorrectedKronecker(op.basis, verbs.to_dense(inverse).diagonal())


@verbs.pinv.register
def pinv_of_product(op: Product, rcond: float | None = None) -> Op:
    """Of A B Aᵀ, on its small side; of others as of any operator."""
    if not op.self_adjoint:
        return pinv_of_operator(op, rcond)
    missing = "pinv: no closed form for this product, whose middle has no root. Take "
    return verbs.pinv(
        op.reduced_or(TypeError(missing + "Dense(op.to_dense()) if it is small.")),
        rcond,
    )
