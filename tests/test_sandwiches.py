"""Sandwiches Aᵀ S B with functions S of low-rank nodes, on the small side."""

import pytest
import torch
from operator_market import Draw
from torch import nn

import vivit_linop as vl
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.operators import Product, Sandwich, verbs

EPS = {torch.float32: 2e-5, torch.float64: 1e-12}
every_dtype = pytest.mark.parametrize("dtype", EPS, ids=str)


def net_of(kind, dtype):
    torch.manual_seed(0)
    nets = {
        "tall": lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)),
        # More columns than parameters.
        "wide": lambda: nn.Linear(4, 3),
        # Positions, a table, and a weight that is used twice.
        "convolution": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 4)),
            nn.Conv1d(1, 3, 2),
            nn.ReLU(),
            nn.Conv1d(3, 2, 2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        "tied": Tied,
    }
    return nets[kind]().to(dtype)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        rows = (5 * x).long().clamp(max=4)
        mean = self.table(rows).mean(1)
        return self.layer(torch.tanh(self.layer(mean)))


def risks(kind, dtype):
    """Train data, with a sample that is there twice, and test data."""
    net = net_of(kind, dtype)
    X, y = torch.rand(10, 4, dtype=dtype), torch.randint(3, (10,))
    X[6], y[6] = X[1], y[1]
    loss = nn.CrossEntropyLoss()
    train = vl.EmpiricalRisk(net, loss, [(X[:4], y[:4]), (X[4:7], y[4:7])])
    return train, vl.EmpiricalRisk(net, loss, (X[7:], y[7:]))


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
    "Dense": lambda risk: vl.Dense(
        Draw(risk.dtype, "cpu")(risk.num_params, risk.num_samples)
    ),
}


def tall(op, symbol):
    return op.T if symbol == "J" else op


def close(got, expected, dtype):
    assert got.dtype == dtype
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= EPS[dtype], error


CASES = [
    *((kind, middle) for kind in ("tall", "wide") for middle in MIDDLES),
    ("convolution", "inverse"),
    ("tied", "inverse"),
]


@pytest.mark.parametrize(
    ("kind", "middle", "dtype"),
    [
        *((*case, dtype) for case in CASES[:-2] for dtype in EPS),
        *((*case, torch.float64) for case in CASES[-2:]),
    ],
)
def test_values_on_one_risk_and_across_two(kind, middle, dtype):
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
    J, U, Ut = vl.Jacobian(test), vl.PerSampleGradients(train), None
    Ut = vl.PerSampleGradients(test)

    def refused(*_):
        raise AssertionError("a product with the columns")

    monkeypatch.setattr(Pullback, "_multiply", refused)
    monkeypatch.setattr(Pullback, "_multiply_adjoint", refused)
    monkeypatch.setattr(verbs, "to_dense", refused)
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
    M = vl.Dense(Draw(torch.float64, "cpu")(4, G.shape[0]))
    for op in (M @ S @ M.T, M @ S @ J.T, J @ G @ M.T, (J @ S) @ J.T, J @ (S @ J.T)):
        assert type(op) is Sandwich
    # The scale stands outside.
    assert type((J @ (2 * S) @ J.T).operator) is Sandwich
    assert type(J @ vl.KFAC(train) @ J.T) is Product
    # A user's low-rank node has the form as well.
    V = vl.Dense(Draw(torch.float64, "cpu")(20, 3))
    A = vl.Dense(Draw(torch.float64, "cpu")(20, 2))
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
    draw = Draw(torch.float64, "cpu")
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
