"""Products, sums and scalings: the rewrite rules of the algebra.

Each rule is an identity; the newest that matches the types of the operands applies.
``A.T`` is recognised by identity, never by comparing numbers. Rules of sums that
commute are written for one order. The rules for Jacobians
stand in :mod:`vivit_linop.curvature.rules`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vivit_linop.arguments import Scalar, as_float
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op, settle
from vivit_linop.operators.damped import Damped, DampedDense, DiagonallyDamped
from vivit_linop.operators.elementary import (
    Adjoint,
    Dense,
    Diagonal,
    Identity,
    Product,
    Scaled,
    Sum,
    as_multiple,
    dense_over,
)
from vivit_linop.operators.grams import aligned
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    KhatriRao,
    Kronecker,
)
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.operators.parts import HStack

# A Kronecker product with so few rows has an exact sum with a diagonal: a matrix.
DENSE_ROWS = 2048

# A B ------------------------------------------------------------------------------


@verbs.matmul.rule(Op, Op)
def product_of_operators(A: Op, B: Op) -> Op:
    """A B is a product; products are flat, and rules apply where two meet."""
    left = A.factors if isinstance(A, Product) else (A,)
    right = B.factors if isinstance(B, Product) else (B,)
    if len(left) + len(right) > 2:
        inner = verbs.matmul(left[-1], right[0])
        if not isinstance(inner, Product):
            for factor in reversed(left[:-1]):
                inner = verbs.matmul(factor, inner)
            for factor in right[1:]:
                inner = verbs.matmul(inner, factor)
            return inner
    return Product(*left, *right)


@verbs.matmul.rule(Op, Adjoint)
def product_of_operator_and_adjoint(A: Op, B: Adjoint) -> Op:
    """V Vᵀ is low-rank."""
    return LowRank(A) if B.parent is A else NotImplemented


@verbs.matmul.rule(Adjoint, Op)
def product_of_adjoint_and_operator(A: Adjoint, B: Op) -> Op:
    """VᵀV is a Gram operator."""
    return Gram(B, B) if A.parent is B else NotImplemented


@verbs.matmul.rule(Adjoint, KhatriRao)
def product_of_adjoint_and_khatri_rao(A: Adjoint, B: KhatriRao) -> Op:
    """(B ⊙ A)ᵀ (D ⊙ C) = (BᵀD) ∘ (AᵀC)."""
    if not isinstance(A.parent, KhatriRao) or not aligned(A.parent, B):
        return NotImplemented
    return Dense(verbs.gram_matrix(A.parent, B))


@verbs.matmul.rule(Dense, Dense)
def product_of_dense(A: Dense, B: Dense) -> Op:
    if not _one_dtype(A, B):
        return NotImplemented
    return (A if A.ranks.is_many else B).like(A.matrix @ B.matrix)


@verbs.matmul.rule(Diagonal, Diagonal)
def product_of_diagonals(A: Diagonal, B: Diagonal) -> Op:
    return Diagonal(A.entries * B.entries)


@verbs.matmul.rule(Kronecker, Kronecker)
def product_of_kroneckers(A: Kronecker, B: Kronecker) -> Op:
    """(A ⊗ B)(C ⊗ D) = AC ⊗ BD."""
    if [a.shape[1] for a in A.factors] != [b.shape[0] for b in B.factors]:
        return NotImplemented
    return Kronecker(*(a @ b for a, b in zip(A.factors, B.factors, strict=True)))


@verbs.matmul.rule(Kronecker, CorrectedKronecker)
@verbs.matmul.rule(CorrectedKronecker, Kronecker)
@verbs.matmul.rule(CorrectedKronecker, CorrectedKronecker)
def product_in_one_eigenbasis(
    A: Kronecker | CorrectedKronecker, B: Kronecker | CorrectedKronecker
) -> Op:
    """Functions of one Kronecker product have its eigenvectors."""
    if A.basis is not B.basis:
        return NotImplemented
    return CorrectedKronecker(A.basis, A.eigenvalues * B.eigenvalues)


@verbs.matmul.rule(BlockDiagonal, BlockDiagonal)
def product_of_block_diagonals(A: BlockDiagonal, B: BlockDiagonal) -> Op:
    """Block-diagonal operators with matching blocks multiply block by block."""
    if [a.shape[1] for a in A.blocks] != [b.shape[0] for b in B.blocks]:
        return NotImplemented
    if not A.has_places_of(B):
        return NotImplemented
    return A.like([a @ b for a, b in zip(A.blocks, B.blocks, strict=True)])


@verbs.matmul.rule(Scaled, Op)
def product_of_scaled_and_operator(A: Scaled, B: Op) -> Op:
    return verbs.scale(verbs.matmul(A.operator, B), A.factor)


@verbs.matmul.rule(Op, Scaled)
def product_of_operator_and_scaled(A: Op, B: Scaled) -> Op:
    return verbs.scale(verbs.matmul(A, B.operator), B.factor)


@verbs.matmul.rule(Identity, Op)
def product_of_identity_and_operator(A: Identity, B: Op) -> Op:
    return B if _decided(B, A) else NotImplemented


@verbs.matmul.rule(Op, Identity)
def product_of_operator_and_identity(A: Op, B: Identity) -> Op:
    return A if _decided(A, B) else NotImplemented


# A + B ----------------------------------------------------------------------------


@verbs.add.rule(Op, Op)
def sum_of_operators(A: Op, B: Op) -> Op:
    """A + B is a sum, and sums are flat; multiples of one operator add up."""
    if A is B:
        return verbs.scale(A, 2.0)
    terms = [*A.terms] if isinstance(A, Sum) else [A]
    for term in B.terms if isinstance(B, Sum) else (B,):
        sums = (_sum_of_multiples(other, term) for other in terms)
        place, found = next(
            ((i, s) for i, s in enumerate(sums) if s is not None), (len(terms), term)
        )
        terms[place : place + 1] = [found]
    return Sum(*terms) if len(terms) > 1 else terms[0]


def _sum_of_multiples(A: Op, B: Op) -> Op | None:
    """(c + d) A of c A and d A, None of others; V Vᵀ is known by V."""
    (A, c), (B, d) = as_multiple(A), as_multiple(B)
    if A is B:
        return verbs.scale(A, c + d)
    if not (isinstance(A, LowRank) and isinstance(B, LowRank)):
        return None
    one = verbs.same(A.factor, B.factor)
    return verbs.scale(A.rescaled(1.0), c * A.scale + d * B.scale) if one else None


@verbs.add.rule(Dense, Dense)
def sum_of_dense(A: Dense, B: Dense) -> Op:
    return (A if A.ranks.is_many else B).like(A.matrix + B.matrix)


@verbs.add.rule(Diagonal, Diagonal)
def sum_of_diagonals(A: Diagonal, B: Diagonal) -> Op:
    return Diagonal(A.entries + B.entries)


@verbs.add.commuting(Dense, Diagonal)
def sum_of_dense_and_diagonal(A: Dense, B: Diagonal) -> Op:
    return A.like(A.matrix + torch.diag(B.entries))


@verbs.add.rule(LowRank, LowRank)
def sum_of_low_ranks(A: LowRank, B: LowRank) -> Op:
    """Multiples of one V Vᵀ add up; V Vᵀ + W Wᵀ = [V W][V W]ᵀ."""
    if verbs.same(A.factor, B.factor):
        return A.rescaled(A.scale + B.scale)
    if not (A.semidefinite and B.semidefinite):
        return NotImplemented
    if not (A.scale and B.scale):  # products of small numbers may be zero
        return B if B.scale else A
    parts = *_side_by_side(A.factor), *_side_by_side(B.factor, B.scale / A.scale)
    return LowRank(HStack(*parts), A.scale)


def _side_by_side(factor: Op, scale_of_outer: float = 1.0) -> list[Op]:
    parts = factor.parts if isinstance(factor, HStack) else (factor,)
    return [verbs.scale(part, scale_of_outer**0.5) for part in parts]


@verbs.add.commuting(LowRank, Diagonal)
def sum_of_low_rank_and_diagonal(A: LowRank, B: Diagonal) -> Op:
    """Damping by a diagonal, of a node with a factor."""
    return DiagonallyDamped(A, B) if A.semidefinite else NotImplemented


@verbs.add.commuting(DiagonallyDamped, Diagonal)
def sum_of_diagonally_damped_and_diagonal(A: DiagonallyDamped, B: Diagonal) -> Op:
    return DiagonallyDamped(A.low_rank, verbs.add(A.damping, B))


@verbs.add.commuting(DiagonallyDamped, LowRank)
def sum_of_diagonally_damped_and_low_rank(A: DiagonallyDamped, B: LowRank) -> Op:
    return verbs.add(verbs.add(A.low_rank, B), A.damping)


@verbs.add.commuting(LowRank, BlockDiagonal)
def sum_of_low_rank_and_block_diagonal(A: LowRank, B: BlockDiagonal) -> Op:
    """A prior with one number a block is a diagonal."""
    kinds = Diagonal, Identity
    if not all(isinstance(as_multiple(block)[0], kinds) for block in B.blocks):
        return NotImplemented
    blocks = [settle(block, A.torch_dtype, A.device) for block in B.blocks]
    entries = [verbs.diagonal(block).to(A.torch_dtype) for block in blocks]
    return verbs.add(A, Diagonal(B.join(entries)))


@verbs.add.rule(BlockDiagonal, BlockDiagonal)
def sum_of_block_diagonals(A: BlockDiagonal, B: BlockDiagonal) -> Op:
    if [a.shape for a in A.blocks] != [b.shape for b in B.blocks]:
        return NotImplemented
    if not A.has_places_of(B):
        return NotImplemented
    return A.like([a + b for a, b in zip(A.blocks, B.blocks, strict=True)])


@verbs.add.commuting(BlockDiagonal, Diagonal)
def sum_of_block_diagonal_and_diagonal(A: BlockDiagonal, B: Diagonal) -> Op:
    """Block by block; what is one number on a block is a damping of it."""
    if not A.has_square_blocks:
        return NotImplemented
    parts = A.split(B.entries)
    return A.like([_with_diagonal(a, b) for a, b in zip(A.blocks, parts, strict=True)])


def _with_diagonal(A: Op, entries: Tensor) -> Op:
    if not entries.requires_grad and (entries == entries[0]).all():
        return verbs.damp(A, entries[0].item())
    return verbs.add(A, Diagonal(entries))


@verbs.add.commuting(Kronecker, Diagonal)
@verbs.add.commuting(CorrectedKronecker, Diagonal)
@verbs.add.commuting(Scaled, Diagonal)
def sum_of_kronecker_and_diagonal(A: Op, B: Diagonal) -> Op:
    """No Kronecker product, also of one that is scaled; a small one is a matrix."""
    of, _ = as_multiple(A)
    if not isinstance(of, (Kronecker, CorrectedKronecker)) or A.shape[0] > DENSE_ROWS:
        return NotImplemented
    # A matrix that requires grad is not known to be symmetric.
    if A.requires_grad or B.requires_grad or not A.self_adjoint or not _one_dtype(A, B):
        return NotImplemented
    return dense_over(A.ranks, verbs.to_dense(A) + torch.diag(B.entries))


@verbs.add.commuting(Damped, Op)
def sum_of_damped_and_operator(A: Damped, B: Op) -> Op:
    """Damping stands outside: (A + δ I) + B = (A + B) + δ I."""
    return verbs.damp(verbs.add(A.operator, B), A.damping)


@verbs.add.commuting(Op, Identity)
@verbs.add.commuting(Op, Scaled)
def sum_of_operator_and_multiple_of_identity(A: Op, B: Op) -> Op:
    """A + δ I is damped."""
    unit, damping = as_multiple(B)
    if not isinstance(unit, Identity) or not _decided(A, B):
        return NotImplemented
    return verbs.damp(A, damping)


# c A ------------------------------------------------------------------------------


@verbs.scale.register
def multiple_of_operator(op: Op, factor: Scalar) -> Op:
    """What the dtype does not hold, as 1e44 and float32, scales by its root twice."""
    if _is(factor, 1.0):
        return op
    if _holds(op, factor):
        return Scaled(factor, op)
    root = abs(as_float(factor)) ** 0.5
    return Scaled(math.copysign(root, as_float(factor)), Scaled(root, op))


@verbs.scale.register
def multiple_of_scaled(op: Scaled, factor: Scalar) -> Op:
    if _holds(op, factor, op.factor):
        return verbs.scale(op.operator, factor * op.factor)
    return multiple_of_operator(op, factor)


@verbs.scale.register
def multiple_of_entries(op: Dense | Diagonal, factor: Scalar) -> Op:
    if isinstance(factor, Tensor) or not _holds(op, factor):
        return multiple_of_operator(op, factor)
    if isinstance(op, Diagonal):
        return Diagonal(factor * op.entries)
    return op.like(factor * op.matrix)


@verbs.scale.register
def multiple_of_low_rank(op: LowRank, factor: Scalar) -> Op:
    """A (c V Vᵀ) is low-rank as long as it is positive semi-definite."""
    if isinstance(factor, Tensor) or not factor > 0.0:
        return multiple_of_operator(op, factor)
    if not _holds(op, factor, op.scale):
        return multiple_of_operator(op, factor)
    return op.rescaled(factor * op.scale)


@verbs.scale.register
def multiple_of_diagonally_damped(op: DiagonallyDamped, factor: Scalar) -> Op:
    if isinstance(factor, Tensor) or not factor > 0.0:
        return multiple_of_operator(op, factor)
    return verbs.add(verbs.scale(op.low_rank, factor), verbs.scale(op.damping, factor))


@verbs.scale.register
def multiple_of_damped(op: Damped, factor: Scalar) -> Op:
    return verbs.damp(verbs.scale(op.operator, factor), factor * op.damping)


@verbs.scale.register
def multiple_of_corrected_kronecker(op: CorrectedKronecker, factor: Scalar) -> Op:
    return CorrectedKronecker(op.basis, factor * op.eigenvalues)


# A + δ I --------------------------------------------------------------------------


@verbs.damp.register
def damped_operator(op: Op, damping: Scalar) -> Op:
    if _is(damping, 0.0):
        return op
    return DampedDense(op, damping) if isinstance(op, Dense) else Damped(op, damping)


@verbs.damp.register
def damped_damped(op: Damped, damping: Scalar) -> Op:
    return verbs.damp(op.operator, op.damping + damping)


@verbs.damp.register
def damped_diagonal(op: Diagonal, damping: Scalar) -> Op:
    return Diagonal(op.entries + damping)


@verbs.damp.register
def damped_diagonally_damped(op: DiagonallyDamped, damping: Scalar) -> Op:
    return DiagonallyDamped(op.low_rank, Diagonal(op.damping.entries + damping))


@verbs.damp.register
def damped_multiple(op: Identity | Scaled, damping: Scalar) -> Op:
    """C I + δ I = (c + δ) I."""
    unit, factor = as_multiple(op)
    if isinstance(unit, Identity):
        return verbs.scale(unit, factor + damping)
    return damped_operator(op, damping)


# Aᵏ -------------------------------------------------------------------------------


@verbs.power.register
def power_of_operator(op: Op, times: int) -> Op:
    """A⁰ is the identity, in the place and precision of A."""
    result: Op = Identity(op.shape[0], op._own_dtype, op._own_device)
    for _ in range(times):
        result = verbs.matmul(result, op)
    return result


# Aᵀ -------------------------------------------------------------------------------


@verbs.adjoint.register
def adjoint_of_operator(op: Op) -> Op:
    return op if op.self_adjoint else Adjoint(op)


@verbs.adjoint.register
def adjoint_of_adjoint(op: Adjoint) -> Op:
    return op.parent


@verbs.adjoint.register
def adjoint_of_scaled(op: Scaled) -> Op:
    return op if op.self_adjoint else verbs.scale(op.operator.T, op.factor)


@verbs.adjoint.register
def adjoint_of_product(op: Product) -> Op:
    return op if op.self_adjoint else Product(*(f.T for f in reversed(op.factors)))


@verbs.adjoint.register
def adjoint_of_block_diagonal(op: BlockDiagonal) -> Op:
    return op if op.self_adjoint else op.like([block.T for block in op.blocks])


@verbs.adjoint.register
def adjoint_of_kronecker(op: Kronecker) -> Op:
    return op if op.self_adjoint else Kronecker(*(f.T for f in op.factors))


def _holds(op: Op, *factors: Scalar) -> bool:
    """Whether a product of numbers is one of the operator's dtype, or has gradients."""
    if any(isinstance(factor, Tensor) for factor in factors) or 0.0 in factors:
        return True
    if isinstance(as_multiple(op)[0], Identity):  # which stands for a damping
        return True
    info = torch.finfo(op.torch_dtype)
    return info.tiny <= abs(math.prod(map(float, factors))) <= info.max


def _is(scalar: Scalar, value: float) -> bool:
    """Whether a number, which gradients do not flow to, has a value."""
    return not isinstance(scalar, Tensor) and scalar == value


def _decided(op: Op, identity: Op) -> bool:
    """Whether an identity adds nothing to the dtype and device of an operator."""
    same_dtype = identity._own_dtype in (None, op._own_dtype)
    return same_dtype and identity._own_device in (None, op._own_device)


def _one_dtype(A: Op, B: Op) -> bool:
    return A._own_dtype == B._own_dtype
