"""Sandwiches Aᵀ S B with functions S of low-rank nodes, on the small side."""

import pytest
import torch

import vivit_linop as vl
from tests.composition_cases import EPS, close, risks
from tests.operator_market import Draw
from tests.pairs import pairwise
from tests.refusals import refuse_products
from vivit_linop.curvature import column_sums
from vivit_linop.curvature.block_sandwich import BlockSandwich
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.linalg import sandwiches
from vivit_linop.operators import Product, Sandwich

every_dtype = pytest.mark.parametrize("dtype", EPS, ids=str)


def power(matrix, exponent):
    evals, evecs = torch.linalg.eigh(matrix)
    return evecs * evals**exponent @ evecs.T


MIDDLES = {
    "inverse": (lambda G, unit: (G + 0.05 * unit).inv(), -1.0),
    "root": (lambda G, unit: (G + 0.05 * unit).sqrt(), 0.5),
    "inverse root": (lambda G, unit: (G + 0.05 * unit).inv().sqrt(), -0.5),
    "damped": (lambda G, unit: G + 0.05 * unit, 1.0),
}
FACTORS = {
    "J": vl.Jacobian,
    "V": vl.GGNFactor,
    "U": vl.PerSampleGradients,
    "Uc": lambda risk: vl.PerSampleGradients(risk).centered(),
    "Dense": lambda risk: vl.Dense(Draw(risk.dtype)(risk.num_params, risk.num_samples)),
}


def tall(op, symbol):
    return op.T if symbol == "J" else op


@pytest.mark.parametrize(
    ("middle", "kind", "dtype"),
    [
        *pairwise(MIDDLES, ["tall", "wide"], EPS),
        ("inverse", "convolution", torch.float64),
        ("inverse", "tied", torch.float64),
    ],
)
def test_values_on_one_risk_and_across_two(middle, kind, dtype):
    train, test = risks(kind, dtype)
    function, exponent = MIDDLES[middle]
    G = vl.GGN(train)
    dense = vl.GGNFactor(train).to_dense().double()
    D = len(dense)
    S = function(G, vl.Identity(D))
    truth = power(dense @ dense.T + 0.05 * torch.eye(D).double(), exponent)
    for of in (train, test):
        for symbol, build in FACTORS.items():
            A = tall(build(of), symbol)
            matrix = A.to_dense().double()
            op, expected = A.T @ S @ A, matrix.T @ truth @ matrix
            if symbol != "Dense":  # dense matrices are multiplied
                assert op.self_adjoint and op.T is op
            close(op.to_dense(), expected, dtype)
            close(op.diagonal(), expected.diagonal(), dtype)
            close(op.trace(), expected.trace(), dtype)
            size = len(expected) // of.num_samples
            blocks = vl.linalg.diagonal_blocks(op, size)
            each = expected.unflatten(0, (-1, size)).unflatten(2, (-1, size))
            each = each.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            close(blocks, each, dtype)
            close(vl.linalg.diagonal_blocks(3 * op, size), 3 * each, dtype)
    J, U = vl.Jacobian(test), vl.PerSampleGradients(train)
    op = J @ (S @ U)
    expected = J.to_dense().double() @ truth @ U.to_dense().double()
    close(op.to_dense(), expected, dtype)
    close(op.T.to_dense(), expected.T, dtype)
    vl.testing.check_operator(op, expected.to(dtype))
    close((op.T @ op).to_dense(), expected.T @ expected, dtype)


@every_dtype
@pytest.mark.parametrize("middle", MIDDLES)
def test_no_product_has_as_many_rows_as_parameters(dtype, middle, monkeypatch):
    """With pullbacks at both ends all is done with Gram matrices."""
    train, test = risks("tall", dtype)
    G = vl.GGN(train)
    S = MIDDLES[middle][0](G, vl.Identity(G.shape[0]))
    J, U = vl.Jacobian(test), vl.PerSampleGradients(train)
    Ut = vl.PerSampleGradients(test)

    refuse_products(monkeypatch, Pullback)
    monkeypatch.setattr(
        column_sums, "Rows", lambda *_: pytest.fail("columns are formed")
    )
    for op in (J @ S @ J.T, Ut.T @ S @ U, U.T @ S @ G.factor, G.factor.T @ S @ U):
        assert type(op) is Sandwich
        vl.linalg.to_dense(op)
    for op in (J @ S @ J.T, U.T @ S @ U, G.factor.T @ S @ G.factor):
        op.diagonal()
        vl.linalg.diagonal_blocks(op, op.shape[0] // 7)


def test_what_makes_a_sandwich():
    train, test = risks("tall", torch.float64)
    G, J = vl.GGN(train), vl.Jacobian(test)
    S = (G + vl.Identity(G.shape[0])).inv()
    M = vl.Dense(Draw(torch.float64)(4, G.shape[0]))
    for op in (M @ S @ M.T, M @ S @ J.T, J @ G @ M.T, (J @ S) @ J.T, J @ (S @ J.T)):
        assert type(op) is Sandwich
    # The scale stands outside.
    assert type((J @ (2 * S) @ J.T).operator) is Sandwich
    assert type(J @ vl.KFAC(train) @ J.T) is BlockSandwich
    assert type(J @ (vl.KFAC(train) @ J.T)) is BlockSandwich
    # A user's low-rank node has the form as well.
    V = vl.Dense(Draw(torch.float64)(20, 3))
    A = vl.Dense(Draw(torch.float64)(20, 2))
    assert type(A.T @ (V @ V.T + vl.Identity(20)).inv() @ A) is Sandwich
    p = torch.rand(20, dtype=torch.float64, requires_grad=True)
    assert type(A.T @ vl.Diagonal(p) @ A) is Product


@every_dtype
def test_verbs_of_sandwiches(dtype):
    train, test = risks("tall", dtype)
    G, J = vl.GGN(train), vl.Jacobian(test)
    D = G.shape[0]
    V, rows = G.factor.to_dense().double(), J.to_dense().double()
    truth = rows @ torch.linalg.inv(V @ V.T + torch.eye(D).double()) @ rows.T
    op = J @ (G + vl.Identity(D)).inv() @ J.T
    n = len(truth)
    close(op.eigvalsh(), torch.linalg.eigvalsh(truth), dtype)
    close(op.eigh(k=2).eigenvalues, torch.linalg.eigvalsh(truth)[-2:], dtype)
    root = op.sqrt()
    close((root @ root.T).to_dense(), truth, dtype)
    noisy = truth + 0.5 * torch.eye(n).double()
    damped = op + 0.5 * vl.Identity(n)
    close(damped.inv().to_dense(), torch.linalg.inv(noisy), dtype)
    close(damped.logdet(), torch.logdet(noisy), dtype)
    vl.testing.check_operator(op, truth.to(dtype))


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("middle", ["inverse", "inverse root"])
def test_digits_that_cancel_are_computed_again(share, middle):
    """In float32 and for columns in the range of V, AᵀB and its correction cancel."""
    draw = Draw(torch.float64)
    Q = torch.linalg.qr(draw(200, 6)).Q
    V = (Q * torch.logspace(0, -3, 6, dtype=torch.float64)).float()
    A = (Q @ draw(6, 5)).float()
    delta = share * 1.0
    dense = V.double()
    damped = dense @ dense.T + delta * torch.eye(200).double()
    exponent = -1.0 if middle == "inverse" else -0.5
    truth = A.double().T @ power(damped, exponent) @ A.double()
    factor = vl.Dense(V)
    G = factor @ factor.T
    S = (G + delta * vl.Identity(200)).inv()
    S = S if middle == "inverse" else S.sqrt()
    columns = vl.Dense(A)
    op = columns.T @ S @ columns
    assert type(op) is Sandwich
    for got, expected in (
        (op.to_dense(), truth),
        (op.diagonal(), truth.diagonal()),
        (vl.linalg.diagonal_blocks(op, 5)[0], truth),
    ):
        error = (got.double() - expected).norm() / expected.norm()
        assert error <= 1e-3, error


def test_matrices_of_products_take_the_smaller_side():
    """By as many products with what stands inside as there are rows or columns."""

    class Counted(vl.Diagonal):
        columns = 0

        def _multiply(self, X):
            Counted.columns += X.shape[1]
            return super()._multiply(X)

    draw = Draw(torch.float64)
    # Of a diagonal itself, a sandwich knows better.
    inside = vl.BlockDiagonal([Counted(draw(6).abs()), Counted(draw(4).abs())])
    A, B = draw(10, 2), draw(10, 7)
    expected = A.T @ inside.to_dense() @ B
    for op, matrix in (
        (vl.Dense(A).T @ inside @ vl.Dense(B), expected),
        (vl.Dense(B).T @ inside @ vl.Dense(A), expected.T),
    ):
        assert type(op) is Product
        Counted.columns = 0
        close(op.to_dense(), matrix, torch.float64)
        assert Counted.columns == 2 * 2


def test_diagonals_of_products_with_other_middles():
    """No entry beside the diagonal is needed, whatever stands inside."""
    train, test = risks("tall", torch.float64)
    J, S = (
        vl.Jacobian(test),
        (vl.KFAC(train) + 0.1 * vl.Identity(train.num_params)).inv(),
    )
    expected = J.to_dense() @ S.to_dense() @ J.to_dense().T
    op = J @ S @ J.T
    close(op.diagonal(), expected.diagonal(), torch.float64)
    each = torch.stack([expected[i : i + 3, i : i + 3] for i in range(0, 9, 3)])
    close(vl.linalg.diagonal_blocks(op, 3), each, torch.float64)
    close(vl.linalg.diagonal_blocks(vl.Dense(expected), 3), each, torch.float64)


@every_dtype
@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_diagonals_of_inverses_and_roots(kind, dtype):
    """Variances of a posterior, without products with it."""
    train, _ = risks(kind, dtype)
    G = vl.GGN(train)
    V = vl.GGNFactor(train).to_dense().double()
    D = len(V)
    for function, exponent in MIDDLES.values():
        S = function(G, vl.Identity(D))
        truth = power(V @ V.T + 0.05 * torch.eye(D).double(), exponent)
        close(S.diagonal(), truth.diagonal(), dtype)


def test_diagonals_of_inverses_keep_their_digits():
    """Also where rounding in V Vᵀ is as large as the damping."""
    draw = Draw(torch.float64)
    Q = torch.linalg.qr(draw(300, 6)).Q
    Q[3], Q[7] = 0.0, 0.0  # of the former nothing else is known
    V = (Q * torch.logspace(0, -3, 6, dtype=torch.float64)).float()
    V[7, 0] = 1.0
    factor = vl.Dense(V)
    for delta in (1e-3, 1e-4, 1e-5):
        S = (factor @ factor.T + delta * vl.Identity(300)).inv()
        V64 = V.double()
        truth = torch.linalg.inv(V64 @ V64.T + delta * torch.eye(300).double())
        error = (S.diagonal().double() / truth.diagonal() - 1.0).abs().max()
        assert error <= 1e-3, error


@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_derivatives_in_the_damping(kind):
    """On the small side as well; those of matrices at the ends are products'."""
    train, test = risks(kind, torch.float64)
    G, J, U = vl.GGN(train), vl.Jacobian(test), vl.PerSampleGradients(train)
    A, rows, columns = G.to_dense(), J.to_dense(), U.to_dense()
    V = G.factor.to_dense()
    D, found = len(A), []
    delta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    op = J @ (G + delta * vl.Identity(D)).inv() @ U
    assert type(op) is (Sandwich if kind == "tall" else Product)
    for build in (
        lambda delta, unit, P: (
            (J @ (G + delta * vl.Identity(D)).inv() @ J.T).diagonal(),
            vl.linalg.diagonal_blocks(
                J @ (3 * G + delta * vl.Identity(D)).inv() @ J.T, 3
            ),
            (J @ (G + delta * vl.Identity(D)).inv() @ U).to_dense(),
            (U.T @ (G + delta * vl.Identity(D)).inv() @ G.factor).to_dense(),
            (vl.Dense(P).T @ (G + delta * vl.Identity(D)).inv() @ U).to_dense(),
        ),
        lambda delta, unit, P: (
            (rows @ (A + delta * unit).inverse() @ rows.T).diagonal(),
            torch.stack(
                [r @ (3 * A + delta * unit).inverse() @ r.T for r in rows.split(3)]
            ),
            rows @ (A + delta * unit).inverse() @ columns,
            columns.T @ (A + delta * unit).inverse() @ V,
            P.T @ (A + delta * unit).inverse() @ columns,
        ),
    ):
        delta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        P = torch.linspace(0, 1, 2 * D).double().reshape(D, 2).requires_grad_()
        values = build(delta, torch.eye(D).double(), P)
        total = sum((value * value.detach().cos()).sum() for value in values)
        gradients = torch.autograd.grad(total, (delta, P))
        found.append([*(value.detach() for value in values), *gradients])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def cancelling(
    rows: int, delta: float, outside: float
) -> tuple[vl.TorchLinearOperator, torch.Tensor]:
    """Aᵀ (V Vᵀ + δ I)⁻¹ A in float32, its value; A mostly in the range of V."""
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(rows, 6, generator=generator) / rows**0.5
    A = V @ torch.randn(6, 5, generator=generator)
    A += outside * torch.randn(rows, 5, generator=generator) / rows**0.5
    node = vl.Dense(V) @ vl.Dense(V).T + delta * vl.Identity(rows)
    A64, V64 = A.double(), V.double()
    inner = torch.linalg.solve(delta * torch.eye(6).double() + V64.T @ V64, V64.T @ A64)
    return vl.Dense(A).T @ node.inv() @ vl.Dense(A), (
        A64.T @ A64 - (V64.T @ A64).T @ inner
    ) / delta


@pytest.mark.parametrize(
    "delta, outside, products", [(1e-3, 0.1, False), (1e-4, 0.0, True)]
)
def test_lost_digits_are_measured(
    delta: float, outside: float, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding may lose half of the digits in both; in one of them it does."""
    calls: list[int] = []
    by_products = sandwiches._by_products

    def counted(op: vl.TorchLinearOperator) -> torch.Tensor:
        calls.append(1)
        return by_products(op)

    monkeypatch.setattr(sandwiches, "_by_products", counted)
    op, truth = cancelling(400, delta, outside)
    assert sandwiches.may_lose_digits(op, op.form)
    error = (op.to_dense().double() - truth).norm() / truth.norm()
    assert error < torch.finfo(torch.float32).eps ** 0.5 and bool(calls) is products
