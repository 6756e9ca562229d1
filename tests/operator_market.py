"""A market of operators, each with its matrix computed densely in float64.

``MARKET`` maps names to builders; ``build(name, dtype, device)`` returns the operator
and its matrix. The matrix is made of the very numbers that the operator holds, so that
what they differ by is the operator's arithmetic alone.
"""

import torch

import vivit_linop as vl
from vivit_linop.operators import (
    Adjoint,
    CorrectedKronecker,
    Damped,
    DampedRoot,
    Gram,
    LowRank,
    Product,
    Scaled,
    Sum,
    Woodbury,
)

MARKET = {}


def entry(builder):
    """Put a builder on the market under its name."""
    MARKET[builder.__name__] = builder
    return builder


def build(name, dtype, device):
    """Return an operator of the market and its matrix."""
    return MARKET[name](Draw(dtype, device))


class Draw:
    """Draws the tensors that operators are made of, always the same ones."""

    def __init__(self, dtype, device, seed=0):
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def _noise(self, *shape):
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def __call__(self, *shape):
        return self._noise(*shape).to(self.device, self.dtype)

    def regular(self, n):
        """A square matrix that is not symmetric and far from singular."""
        noise = self._noise(n, n) / n**0.5 + 3 * torch.eye(n, dtype=torch.float64)
        return noise.to(self.device, self.dtype)

    def symmetric(self, n):
        """A symmetric matrix with eigenvalues of both signs, none near zero."""
        Q = torch.linalg.qr(self._noise(n, n)).Q
        evals = torch.linspace(1, 2, n, dtype=torch.float64)
        evals[::2] *= -1
        A = (Q * evals) @ Q.T
        return ((A + A.T) / 2).to(self.device, self.dtype)

    def definite(self, n):
        """A symmetric matrix with eigenvalues of at least one."""
        noise = self._noise(n, n)
        A = noise @ noise.T / n + torch.eye(n, dtype=torch.float64)
        return ((A + A.T) / 2).to(self.device, self.dtype)

    def entries(self, n):
        """Numbers of both signs, none near zero."""
        noise = self._noise(n)
        return (noise + noise.sign()).to(self.device, self.dtype)

    def eye(self, n):
        return torch.eye(n, dtype=torch.float64, device=self.device)


def khatri_rao_of(left, right):
    """The column-wise Khatri–Rao product, a Kronecker product a column."""
    pairs = zip(left.double().T, right.double().T, strict=True)
    return torch.stack([torch.kron(b, a) for b, a in pairs], dim=1)


def scattered(blocks, indices, n):
    """A matrix with blocks at the given rows and columns."""
    result = torch.zeros(n, n, dtype=torch.float64, device=blocks[0].device)
    for block, index in zip(blocks, indices, strict=True):
        result[index[:, None], index] = block.double()
    return result


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
