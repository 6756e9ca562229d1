"""Matrices, blocks, Kronecker and Khatri–Rao products, stacks, adjoints."""

import torch

import vivit_linop as vl
from vivit_linop.operators import LowRank, Product, Sum

from .market import entry, khatri_rao_of, scattered

# Elementary ------------------------------------------------------------------------


@entry
def identity(draw):
    return vl.Identity(5, draw.dtype, draw.device), draw.eye(5)


@entry
def identity_scaled(draw):
    return -0.5 * vl.Identity(4, draw.dtype, draw.device), -0.5 * draw.eye(4)


@entry
def dense(draw):
    A = draw.regular(5)
    return vl.Dense(A), A.double()


@entry
def dense_tall(draw):
    A = draw(6, 3)
    return vl.Dense(A), A.double()


@entry
def dense_wide(draw):
    A = draw(2, 5)
    return vl.Dense(A), A.double()


@entry
def dense_symmetric(draw):
    A = draw.symmetric(5)
    return vl.Dense(A), A.double()


@entry
def diagonal(draw):
    entries = draw.entries(6)
    return vl.Diagonal(entries), torch.diag(entries.double())


@entry
def dense_inverse(draw):
    A = draw.regular(5)
    return vl.Dense(A).inv(), torch.linalg.inv(A.double())


@entry
def dense_inverse_symmetric(draw):
    A = draw.symmetric(5)
    return vl.Dense(A).inv(), torch.linalg.inv(A.double())


# Structured ------------------------------------------------------------------------


@entry
def block_diagonal(draw):
    A, b, C = draw.regular(3), draw.entries(2), draw.regular(1)
    op = vl.BlockDiagonal([A, vl.Diagonal(b), C])
    return op, torch.block_diag(A.double(), torch.diag(b.double()), C.double())


@entry
def block_diagonal_symmetric(draw):
    A, B = draw.symmetric(3), draw.definite(2)
    return vl.BlockDiagonal([A, B]), torch.block_diag(A.double(), B.double())


@entry
def block_diagonal_one_block(draw):
    A = draw.regular(3)
    return vl.BlockDiagonal([A]), A.double()


@entry
def block_diagonal_indices(draw):
    blocks = [draw.regular(3), draw.regular(1), draw.regular(2)]
    rows = [[4, 0, 2], [5], [1, 3]]
    indices = [torch.tensor(row, device=draw.device) for row in rows]
    return vl.BlockDiagonal(blocks, indices), scattered(blocks, indices, 6)


@entry
def block_diagonal_indices_symmetric(draw):
    blocks = [draw.definite(2), draw.symmetric(3)]
    rows = [[3, 1], [4, 0, 2]]
    indices = [torch.tensor(row, device=draw.device) for row in rows]
    return vl.BlockDiagonal(blocks, indices), scattered(blocks, indices, 5)


@entry
def block_diagonal_rectangular(draw):
    A, B = draw(3, 2), draw(1, 4)
    return vl.BlockDiagonal([A, B]), torch.block_diag(A.double(), B.double())


@entry
def block_diagonal_rectangular_blocks_in_square(draw):
    A, B = draw(3, 2), draw(1, 2)
    return vl.BlockDiagonal([A, B]), torch.block_diag(A.double(), B.double())


@entry
def block_diagonal_low_rank(draw):
    V, W = draw(4, 2), draw(2, 3)
    blocks = [LowRank(vl.Dense(V)), LowRank(vl.Dense(W))]
    V, W = V.double(), W.double()
    return vl.BlockDiagonal(blocks), torch.block_diag(V @ V.T, W @ W.T)


@entry
def kronecker_one(draw):
    A = draw.regular(3)
    return vl.Kronecker(A), A.double()


@entry
def kronecker_two(draw):
    A, B = draw.regular(3), draw.regular(2)
    return vl.Kronecker(A, B), torch.kron(A.double(), B.double())


@entry
def kronecker_three(draw):
    A, B, C = draw.regular(2), draw.regular(3), draw.regular(2)
    dense = torch.kron(torch.kron(A.double(), B.double()), C.double())
    return vl.Kronecker(A, B, C), dense


@entry
def kronecker_symmetric(draw):
    A, B, C = draw.symmetric(2), draw.definite(3), draw.symmetric(2)
    dense = torch.kron(torch.kron(A.double(), B.double()), C.double())
    return vl.Kronecker(A, B, C), dense


@entry
def kronecker_rectangular(draw):
    A, B, C = draw(2, 3), draw(3, 1), draw(1, 4)
    dense = torch.kron(torch.kron(A.double(), B.double()), C.double())
    return vl.Kronecker(A, B, C), dense


@entry
def kronecker_rectangular_factors_in_square(draw):
    A, B = draw(2, 3), draw(3, 2)
    return vl.Kronecker(A, B), torch.kron(A.double(), B.double())


@entry
def kronecker_of_operators(draw):
    V, b = draw(3, 1), draw.entries(2)
    op = vl.Kronecker(LowRank(vl.Dense(V)), vl.Identity(2), vl.Diagonal(b))
    outer = V.double() @ V.double().T
    return op, torch.kron(torch.kron(outer, draw.eye(2)), torch.diag(b.double()))


@entry
def khatri_rao(draw):
    B, A = draw(3, 4), draw(2, 4)
    return vl.KhatriRao(B, A), khatri_rao_of(B, A)


@entry
def khatri_rao_wide(draw):
    B, A = draw(2, 7), draw(2, 7)
    return vl.KhatriRao(B, A), khatri_rao_of(B, A)


@entry
def random_projection(draw):
    P = vl.RandomProjection(7, 70, 3, draw.dtype, draw.device)
    signs = P._signs(torch.arange(7, device=draw.device)).double()
    return P, (2 * signs - 1).T / 70**0.5


@entry
def hstack_of_three(draw):
    A, b, V = draw(4, 2), draw.entries(4), vl.KhatriRao(draw(2, 3), draw(2, 3))
    dense = A.double(), torch.diag(b.double()), khatri_rao_of(V.left, V.right)
    return vl.hstack([A, vl.Diagonal(b), V]), torch.cat(dense, dim=1)


@entry
def hstack_of_two(draw):
    A, B = draw(5, 2), draw(5, 1)
    return vl.hstack([A, B]), torch.cat([A, B], dim=1).double()


@entry
def vstack_with_identity(draw):
    A = draw(3, 4)
    op = vl.vstack([A, 2 * vl.Identity(4)])
    return op, torch.cat([A.double(), 2 * draw.eye(4)])


@entry
def low_rank_of_hstack(draw):
    A, B = draw(6, 2), draw(6, 3)
    W, dense = vl.hstack([A, B]), torch.cat([A, B], dim=1).double()
    return W @ W.T, dense @ dense.T


# Adjoints --------------------------------------------------------------------------


@entry
def adjoint_dense(draw):
    A = draw.regular(4)
    return vl.Dense(A).T, A.double().T


@entry
def adjoint_dense_inverse(draw):
    A = draw.regular(4)
    return vl.Dense(A).inv().T, torch.linalg.inv(A.double()).T


@entry
def adjoint_khatri_rao(draw):
    B, A = draw(3, 4), draw(2, 4)
    return vl.KhatriRao(B, A).T, khatri_rao_of(B, A).T


@entry
def adjoint_block_diagonal(draw):
    A, B = draw(3, 2), draw(1, 4)
    return vl.BlockDiagonal([A, B]).T, torch.block_diag(A.double(), B.double()).T


@entry
def adjoint_kronecker(draw):
    A, B = draw(2, 3), draw(3, 1)
    return vl.Kronecker(A, B).T, torch.kron(A.double(), B.double()).T


@entry
def adjoint_sum(draw):
    A, B, C = draw(2, 3), draw(4, 1), draw(8, 3)
    op = Sum(vl.Kronecker(A, B), vl.Dense(C)).T
    return op, (torch.kron(A.double(), B.double()) + C.double()).T


@entry
def adjoint_product(draw):
    A, B, C = draw(2, 3), draw(3, 2), draw(6, 4)
    op = Product(vl.Kronecker(A, B), vl.Dense(C)).T
    return op, (torch.kron(A.double(), B.double()) @ C.double()).T
