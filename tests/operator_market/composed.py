"""Scalings, sums and products, expressions as they are written, edges."""

import torch

import vivit_linop as vl
from vivit_linop.operators import (
    Adjoint,
    CorrectedKronecker,
    Damped,
    DampedRoot,
    LowRank,
    Product,
    Scaled,
    Sum,
    Woodbury,
)

from .market import entry, khatri_rao_of

# Scalings, sums, products ----------------------------------------------------------


@entry
def scaled(draw):
    A, B = draw(2, 3), draw(2, 2)
    op = Scaled(-1.5, vl.Kronecker(A, B))
    return op, -1.5 * torch.kron(A.double(), B.double())


@entry
def scaled_adjoint(draw):
    B, A = draw(3, 4), draw(2, 4)
    return Scaled(0.25, Adjoint(vl.KhatriRao(B, A))), 0.25 * khatri_rao_of(B, A).T


@entry
def scaled_by_zero(draw):
    A = draw(2, 3)
    return Scaled(0.0, vl.Kronecker(A)), 0.0 * A.double()


@entry
def scaled_kronecker_symmetric(draw):
    A, B = draw.symmetric(2), draw.definite(3)
    op = -2 * vl.Kronecker(A, B)
    return op, -2 * torch.kron(A.double(), B.double())


@entry
def sum_of_three(draw):
    A, B, c, V = draw.regular(2), draw.regular(3), draw.entries(6), draw(6, 2)
    op = Sum(vl.Kronecker(A, B), vl.Diagonal(c), LowRank(vl.Dense(V)))
    V = V.double()
    return op, torch.kron(A.double(), B.double()) + torch.diag(c.double()) + V @ V.T


@entry
def sum_rectangular(draw):
    A, B, C = draw(2, 3), draw(4, 1), draw(8, 3)
    op = Sum(vl.Kronecker(A, B), vl.Dense(C))
    return op, torch.kron(A.double(), B.double()) + C.double()


@entry
def sum_symmetric(draw):
    A, b = draw.symmetric(5), draw.entries(5)
    op = Sum(vl.Dense(A), vl.Diagonal(b))
    return op, A.double() + torch.diag(b.double())


@entry
def product(draw):
    A, b, C = draw.regular(4), draw.entries(4), draw.regular(4)
    op = Product(vl.Dense(A), vl.Diagonal(b), vl.Dense(C))
    return op, A.double() @ torch.diag(b.double()) @ C.double()


@entry
def product_rectangular(draw):
    A, B, C, D = draw(2, 3), draw(3, 2), draw(6, 3), draw(3, 4)
    op = Product(vl.Kronecker(A, B), vl.Dense(C), vl.Dense(D))
    return op, torch.kron(A.double(), B.double()) @ C.double() @ D.double()


@entry
def product_rectangular_factors_in_square(draw):
    A, B = draw(4, 2), draw(2, 4)
    return Product(vl.Dense(A), vl.Dense(B)), A.double() @ B.double()


@entry
def product_symmetric(draw):
    A, b = vl.Dense(draw(5, 3)), draw.entries(3)
    op = Product(A, vl.Diagonal(b), A.T)
    A = A.matrix.double()
    return op, A @ torch.diag(b.double()) @ A.T


# Expressions, as they are written --------------------------------------------------


@entry
def expression_damped_by_undecided_identity(draw):
    A, B = draw(2, 3), draw(3, 2)
    op = vl.Kronecker(A, B) + 1e-1 * vl.Identity(6)
    return op, torch.kron(A.double(), B.double()) + 0.1 * draw.eye(6)


@entry
def expression_newton(draw):
    V = vl.Dense(draw(5, 2))
    op = -(2 * (V @ V.T) + 0.5 * vl.Identity(5)).inv()
    V = V.matrix.double()
    return op, -torch.linalg.inv(2 * V @ V.T + 0.5 * draw.eye(5))


@entry
def expression_sandwich(draw):
    J = vl.KhatriRao(draw(3, 4), draw(2, 4))
    H = vl.BlockDiagonal([draw.symmetric(2), draw.symmetric(2)])
    op = J @ H @ J.T
    J = khatri_rao_of(J.left, J.right)
    H = torch.block_diag(*(block.matrix.double() for block in H.blocks))
    return op, J @ H @ J.T


@entry
def expression_nested(draw):
    A, B = draw(2, 3), draw(2, 1)
    K, V, D = vl.Kronecker(A, B), vl.Dense(draw(4, 2)), draw(3, 3)
    op = 2 * (K.T @ (V @ V.T - 0.5 * vl.Identity(4)) @ K) / 3 - vl.Dense(D)
    K, V = torch.kron(A.double(), B.double()), V.matrix.double()
    return op, 2 * (K.T @ (V @ V.T - 0.5 * draw.eye(4)) @ K) / 3 - D.double()


@entry
def expression_blocks_of_blocks(draw):
    A, B, V = draw(2, 2), draw(2, 2), vl.Dense(draw(3, 1))
    inner = vl.BlockDiagonal([vl.Kronecker(A, B), V @ V.T])
    op = vl.BlockDiagonal([inner, 2 * vl.Identity(2)])
    V = V.matrix.double()
    kron = torch.kron(A.double(), B.double())
    return op, torch.block_diag(kron, V @ V.T, 2 * draw.eye(2))


@entry
def expression_power(draw):
    A, B = draw(2, 2), draw(3, 3)
    op = Sum(vl.Kronecker(A, B), vl.Identity(6)) ** 3
    dense = torch.kron(A.double(), B.double()) + draw.eye(6)
    return op, dense @ dense @ dense


@entry
def corrected_kronecker(draw):
    basis = vl.Kronecker(draw.definite(2), draw.symmetric(3))
    op = CorrectedKronecker(basis, draw.entries(6))
    return op, _corrected(op)


@entry
def scaled_corrected_kronecker(draw):
    basis = vl.Kronecker(draw.definite(3), draw.definite(2))
    op = -2.0 * CorrectedKronecker(basis, draw.entries(6))
    return op, _corrected(op)


@entry
def damped_corrected_kronecker(draw):
    basis = vl.Kronecker(draw.definite(3), draw.definite(2))
    op = CorrectedKronecker(basis, draw.entries(6).abs())
    return Damped(op, 0.25), _corrected(op) + 0.25 * draw.eye(6)


def _corrected(op):
    Q = [evecs.double() for _, evecs in op.basis.factor_eigenpairs]
    Q = torch.kron(*Q)
    return (Q * op.eigenvalues.double()) @ Q.T


@entry
def root_of_damped_low_rank(draw):
    V = draw(6, 3)
    A = 1.5 * V.double() @ V.double().T + 0.5 * draw.eye(6)
    return DampedRoot(LowRank(vl.Dense(V), 1.5), 0.5), _power(A, 0.5)


@entry
def inverse_root_of_damped_low_rank(draw):
    V = draw(6, 3)
    A = 1.5 * V.double() @ V.double().T + 0.5 * draw.eye(6)
    return DampedRoot(LowRank(vl.Dense(V), 1.5), 0.5).inv(), _power(A, -0.5)


def _power(A, exponent):
    evals, evecs = torch.linalg.eigh(A)
    return (evecs * evals**exponent) @ evecs.T


# Edges -----------------------------------------------------------------------------


@entry
def one_by_one_dense(draw):
    A = draw.regular(1)
    return vl.Dense(A), A.double()


@entry
def one_by_one_identity(draw):
    return vl.Identity(1, draw.dtype, draw.device), draw.eye(1)


@entry
def one_by_one_kronecker(draw):
    A, B = draw.regular(1), draw.regular(1)
    return vl.Kronecker(A, B), A.double() * B.double()


@entry
def one_by_one_low_rank(draw):
    v = draw(1, 3)
    return LowRank(vl.Dense(v)), v.double() @ v.double().T


@entry
def one_by_one_woodbury(draw):
    v = draw(1, 3)
    op = Woodbury(LowRank(vl.Dense(v)), 0.5)
    return op, 1.0 / (v.double() @ v.double().T + 0.5)


@entry
def one_column(draw):
    A, B = draw(3, 1), draw(2, 1)
    return vl.KhatriRao(A, B), torch.kron(A.double(), B.double())


@entry
def one_row(draw):
    A, B = draw(1, 3), draw(1, 3)
    return vl.KhatriRao(A, B), A.double() * B.double()


@entry
def more_columns_than_a_chunk(draw):
    # Dense matrices and diagonals are computed 256 columns at a time.
    A, B = draw(20, 20), draw(15, 15)
    op = Product(vl.Kronecker(A, B), vl.Diagonal(draw.entries(300)))
    return op, torch.kron(A.double(), B.double()) * op.factors[1].entries.double()


@entry
def low_rank_with_more_columns_than_a_chunk(draw):
    A, B = draw(5, 300), draw(4, 300)
    V = khatri_rao_of(A, B)
    return LowRank(vl.KhatriRao(A, B)), V @ V.T
