"""Products, sums and scalings: the rewrite rules of the algebra.

Each rule is an identity; the newest that matches the types of the operands applies.
``A.T`` is recognised by identity, never by comparing numbers. The rules for Jacobians
stand in :mod:`vivit_linop.curvature.rules`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.damped import Damped, DampedDense
from vivit_linop.operators.elementary import (
    Adjoint,
    Dense,
    Diagonal,
    Identity,
    Product,
    Scaled,
    Sum,
)
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    KhatriRao,
    Kronecker,
)
from vivit_linop.operators.lowrank import Centered, Gram, LowRank
from vivit_linop.operators.scalars import Scalar
from vivit_linop.operators.stacks import HStack
from vivit_linop.operators.verbs import (
    add,
    adjoint,
    damp,
    gram,
    gram_matrix,
    matmul,
    outer_matrix,
    outer_product,
    power,
    scale,
)

Op = TorchLinearOperator

# A B ------------------------------------------------------------------------------


@matmul.rule(Op, Op)
def product_of_operators(A: Op, B: Op) -> Op:
    """A B is a product; products are flat, and rules apply where two meet."""
    left = A.factors if isinstance(A, Product) else (A,)
    right = B.factors if isinstance(B, Product) else (B,)
    if len(left) + len(right) > 2:
        inner = matmul(left[-1], right[0])
        if not isinstance(inner, Product):
            for factor in reversed(left[:-1]):
                inner = matmul(factor, inner)
            for factor in right[1:]:
                inner = matmul(inner, factor)
            return inner
    return Product(*left, *right)


@matmul.rule(Op, Adjoint)
def product_of_operator_and_adjoint(A: Op, B: Adjoint) -> Op:
    """V Vᵀ is low-rank."""
    return LowRank(A) if B.parent is A else NotImplemented


@matmul.rule(Adjoint, Op)
def product_of_adjoint_and_operator(A: Adjoint, B: Op) -> Op:
    """VᵀV is a Gram operator."""
    return Gram(B, B) if A.parent is B else NotImplemented


@matmul.rule(Adjoint, KhatriRao)
def product_of_adjoint_and_khatri_rao(A: Adjoint, B: KhatriRao) -> Op:
    """(B ⊙ A)ᵀ (D ⊙ C) = (BᵀD) ∘ (AᵀC)."""
    if not isinstance(A.parent, KhatriRao) or not _aligned(A.parent, B):
        return NotImplemented
    return Dense(gram_matrix(A.parent, B))


@matmul.rule(Dense, Dense)
def product_of_dense(A: Dense, B: Dense) -> Op:
    return Dense(A.matrix @ B.matrix) if _one_dtype(A, B) else NotImplemented


@matmul.rule(Diagonal, Diagonal)
def product_of_diagonals(A: Diagonal, B: Diagonal) -> Op:
    return Diagonal(A.entries * B.entries)


@matmul.rule(Kronecker, Kronecker)
def product_of_kroneckers(A: Kronecker, B: Kronecker) -> Op:
    """(A ⊗ B)(C ⊗ D) = AC ⊗ BD."""
    if [a.shape[1] for a in A.factors] != [b.shape[0] for b in B.factors]:
        return NotImplemented
    return Kronecker(*(a @ b for a, b in zip(A.factors, B.factors, strict=True)))


@matmul.rule(BlockDiagonal, BlockDiagonal)
def product_of_block_diagonals(A: BlockDiagonal, B: BlockDiagonal) -> Op:
    """Block-diagonal operators with matching blocks multiply block by block."""
    if [a.shape[1] for a in A.blocks] != [b.shape[0] for b in B.blocks]:
        return NotImplemented
    if not A.has_places_of(B):
        return NotImplemented
    return A.like([a @ b for a, b in zip(A.blocks, B.blocks, strict=True)])


@matmul.rule(Scaled, Op)
def product_of_scaled_and_operator(A: Scaled, B: Op) -> Op:
    return scale(matmul(A.operator, B), A.factor)


@matmul.rule(Op, Scaled)
def product_of_operator_and_scaled(A: Op, B: Scaled) -> Op:
    return scale(matmul(A, B.operator), B.factor)


@matmul.rule(Identity, Op)
def product_of_identity_and_operator(A: Identity, B: Op) -> Op:
    return B if _decided(B, A) else NotImplemented


@matmul.rule(Op, Identity)
def product_of_operator_and_identity(A: Op, B: Identity) -> Op:
    return A if _decided(A, B) else NotImplemented


# A + B ----------------------------------------------------------------------------


@add.rule(Op, Op)
def sum_of_operators(A: Op, B: Op) -> Op:
    """A + B is a sum, and sums are flat; A + A is 2 A."""
    if A is B:
        return scale(A, 2.0)
    left = A.terms if isinstance(A, Sum) else (A,)
    right = B.terms if isinstance(B, Sum) else (B,)
    return Sum(*left, *right)


@add.rule(Dense, Dense)
def sum_of_dense(A: Dense, B: Dense) -> Op:
    return Dense(A.matrix + B.matrix)


@add.rule(Diagonal, Diagonal)
def sum_of_diagonals(A: Diagonal, B: Diagonal) -> Op:
    return Diagonal(A.entries + B.entries)


@add.rule(Dense, Diagonal)
def sum_of_dense_and_diagonal(A: Dense, B: Diagonal) -> Op:
    return Dense(A.matrix + torch.diag(B.entries))


@add.rule(Diagonal, Dense)
def sum_of_diagonal_and_dense(A: Diagonal, B: Dense) -> Op:
    return add(B, A)


@add.rule(LowRank, LowRank)
def sum_of_low_ranks(A: LowRank, B: LowRank) -> Op:
    """Multiples of one V Vᵀ add up."""
    return A.rescaled(A.scale + B.scale) if A.factor is B.factor else NotImplemented


@add.rule(BlockDiagonal, BlockDiagonal)
def sum_of_block_diagonals(A: BlockDiagonal, B: BlockDiagonal) -> Op:
    if [a.shape for a in A.blocks] != [b.shape for b in B.blocks]:
        return NotImplemented
    if not A.has_places_of(B):
        return NotImplemented
    return A.like([a + b for a, b in zip(A.blocks, B.blocks, strict=True)])


@add.rule(BlockDiagonal, Diagonal)
def sum_of_block_diagonal_and_diagonal(A: BlockDiagonal, B: Diagonal) -> Op:
    """Block by block; what is one number on a block is a damping of it."""
    if not A.has_square_blocks:
        return NotImplemented
    parts = A.split(B.entries)
    return A.like([_with_diagonal(a, b) for a, b in zip(A.blocks, parts, strict=True)])


def _with_diagonal(A: Op, entries: Tensor) -> Op:
    if not entries.requires_grad and (entries == entries[0]).all():
        return damp(A, entries[0].item())
    return add(A, Diagonal(entries))


@add.rule(Diagonal, BlockDiagonal)
def sum_of_diagonal_and_block_diagonal(A: Diagonal, B: BlockDiagonal) -> Op:
    return add(B, A)


@add.rule(Damped, Op)
def sum_of_damped_and_operator(A: Damped, B: Op) -> Op:
    """Damping stands outside: (A + δ I) + B = (A + B) + δ I."""
    return damp(add(A.operator, B), A.damping)


@add.rule(Op, Damped)
def sum_of_operator_and_damped(A: Op, B: Damped) -> Op:
    return damp(add(A, B.operator), B.damping)


@add.rule(Op, Identity)
def sum_of_operator_and_identity(A: Op, B: Identity) -> Op:
    return damp(A, 1.0) if _decided(A, B) else NotImplemented


@add.rule(Identity, Op)
def sum_of_identity_and_operator(A: Identity, B: Op) -> Op:
    return damp(B, 1.0) if _decided(B, A) else NotImplemented


@add.rule(Op, Scaled)
def sum_of_operator_and_scaled(A: Op, B: Scaled) -> Op:
    """A + δ I is damped."""
    if not isinstance(B.operator, Identity) or not _decided(A, B):
        return NotImplemented
    return damp(A, B.factor)


@add.rule(Scaled, Op)
def sum_of_scaled_and_operator(A: Scaled, B: Op) -> Op:
    if not isinstance(A.operator, Identity) or not _decided(B, A):
        return NotImplemented
    return damp(B, A.factor)


# c A ------------------------------------------------------------------------------


@scale.register
def multiple_of_operator(op: TorchLinearOperator, factor: Scalar) -> Op:
    return op if _is(factor, 1.0) else Scaled(factor, op)


@scale.register
def multiple_of_scaled(op: Scaled, factor: Scalar) -> Op:
    return scale(op.operator, factor * op.factor)


@scale.register
def multiple_of_dense(op: Dense, factor: Scalar) -> Op:
    if isinstance(factor, Tensor):
        return Scaled(factor, op)
    return Dense(factor * op.matrix)


@scale.register
def multiple_of_diagonal(op: Diagonal, factor: Scalar) -> Op:
    if isinstance(factor, Tensor):
        return Scaled(factor, op)
    return Diagonal(factor * op.entries)


@scale.register
def multiple_of_low_rank(op: LowRank, factor: Scalar) -> Op:
    """A (c V Vᵀ) is low-rank as long as it is positive semi-definite."""
    if isinstance(factor, Tensor):
        return Scaled(factor, op)
    return op.rescaled(factor * op.scale) if factor > 0.0 else Scaled(factor, op)


@scale.register
def multiple_of_damped(op: Damped, factor: Scalar) -> Op:
    return damp(scale(op.operator, factor), factor * op.damping)


@scale.register
def multiple_of_corrected_kronecker(op: CorrectedKronecker, factor: Scalar) -> Op:
    return CorrectedKronecker(op.basis, factor * op.eigenvalues)


@scale.register
def multiple_of_block_diagonal(op: BlockDiagonal, factor: Scalar) -> Op:
    return op.like([scale(block, factor) for block in op.blocks])


# A + δ I --------------------------------------------------------------------------


@damp.register
def damped_operator(op: TorchLinearOperator, damping: Scalar) -> Op:
    return op if _is(damping, 0.0) else Damped(op, damping)


@damp.register
def damped_damped(op: Damped, damping: Scalar) -> Op:
    return damp(op.operator, op.damping + damping)


@damp.register
def damped_dense(op: Dense, damping: Scalar) -> Op:
    return op if _is(damping, 0.0) else DampedDense(op, damping)


@damp.register
def damped_diagonal(op: Diagonal, damping: Scalar) -> Op:
    return Diagonal(op.entries + damping)


@damp.register
def damped_identity(op: Identity, damping: Scalar) -> Op:
    return scale(op, 1.0 + damping)


@damp.register
def damped_scaled(op: Scaled, damping: Scalar) -> Op:
    """C I + δ I = (c + δ) I."""
    if isinstance(op.operator, Identity):
        return scale(op.operator, op.factor + damping)
    return damped_operator(op, damping)


# Aᵏ -------------------------------------------------------------------------------


@power.register
def power_of_operator(op: TorchLinearOperator, times: int) -> Op:
    """A⁰ is the identity, in the place and precision of A."""
    result: Op = Identity(op.shape[0], op._own_dtype, op._own_device)
    for _ in range(times):
        result = matmul(result, op)
    return result


# Aᵀ -------------------------------------------------------------------------------


@adjoint.register
def adjoint_of_operator(op: TorchLinearOperator) -> Op:
    return op if op.self_adjoint else Adjoint(op)


@adjoint.register
def adjoint_of_adjoint(op: Adjoint) -> Op:
    return op.parent


@adjoint.register
def adjoint_of_scaled(op: Scaled) -> Op:
    return op if op.self_adjoint else scale(adjoint(op.operator), op.factor)


@adjoint.register
def adjoint_of_product(op: Product) -> Op:
    return op if op.self_adjoint else Product(*(f.T for f in reversed(op.factors)))


@adjoint.register
def adjoint_of_block_diagonal(op: BlockDiagonal) -> Op:
    return op if op.self_adjoint else op.like([block.T for block in op.blocks])


@adjoint.register
def adjoint_of_kronecker(op: Kronecker) -> Op:
    return op if op.self_adjoint else Kronecker(*(f.T for f in op.factors))


# Gram matrices ----------------------------------------------------------------------


@gram.register
def gram_of_operator(factor: TorchLinearOperator) -> Gram:
    return Gram(factor, factor)


@gram_matrix.register
def gram_matrix_of_operator(left: TorchLinearOperator, right: Op) -> Tensor:
    return left.T.apply(right.to_dense())


@gram_matrix.register
def gram_matrix_of_dense(left: Dense, right: Op) -> Tensor:
    """By products with the other factor: not formed, where that is none."""
    if isinstance(right, Dense):
        return left.matrix.T @ right.matrix
    return right.T.apply(left.matrix).T


@gram_matrix.register
def gram_matrix_of_khatri_rao(left: KhatriRao, right: Op) -> Tensor:
    if not isinstance(right, KhatriRao) or not _aligned(left, right):
        return left.T.apply(right.to_dense())
    return (left.left.T @ right.left) * (left.right.T @ right.right)


@gram_matrix.register
def gram_matrix_of_product(left: Product, right: Op) -> Tensor:
    """(A B)ᵀ (A B) = Bᵀ (AᵀA) B, where A has fewer columns than rows."""
    A = left.factors[0]
    if len(left.factors) == 1:
        return gram_matrix(A, A if right is left else right)
    if right is not left or A.shape[1] >= A.shape[0]:
        return gram_matrix_of_operator(left, right)
    B = Product(*left.factors[1:])
    return B.T.apply(B.T.apply(gram(A).to_dense()).T)


@gram_matrix.register
def gram_matrix_of_centered(left: Centered, right: Op) -> Tensor:
    """(A C)ᵀ B = C AᵀB, with C = I − 1 1ᵀ/R; also on the other side."""
    inner = right.factor if isinstance(right, Centered) else right
    K = matmul(left.factor.T, inner).to_dense()
    K = K - K.mean(0, keepdim=True)
    return K - K.mean(1, keepdim=True) if isinstance(right, Centered) else K


@gram_matrix.register
def gram_matrix_of_stack(left: HStack, right: Op) -> Tensor:
    """[A B]ᵀ [C D] has the blocks AᵀC and so on, those on its diagonal are kept."""
    parts = right.parts if isinstance(right, HStack) else (right,)
    K = torch.empty(
        left.shape[1], right.shape[1], dtype=left.torch_dtype, device=left.device
    )
    blocks = [
        rows.split([part.shape[1] for part in parts], dim=1)
        for rows in K.split([part.shape[1] for part in left.parts])
    ]
    for i, A in enumerate(left.parts):
        for j, B in enumerate(parts):
            if A is B:
                blocks[i][j].copy_(gram(A).to_dense())
            elif left is right and j < i:
                blocks[i][j].copy_(blocks[j][i].T)
            else:
                blocks[i][j].copy_(gram_matrix(A, B))
    return K


@outer_matrix.register
def outer_matrix_of_operator(factor: TorchLinearOperator) -> Tensor:
    dense = factor.to_dense()
    return dense @ dense.T


@outer_matrix.register
def outer_matrix_of_stack(factor: HStack) -> Tensor:
    """A Aᵀ + B Bᵀ + …."""
    total = outer_matrix(factor.parts[0])
    for part in factor.parts[1:]:
        total = total + outer_matrix(part)
    return total


@outer_product.register
def outer_product_of_stack(factor: HStack, X: Tensor) -> Tensor:
    """A Aᵀ X + B Bᵀ X + …."""
    total = outer_product(factor.parts[0], X)
    for part in factor.parts[1:]:
        total = total + outer_product(part, X)
    return total


@outer_product.register
def outer_product_of_operator(factor: TorchLinearOperator, X: Tensor) -> Tensor:
    return factor.apply(factor.T.apply(X))


def _is(scalar: Scalar, value: float) -> bool:
    """Whether a number, which gradients do not flow to, has a value."""
    return not isinstance(scalar, Tensor) and scalar == value


def _decided(op: Op, identity: Op) -> bool:
    """Whether an identity adds nothing to the dtype and device of an operator."""
    same_dtype = identity._own_dtype in (None, op._own_dtype)
    return same_dtype and identity._own_device in (None, op._own_device)


def _one_dtype(A: Op, B: Op) -> bool:
    return A._own_dtype == B._own_dtype


def _aligned(A: KhatriRao, B: KhatriRao) -> bool:
    shapes = [(K.left.shape[0], K.right.shape[0]) for K in (A, B)]
    return shapes[0] == shapes[1] and _one_dtype(A, B)
