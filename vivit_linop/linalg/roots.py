"""Square roots: the rules of ``sqrt``, for sampling and for factors.

A square root of A is an R with A = R Rᵀ, unique up to an orthogonal mixing of its
columns: ``R @ noise`` with standard normal noise is a sample of N(0, A).
"""

from __future__ import annotations

from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from vivit_linop.arguments import Scalar
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import Damped, DampedInverse, DiagonalWoodbury
from vivit_linop.operators.dispatch import no_root
from vivit_linop.operators.elementary import (
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
    Sum,
    as_dense,
    as_multiple,
    dense_over,
    symmetric_over,
)
from vivit_linop.operators.kronecker import BlockDiagonal, CorrectedKronecker, Kronecker
from vivit_linop.operators.lowrank import DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.symmetric import symmetric_eigenpairs, without_noise

Generator: TypeAlias = torch.Generator | None

# Relative to the largest eigenvalue: what rounding may do to a zero.
_TOLERANCE = 1e3


@verbs.sqrt.register
def root_of_identity(op: Identity) -> Op:
    return op


@verbs.sqrt.register
def root_of_diagonal(op: Diagonal) -> Op:
    return Diagonal(_roots(op.entries))


@verbs.sqrt.register
def root_of_dense(op: Dense) -> Op:
    """Q √Λ."""
    op._check_self_adjoint("sqrt")
    evals, evecs = op.ranks.led(symmetric_eigenpairs, op.matrix)
    return op.like(evecs * _roots(evals))


@verbs.sqrt.register
def root_of_dense_inverse(op: DenseInverse) -> Op:
    """Q (Λ + δ I)^−½, from the eigenpairs of the inverted matrix."""
    op._check_self_adjoint("sqrt")
    evals, evecs = op.ranks.led(symmetric_eigenpairs, op.operator.matrix.double())
    evals = evals + op.damping
    if evals[0] <= 0.0:
        noise = len(evals) ** 0.5 * torch.finfo(op.torch_dtype).eps * evals.abs().max()
        raise ValueError(
            f"sqrt: what the inverse inverts has the eigenvalue {evals[0]:.3g}; "
            + (
                f"in {op.torch_dtype} that is 0 but for rounding. Add damping: (A + "
                "delta * Identity(n)).inv().sqrt(), or use float64."
                if evals[0] >= -noise
                else "the inverse is not positive semi-definite."
            )
        )
    return op.operator.like((evecs / evals.sqrt()).to(op.torch_dtype))


@verbs.sqrt.register
def root_of_gram(op: Gram) -> Op:
    """VᵀV = Vᵀ (Vᵀ)ᵀ."""
    op._check_self_adjoint("sqrt")
    return op.left.T


@verbs.sqrt.register
def root_of_low_rank(op: LowRank) -> Op:
    """√c V."""
    return verbs.scale(op.factor, op.scale**0.5)


@verbs.sqrt.register
def root_of_scaled(op: Scaled) -> Op:
    if op.factor >= 0.0:
        return verbs.scale(verbs.sqrt(op.operator), op.factor**0.5)
    op._check_self_adjoint("sqrt")
    inner = op.operator
    # What is negative semi-definite itself.
    if isinstance(inner, Kronecker):
        return verbs.sqrt(
            Kronecker(verbs.scale(inner.factors[0], op.factor), *inner.factors[1:])
        )
    if isinstance(inner, Product) and len(inner.factors) % 2:
        factors, half = list(inner.factors), len(inner.factors) // 2
        factors[half] = verbs.scale(factors[half], op.factor)
        return verbs.sqrt(Product(*factors))
    if isinstance(inner, DenseInverse):
        return verbs.sqrt(dense_over(op.ranks, op.factor * verbs.to_dense(inner)))
    raise ValueError(
        f"sqrt: a {type(inner).__name__} is scaled by {op.factor}, below 0. If the "
        "whole is positive semi-definite, take Dense(op.to_dense()).sqrt()."
    )


@verbs.sqrt.register
def root_of_product(op: Product) -> Op:
    """√(A B Aᵀ) = A √B, as in eigendecompositions Q Λ Qᵀ."""
    op._check_self_adjoint("sqrt")
    half = len(op.factors) // 2
    if (root := _narrow_root(op)) is not None:
        return root
    if len(op.factors) % 2 == 0:
        return Product(*op.factors[:half])
    middle = op.factors[half]
    try:
        return Product(*op.factors[:half], verbs.sqrt(middle))
    except ValueError:  # B is indefinite, A B Aᵀ need not be
        return _root_of_mirrored(Product(*op.factors[:half]), middle)


def _narrow_root(op: Product) -> Op | None:
    """A V √(c² VᵀB V) of A (c V Vᵀ) B (c V Vᵀ) Aᵀ, as of powers.

    None where there is no such V, or it has more columns than rows.
    """
    for at, factor in enumerate(op.factors[: len(op.factors) // 2]):
        if (
            isinstance(factor, LowRank)
            and factor.by_gram
            and factor.semidefinite
            and not op.requires_grad
        ):
            V, between = factor.factor, op.factors[at + 1 : -at - 1]
            small = verbs.to_dense(reduce(verbs.matmul, (V.T, *between, V)))
            middle = symmetric_over(op.ranks, factor.scale**2 * (small + small.T) / 2)
            return Product(*op.factors[:at], V, verbs.sqrt(middle))
    return None


@verbs.sqrt.register
def root_of_block_diagonal(op: BlockDiagonal) -> Op:
    """Block by block; roots need not be square, then they follow each other."""
    roots = [block.sqrt() for block in op.blocks]
    square = all(root.shape[0] == root.shape[1] for root in roots)
    if op.indices is not None and not square:
        raise TypeError(
            "sqrt: blocks at scattered places have low-rank roots. Take the roots of "
            "op.blocks one by one."
        )
    return op.like(roots)


@verbs.sqrt.register
def root_of_kronecker(op: Kronecker) -> Op:
    """√(A ⊗ B) = √A ⊗ √B, from the factors' eigendecompositions."""
    op._check_self_adjoint("sqrt")
    # (−A) ⊗ (−B) has a root, though its factors have none.
    if any(without_noise(evals).min() < 0.0 for evals, _ in op.factor_eigenpairs):
        return Product(op.eigenvectors, Diagonal(_roots(op.eigenvalues)))
    return Kronecker(
        *(
            dense_over(op.ranks, evecs * _roots(evals))
            for evals, evecs in op.factor_eigenpairs
        )
    )


@verbs.sqrt.register
def root_of_corrected_kronecker(op: CorrectedKronecker) -> Op:
    return verbs.damped_sqrt(op, 0.0)


@verbs.sqrt.register
def root_of_damped(op: Damped) -> Op:
    return verbs.damped_sqrt(op.operator, op.damping)


@verbs.sqrt.register
def root_of_inverse(op: Woodbury | DampedInverse) -> Op:
    """(A + δ I)⁻¹ = R⁻ᵀ R⁻¹ with A + δ I = R Rᵀ."""
    return verbs.inv(verbs.damped_sqrt(op.operator, op.damping)).T


@verbs.sample.register
def samples_of_operator(op: Op, num: int, generator: Generator = None) -> Tensor:
    """R ε with A = R Rᵀ."""
    root = verbs.sqrt(op)
    return root.apply(_noise(op, root.shape[1], num, generator))


@verbs.sample.register
def samples_of_scaled(op: Scaled, num: int, generator: Generator = None) -> Tensor:
    if not op.factor >= 0.0:
        return samples_of_operator(op, num, generator)
    return op.factor**0.5 * verbs.sample(op.operator, num, generator)


@verbs.sample.register
def samples_of_damped(op: Damped, num: int, generator: Generator = None) -> Tensor:
    """Of low-rank nodes and sums, their samples and √δ ε: there need be no root."""
    of, factor = as_multiple(op.operator)
    adds_up = factor >= 0.0 and op.damping >= 0.0
    if not isinstance(of, (LowRank, Sum)) or not adds_up:
        return samples_of_operator(op, num, generator)
    samples = verbs.sample(op.operator, num, generator)
    return samples + op.damping**0.5 * _noise(op, op.shape[0], num, generator)


@verbs.sample.register
def samples_of_inverse(
    op: Woodbury | DampedInverse | DiagonalWoodbury,
    num: int,
    generator: Generator = None,
) -> Tensor:
    """A⁻¹ times those of A, of covariance A⁻¹ A A⁻¹."""
    return op.apply(verbs.sample(verbs.inv(op), num, generator))


@verbs.sample.register
def samples_of_block_diagonal(
    op: BlockDiagonal, num: int, generator: Generator = None
) -> Tensor:
    """Block by block."""
    if not op.has_square_blocks:
        return samples_of_operator(op, num, generator)
    return op.join([verbs.sample(block, num, generator) for block in op.blocks])


def _noise(op: Op, rows: int, num: int, generator: Generator) -> Tensor:
    """Draw ε, the same in all precisions, on all devices and in all processes."""
    noise = torch.randn(
        (rows, num),
        generator=generator,
        dtype=torch.float64,
        device="cpu" if generator is None else generator.device,
    )
    return op.ranks.sent(noise).to(op.device, op.torch_dtype)


# √(A + δ I) by what A is ------------------------------------------------------------


@verbs.damped_sqrt.register
def damped_root_of_dense(op: Dense, damping: Scalar) -> Op:
    op._check_self_adjoint("sqrt")
    evals, evecs = op.ranks.led(symmetric_eigenpairs, op.matrix.double())
    roots = _roots(evals + damping, op.torch_dtype)
    return op.like((evecs * roots).to(op.torch_dtype))


@verbs.damped_sqrt.register
def damped_root_of_gram(op: Gram, damping: Scalar) -> Op:
    return verbs.damped_sqrt(as_dense(op), damping)


@verbs.damped_sqrt.register
def damped_root_of_low_rank(op: LowRank, damping: Scalar) -> Op:
    """Symmetric; through the eigenpairs of the smaller side."""
    return DampedRoot(op, damping)


@verbs.damped_sqrt.register
def damped_root_of_diagonal(op: Diagonal, damping: Scalar) -> Op:
    return verbs.sqrt(verbs.damp(op, damping))


@verbs.damped_sqrt.register
def damped_root_of_scaled(op: Scaled, damping: Scalar) -> Op:
    """√(c A + δ I) = √c √(A + δ/c I)."""
    if not op.factor > 0.0:
        raise no_root(op, "a damped ")
    return verbs.scale(
        verbs.sqrt(verbs.damp(op.operator, damping / op.factor)), op.factor**0.5
    )


@verbs.damped_sqrt.register
def damped_root_of_product(op: Product, damping: Scalar) -> Op:
    op._check_self_adjoint("sqrt")
    return verbs.damped_sqrt(op.reduced, damping)


@verbs.damped_sqrt.register
def damped_root_of_block_diagonal(op: BlockDiagonal, damping: Scalar) -> Op:
    return verbs.sqrt(op.like([verbs.damp(block, damping) for block in op.blocks]))


@verbs.damped_sqrt.register
def damped_root_of_kronecker(op: Kronecker | CorrectedKronecker, damping: Scalar) -> Op:
    """Q (Λ + δ I)^½, with the Kronecker products of the factors' eigenpairs."""
    op._check_self_adjoint("sqrt")
    evals = without_noise(op.eigenvalues) if damping > 0.0 else op.eigenvalues
    return Product(op.eigenvectors, Diagonal(_roots(evals + damping)))


def _root_of_mirrored(outer: Op, middle: Op) -> Op:
    """√(A B Aᵀ) on the smaller side: of A B Aᵀ, or of R B Rᵀ with A = Q R."""
    A, B = verbs.to_dense(outer).double(), verbs.to_dense(middle).double()
    ranks, dtype = Product(outer, middle).ranks, outer.torch_dtype
    return dense_over(ranks, ranks.led(_mirrored_root, A, B, dtype).to(dtype))


def _mirrored_root(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """One whose products with its transpose are A B Aᵀ, of what was in a dtype."""
    Q = None
    if A.shape[0] > A.shape[1]:
        Q, A = torch.linalg.qr(A)
    evals, evecs = symmetric_eigenpairs(A @ ((B + B.T) / 2) @ A.T)
    root = evecs * _roots(evals, dtype)
    return root if Q is None else Q @ root


def _roots(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Roots of eigenvalues, of which rounding may have made zeros negative."""
    eps = torch.finfo(dtype or values.dtype).eps
    limit = -_TOLERANCE * eps * values.abs().max()
    if values.min() < limit:
        raise ValueError(
            f"sqrt: the operator is not positive semi-definite, it has the eigenvalue "
            f"{values.min():.3g}."
        )
    return values.clamp(min=0.0).sqrt()
