"""Gram matrices, low-rank operators, and what is damped."""

import torch

import vivit_linop as vl
from vivit_linop.operators import Damped, Gram, LowRank, Product, Scaled, Woodbury

from .market import entry, khatri_rao_of

# Low rank --------------------------------------------------------------------------


@entry
def gram(draw):
    V = vl.Dense(draw(5, 3))
    return Gram(V, V), V.matrix.double().T @ V.matrix.double()


@entry
def gram_formed(draw):
    V = vl.KhatriRao(draw(3, 4), draw(2, 4))
    op = Gram(V, V)
    assert op.matrix.shape == (4, 4)  # from here on, products are with this
    dense = khatri_rao_of(V.left, V.right)
    return op, dense.T @ dense


@entry
def gram_of_two_factors(draw):
    V, W = draw(5, 3), draw(5, 2)
    return Gram(vl.Dense(V), vl.Dense(W)), V.double().T @ W.double()


@entry
def gram_of_two_factors_formed(draw):
    V, W = vl.KhatriRao(draw(3, 4), draw(2, 4)), vl.KhatriRao(draw(3, 2), draw(2, 2))
    op = Gram(V, W)
    assert op.matrix.shape == (4, 2)
    return op, khatri_rao_of(V.left, V.right).T @ khatri_rao_of(W.left, W.right)


@entry
def low_rank_tall(draw):
    V = draw(6, 2)
    return LowRank(vl.Dense(V)), V.double() @ V.double().T


@entry
def low_rank_square(draw):
    V = draw.regular(4)
    return LowRank(vl.Dense(V)), V.double() @ V.double().T


@entry
def low_rank_wide(draw):
    V = draw(3, 7)
    return LowRank(vl.Dense(V)), V.double() @ V.double().T


@entry
def low_rank_scaled(draw):
    V = draw(5, 2)
    return LowRank(vl.Dense(V), scale=0.1), 0.1 * V.double() @ V.double().T


@entry
def low_rank_negative(draw):
    V = draw(5, 2)
    return -3 * LowRank(vl.Dense(V)), -3 * V.double() @ V.double().T


@entry
def low_rank_of_khatri_rao(draw):
    V = vl.KhatriRao(draw(4, 3), draw(2, 3))
    dense = khatri_rao_of(V.left, V.right)
    return LowRank(V, scale=2.0), 2.0 * dense @ dense.T


@entry
def low_rank_of_product(draw):
    A, B, C = draw(2, 2), draw(3, 3), draw(6, 2)
    V = Product(vl.Kronecker(A, B), vl.Dense(C))
    dense = torch.kron(A.double(), B.double()) @ C.double()
    return LowRank(V), dense @ dense.T


@entry
def low_rank_of_low_rank(draw):
    V = draw(5, 3)
    outer = V.double() @ V.double().T
    return LowRank(LowRank(vl.Dense(V)), 0.1), 0.1 * outer @ outer


@entry
def damped_low_rank(draw):
    V = draw(6, 2)
    op = Damped(LowRank(vl.Dense(V)), 0.5)
    return op, V.double() @ V.double().T + 0.5 * draw.eye(6)


@entry
def damped_low_rank_wide(draw):
    V = draw(3, 7)
    op = Damped(LowRank(vl.Dense(V)), 0.5)
    return op, V.double() @ V.double().T + 0.5 * draw.eye(3)


@entry
def damped_negative_low_rank(draw):
    V = draw(5, 2)
    op = Damped(Scaled(-1.0, LowRank(vl.Dense(V))), -0.5)
    return op, -V.double() @ V.double().T - 0.5 * draw.eye(5)


@entry
def damped_dense(draw):
    A = draw.regular(4)
    return Damped(vl.Dense(A), 0.25), A.double() + 0.25 * draw.eye(4)


@entry
def damped_diagonal(draw):
    entries = draw.entries(4).abs()
    op = Damped(vl.Diagonal(entries), 0.25)
    return op, torch.diag(entries.double()) + 0.25 * draw.eye(4)


@entry
def damped_kronecker(draw):
    A, B = draw.definite(2), draw.definite(3)
    op = Damped(vl.Kronecker(A, B), 0.25)
    return op, torch.kron(A.double(), B.double()) + 0.25 * draw.eye(6)


@entry
def damped_block_diagonal(draw):
    V, B = draw(4, 2), draw.definite(3)
    op = Damped(vl.BlockDiagonal([LowRank(vl.Dense(V)), B]), 0.25)
    V = V.double()
    return op, torch.block_diag(V @ V.T, B.double()) + 0.25 * draw.eye(7)


@entry
def damped_block_diagonal_rectangular_blocks(draw):
    A, B = draw(3, 2), draw(1, 2)
    op = Damped(vl.BlockDiagonal([A, B]), 2.0)
    return op, torch.block_diag(A.double(), B.double()) + 2.0 * draw.eye(4)


@entry
def damped_gram(draw):
    V = vl.Dense(draw(5, 3))
    op = Damped(Gram(V, V), 0.5)
    return op, V.matrix.double().T @ V.matrix.double() + 0.5 * draw.eye(3)


@entry
def woodbury_tall(draw):
    V = draw(6, 2)
    dense = V.double() @ V.double().T + 0.5 * draw.eye(6)
    return Woodbury(LowRank(vl.Dense(V)), 0.5), torch.linalg.inv(dense)


@entry
def woodbury_square(draw):
    V = draw.regular(4)
    dense = V.double() @ V.double().T + 0.5 * draw.eye(4)
    return Woodbury(LowRank(vl.Dense(V)), 0.5), torch.linalg.inv(dense)


@entry
def woodbury_wide(draw):
    V = draw(3, 7)
    dense = V.double() @ V.double().T + 0.5 * draw.eye(3)
    return Woodbury(LowRank(vl.Dense(V)), 0.5), torch.linalg.inv(dense)


@entry
def woodbury_scaled(draw):
    V = draw(6, 3)
    dense = 0.1 * V.double() @ V.double().T + 0.5 * draw.eye(6)
    return Woodbury(LowRank(vl.Dense(V), scale=0.1), 0.5), torch.linalg.inv(dense)
