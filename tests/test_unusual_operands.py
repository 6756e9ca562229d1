"""Verbs of unusual operands: unsymmetric, of mixed precision, zero, nested."""

import pytest
import torch
from torch import Tensor

import vivit_linop as vl
from tests.operator_market import Draw
from tests.verb_cases import FLOAT64, assert_near
from vivit_linop.operators import LowRank, Product, Rows, Scaled, Sum, verbs

n = 8
draw = Draw(FLOAT64, "cpu")
UNIT = torch.eye(n, dtype=FLOAT64)
V, REGULAR, SYMMETRIC = draw(n, 3), draw.regular(n), draw.symmetric(n)
DEFINITE, P = draw.definite(n), draw.entries(n).abs()


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=FLOAT64, requires_grad=True)


def low_rank(factor: Tensor = V) -> vl.TorchLinearOperator:
    V = vl.Dense(factor)
    return V @ V.T


class Opaque(vl.TorchLinearOperator):
    """A matrix that nothing is known of."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
        self.matrix, self.products = matrix, 0

    def _multiply(self, X: Tensor) -> Tensor:
        self.products += X.shape[1]
        return self.matrix @ X

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        self.products += X.shape[1]
        return self.matrix.T @ X


@pytest.mark.parametrize("kind", ["matrix", "blocks", "triangular"])
def test_traces_of_unsymmetric_inverses_with_a_differentiable_damping(kind):
    A = REGULAR.triu() if kind == "triangular" else REGULAR
    op, matrix = vl.Dense(A), A
    if kind == "blocks":
        op, matrix = vl.BlockDiagonal([A, 2 * A.T]), torch.block_diag(A, 2 * A.T)
    unit, delta = torch.eye(len(matrix), dtype=FLOAT64), number(0.5)
    found = (op + delta * vl.Identity(len(matrix))).inv().trace()
    inverse = torch.linalg.inv(matrix + 0.5 * unit)
    assert_near(found.detach(), inverse.trace(), 1e-12)
    (slope,) = torch.autograd.grad(found, delta)
    assert_near(slope, -(inverse @ inverse).trace(), 1e-11)


def spread(n: int) -> tuple[vl.Dense, Tensor]:
    matrix = torch.diag(torch.logspace(0, -n + 1, n, dtype=FLOAT64))
    return vl.Dense(matrix), matrix


@pytest.mark.parametrize(
    "op, matrix",
    [
        (low_rank() + 1e-8 * vl.Identity(n), V @ V.T + 1e-8 * UNIT),
        (spread(n)[0].inv(), torch.linalg.inv(spread(n)[1])),
        (
            vl.BlockDiagonal([UNIT[:2, :2], 1e-7 * UNIT[:2, :2]])
            + 1e-9 * vl.Identity(4),
            torch.tensor([1, 1, 1e-7, 1e-7]).double().diag() + 1e-9 * UNIT[:4, :4],
        ),
        (spread(n)[0] + 1e-9 * vl.Identity(n), spread(n)[1] + 1e-9 * UNIT),
        (low_rank() + vl.Diagonal(P), V @ V.T + P.diag()),
        ((low_rank() + vl.Diagonal(P)).inv(), torch.linalg.inv(V @ V.T + P.diag())),
    ],
    ids=["damped", "inverse", "blocks", "dense", "prior", "its inverse"],
)
def test_what_is_regular_has_eigenvalues_that_count_as_zero_too(op, matrix):
    assert_near(op.pinv().to_dense(), torch.linalg.inv(matrix), 1e-7)
    if type(op).__name__ not in ("DiagonallyDamped", "DiagonalWoodbury"):
        expected = torch.linalg.pinv(matrix, rtol=1e-3, hermitian=True)
        assert_near(op.pinv(rcond=1e-3).to_dense(), expected, 1e-9)
    least = vl.Dense(torch.tensor([1.0, 1e-30, 0.0], dtype=FLOAT64).diag())
    found = least.pinv(rcond=0.0).diagonal()
    assert_near(found, torch.tensor([1.0, 1e30, 0.0], dtype=FLOAT64), 1e-12)


def test_inverses_refuse_what_a_damping_makes_singular_but_for_rounding():
    Q = torch.linalg.qr(draw(6, 6)).Q
    evals = torch.arange(1, 7, dtype=FLOAT64)
    A = (Q * evals) @ Q.T
    A, X = (A + A.T) / 2, draw(6, 6)
    B = X @ torch.diag(evals - 2 * (evals == 1)) @ torch.linalg.inv(X)
    unit, regular = vl.Identity(6), A[:2, :2]
    for op in (
        vl.Dense(A) - 2.0 * unit,
        2.0 * unit - vl.Dense(A),
        vl.Dense(B) + 1.0 * unit,
        vl.Kronecker(A, torch.eye(2, dtype=FLOAT64)) - 3.0 * vl.Identity(12),
        3.0 * vl.Identity(12) - vl.Kronecker(A, torch.eye(2, dtype=FLOAT64)),
        vl.BlockDiagonal([A, regular]) - 2.0 * vl.Identity(8),
    ):
        with pytest.raises(ValueError, match=r"^inv: the .* is singular, or but for"):
            op.inv()
    # Others are as before, far from eigenvalues and with a small damping.
    shifted = torch.linalg.inv(A - 2.5 * torch.eye(6, dtype=FLOAT64))
    assert_near((vl.Dense(A) - 2.5 * unit).inv().to_dense(), shifted, 1e-12)
    tiny = (vl.Dense(torch.zeros(2, 2)) + 1e-12 * vl.Identity(2)).inv()
    assert_near(tiny.to_dense(), 1e12 * torch.eye(2).double(), 1e-6)


def test_sums_with_a_prior_are_solved_where_nothing_preconditions_them():
    """Neither an unsymmetric Kronecker product nor an indefinite one does."""
    A = UNIT + 0.1 * REGULAR
    unsymmetric, p = vl.Kronecker(A, A.T), torch.linspace(1, 2, n * n, dtype=FLOAT64)
    indefinite = vl.Kronecker(SYMMETRIC, DEFINITE)
    for op in (unsymmetric, indefinite, vl.Kronecker(SYMMETRIC, SYMMETRIC)):
        total = Sum(op, vl.Diagonal(0.1 * p))
        b = torch.linspace(-1, 1, n * n, dtype=FLOAT64)
        expected = torch.linalg.solve(op.to_dense() + 0.1 * p.diag(), b)
        assert_near(total.solve(b, rtol=1e-9), expected, 1e-6)


@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_inverses_of_most_of_a_covariance_keep_their_digits(condition):
    """Of small rows that are left out, the Gram matrix is made, and no difference."""
    factor = (V / torch.linalg.matrix_norm(V, 2)).float()
    factor[-2:] *= 1e-3
    matrix = factor.double() @ factor.double().T + UNIT / condition
    S = (low_rank(factor) + 1 / condition * vl.Identity(n)).inv()
    for left_out in (1, 2):
        kept = list(range(n - left_out))
        expected = torch.linalg.inv(torch.linalg.inv(matrix)[kept][:, kept])
        found = S.restrict(kept).inv().to_dense()
        assert_near(found, expected, 1e-5)


def test_determinants_of_singular_restrictions():
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=FLOAT64))
    op = Opaque(A)
    op.self_adjoint = True
    assert op.restrict([1, 2]).logdet() == -torch.inf
    assert_near(op.restrict([1, 3]).logdet(), torch.tensor(6.0).double().log(), 1e-12)


def test_multiples_of_damped_operators_by_a_differentiable_number():
    c, b = number(2.0), torch.linspace(-1, 1, n, dtype=FLOAT64)
    op = c * (low_rank() + vl.Diagonal(P))
    matrix = 2 * (V @ V.T + P.diag())
    x = op.inv() @ b
    assert_near(x.detach(), torch.linalg.solve(matrix, b), 1e-11)
    (slope,) = torch.autograd.grad(x.sum() + op.logdet(), c)
    assert_near(slope, n / 2 - torch.linalg.solve(matrix, b).sum() / 2, 1e-11)


def test_sums_with_nothing():
    G, W = low_rank(), vl.Dense(draw(n, 2))
    for zero in (1e-200 * (1e-200 * G), LowRank(vl.Dense(V), 0.0)):
        for total in (zero + W @ W.T, W @ W.T + zero):
            assert_near(total.to_dense(), W.matrix @ W.matrix.T, 1e-14)


def test_multiples_of_one_operator_add_up():
    G, W, S = low_rank(), vl.Dense(draw(n, 2)), Opaque(REGULAR)
    c, H, T = number(2.0), W @ W.T, S.T
    A, B = V @ V.T, H.to_dense()
    for total, matrix, kind in [
        (G - 0.5 * G, 0.5 * A, LowRank),
        (0.5 * low_rank() - 2.0 * G, -1.5 * A, Scaled),
        (2.0 * (W @ W.T) - 5.0 * H, -3.0 * B, Scaled),
        (G - H - 0.25 * G, 0.75 * A - B, Sum),
        (S + 2.0 * S, 3.0 * REGULAR, Scaled),
        (T - 3.0 * T, -2.0 * REGULAR.T, Scaled),
        (S - S, 0.0 * REGULAR, Scaled),
        ((S + T) + (T + S), 2.0 * (REGULAR + REGULAR.T), Sum),
        (c * S + S, 3.0 * REGULAR, Scaled),
    ]:
        assert isinstance(total, kind)
        assert_near(total.to_dense().detach(), matrix, 1e-13)
    S.products = 0
    (S - 0.5 * S) @ UNIT[0]
    assert S.products == 1
    evals = (G - 0.25 * G).eigvalsh()
    assert_near(evals, torch.linalg.eigvalsh(0.75 * A)[-len(evals) :], 1e-13)
    (slope,) = torch.autograd.grad((c * S + S).to_dense().sum(), c)
    assert_near(slope, REGULAR.sum(), 1e-13)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_tensors_of_one_number_scale_and_damp(shape):
    """As dampings that are learnt, ``nn.Parameter(torch.ones(1))``."""
    delta = torch.full(shape, 0.5, dtype=FLOAT64)
    G, A = low_rank(), V @ V.T
    for op, matrix in [
        (G + delta * vl.Identity(n), A + 0.5 * UNIT),
        (G + vl.Identity(n) * delta, A + 0.5 * UNIT),
        (delta * Opaque(REGULAR), 0.5 * REGULAR),
        (G / delta, 2.0 * A),
        (delta * vl.Dense(V.T), 0.5 * V.T),
    ]:
        assert_near(op.to_dense(), matrix, 1e-13)
    learnt = torch.nn.Parameter(delta)
    (G + learnt * vl.Identity(n)).logdet().backward()
    inverse = torch.linalg.inv(A + 0.5 * UNIT)
    assert_near(learnt.grad.reshape(()), inverse.trace(), 1e-11)
    # Of an operator with one row or column it is a vector or a matrix.
    assert_near(
        vl.Dense(V[:, :1]) * torch.ones(shape).double(),
        V[:, :1].reshape(n, *shape[1:]),
        1e-13,
    )
    for wrong in (torch.ones(2).double(), torch.ones(0).double()):
        with pytest.raises((TypeError, ValueError)):
            G * wrong


@pytest.mark.parametrize("route", ["ARPACK", "Lanczos"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_the_operator_zero_has_eigenpairs(route, which):
    op = Opaque(torch.zeros(120, 120, dtype=FLOAT64))
    op.self_adjoint = True
    evals, evecs = op.eigh(k=3, which=which, route=route)
    assert not evals.any()
    assert_near(evecs.T @ evecs, torch.eye(3).double(), 1e-12)
    # A start without an image, of an operator that has others.
    matrix = torch.diag(torch.arange(120, dtype=FLOAT64))
    op, start = Opaque(matrix), torch.eye(120, dtype=FLOAT64)[0]
    op.self_adjoint = True
    evals = op.eigh(k=2, v0=start, route=route).eigenvalues
    assert_near(evals, torch.tensor([118.0, 119.0], dtype=FLOAT64), 1e-10)


MIXED = draw(n, 2).float()
BOTH = torch.cat([V, MIXED.double()], dim=1)


@pytest.mark.parametrize("turned", [False, True], ids=["double left", "double right"])
def test_factors_of_mixed_precision(turned):
    A, B = vl.Dense(V), vl.Dense(MIXED)
    matrix = V @ V.T + BOTH[:, 3:] @ BOTH[:, 3:].T
    op = B @ B.T + A @ A.T if turned else A @ A.T + B @ B.T
    inverse, tol = torch.linalg.inv(matrix + UNIT), 1e-6
    assert op.torch_dtype == FLOAT64
    assert_near(op.eigvalsh(), torch.linalg.eigvalsh(matrix)[-5:], tol)
    assert_near((op + vl.Identity(n)).inv().to_dense(), inverse, tol)
    assert_near(op.restrict([1, 3]).to_dense(), matrix[[1, 3]][:, [1, 3]], tol)
    left, right = (B, A) if turned else (A, B)
    gram = verbs.gram_matrix(left, right)
    assert_near(gram, left.matrix.double().T @ right.matrix.double(), tol)
    assert_near(op.eigh().components(B).norm(), BOTH[:, 3:].norm(), tol)
    for S in ((B @ B.T + vl.Identity(n)).inv(), (op + vl.Identity(n)).inv()):
        for one, other in ((A, B), (B, A), (A, A)):
            a, b = one.matrix.double(), other.matrix.double()
            expected = a.T @ S.to_dense().double() @ b
            assert_near((one.T @ S @ other).to_dense(), expected, 10 * tol)


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e7])
def test_sandwiches_of_doubles_with_a_function_in_single_precision(condition):
    """Half of the digits of what is less precise."""
    factor = (V / torch.linalg.matrix_norm(V, 2)).float()
    S = (low_rank(factor) + 1 / condition * vl.Identity(n)).inv()
    inverse = torch.linalg.inv(factor.double() @ factor.double().T + UNIT / condition)
    A = vl.Dense(factor.double() @ draw(3, 2))
    expected = A.matrix.T @ inverse @ A.matrix
    assert_near((A.T @ S @ A).to_dense(), expected, 1e-3)
    assert_near((A.T @ S @ A).diagonal(), expected.diagonal(), 1e-3)


def test_components_along_eigenpairs_of_matrices_of_any_kind():
    W = draw(n, 4)
    for pairs in (low_rank().eigh(k=2), vl.Dense(DEFINITE).eigh(k=2)):
        expected = W.T @ pairs.eigenvectors
        for given, tol in ((W, 1e-12), (W.float(), 1e-6), (vl.Dense(W.float()), 1e-6)):
            assert_near(pairs.components(given), expected, tol)


def test_samples_of_multiples_and_damped_sums():
    K = vl.Kronecker(DEFINITE[:2, :2], DEFINITE[:2, :2])
    L = vl.Kronecker(UNIT[:2, :2], DEFINITE[2:4, 2:4])
    generator = torch.Generator().manual_seed(0)
    for op in (3 * (K + L), K + L + vl.Identity(4), 2 * (K + L) + vl.Identity(4)):
        samples = op.sample(40_000, generator)
        covariance = samples @ samples.T / 40_000
        assert_near(covariance, op.to_dense(), 0.03)


@pytest.mark.parametrize("symmetric", [False, True])
def test_nested_polynomials_are_looked_at_once(symmetric):
    """Whether A P + B is self-adjoint, of a P that is made likewise."""
    A, B = Opaque(SYMMETRIC if symmetric else REGULAR), Opaque(DEFINITE)
    A.self_adjoint, B.self_adjoint = symmetric, True
    asked = []

    class Counted(Sum):
        def _mirrors(self, other):
            asked.append(1)
            return super()._mirrors(other)

    P: vl.TorchLinearOperator = A
    for _ in range(12):
        P = Counted(A @ P, B)
    matrix = A.matrix
    for _ in range(12):
        matrix = A.matrix @ matrix + DEFINITE
    assert not P.self_adjoint and Sum(P, P.T).self_adjoint
    assert len(asked) < 200
    assert_near(Sum(P, P.T).to_dense(), matrix + matrix.T, 1e-12)


def test_powers_of_damped_operators_have_traces():
    A = low_rank() + 0.1 * vl.Identity(n)
    matrix = torch.linalg.matrix_power(V @ V.T + 0.1 * UNIT, 30)
    assert_near((A**30).trace(), matrix.trace(), 1e-11)


def test_a_gram_matrix_serves_all_multiples_and_routes():
    factor = Opaque(V)
    G = factor @ factor.T
    for scale in (1.0, 2.0, 3.0):
        (scale * G + vl.Identity(n)).inv()
        (scale * G).eigvalsh(route="dense Gram")
    assert factor.products == 2 * 3


def test_products_that_read_the_same_backwards_as_they_are_written():
    def damped() -> vl.TorchLinearOperator:
        return vl.Kronecker(DEFINITE[:2, :2], SYMMETRIC[:4, :4]) + 0.5 * vl.Identity(n)

    A, B = vl.Dense(REGULAR), Opaque(DEFINITE)
    B.self_adjoint = True
    half = 0.5 * vl.Identity(n)
    for op in (damped() @ B @ damped(), (A + half) @ B @ (A.T + half)):
        assert isinstance(op, Product) and op.self_adjoint
        assert_near(op.to_dense(), op.to_dense().T, 1e-13)
    other = vl.Kronecker(DEFINITE[:2, :2], SYMMETRIC[:4, :4]) + 0.6 * vl.Identity(n)
    assert not (damped() @ B @ other).self_adjoint


def test_sandwiches_know_that_both_ends_are_one():
    rows = vl.Dense(draw(3, n))
    S = (low_rank() + 0.5 * vl.Identity(n)).inv()
    op = rows @ S @ rows.T
    assert op.self_adjoint and op.other is op.factor
    assert torch.equal(op.to_dense(), op.to_dense().T)


def test_gram_matrices_of_stacks_pass_derivatives():
    c, W = number(2.0), draw(n, 2)
    stack = vl.hstack(
        [c * vl.Dense(V), vl.Dense(W), Rows(vl.Dense(V), torch.arange(n))]
    )
    found = verbs.gram_matrix(stack, stack).square().sum()
    leaf = number(2.0)
    columns = torch.cat([leaf * V, W, V], dim=1)
    expected = (columns.T @ columns).square().sum()
    assert_near(found.detach(), expected.detach(), 1e-13)
    slopes = (torch.autograd.grad(found, c), torch.autograd.grad(expected, leaf))
    assert_near(slopes[0][0], slopes[1][0], 1e-12)
