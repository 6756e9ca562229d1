"""Determinants for several dampings, against dense ones."""

import math

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.operator_market import MARKET, build
from vivit_linop.linalg.logdets import plus, times
from vivit_linop.operators import Gram

TAUS = torch.tensor([0.25, 3.0, 40.0], dtype=torch.float64)


def symmetric(name: str) -> bool:
    op, _ = build(name, torch.float64)
    return op.shape[0] == op.shape[1] and op.self_adjoint


def damped_logdets(A: Tensor, taus: Tensor = TAUS) -> Tensor:
    unit = torch.eye(len(A), dtype=torch.float64)
    return torch.stack([torch.linalg.slogdet(A + tau * unit)[1] for tau in taus])


@pytest.mark.parametrize("name", list(filter(symmetric, MARKET)))
def test_operators(name: str) -> None:
    """What has a closed form for one damping has it for several; the same values."""
    op, A = build(name, torch.float64)
    try:
        expected = (op + 3.0 * vl.Identity(len(A))).logdet()
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            op.logdet(damping=TAUS)
        return
    got = op.logdet(damping=TAUS)
    torch.testing.assert_close(got, damped_logdets(A), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got[1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op.logdet(damping=3), expected, rtol=1e-12, atol=1e-12)


def nets(dtype: torch.dtype) -> dict[str, vl.TorchLinearOperator]:
    """GGNs with fewer columns than parameters and with more, a multiple, an inverse."""
    torch.manual_seed(0)
    X, y = torch.rand(30, 4).to(dtype), torch.randint(3, (30,))
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    few, many = (vl.GGN(net, nn.CrossEntropyLoss(), (X[:n], y[:n])) for n in (5, 30))
    return {
        "few": few,
        "many": many,
        "multiple": 7 * few,
        "KFAC": vl.KFAC(many.risk),
        "diagonal": vl.Diagonal(many.diagonal()),
    }


@pytest.mark.parametrize("name", nets(torch.float64))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvatures(name: str, dtype: torch.dtype) -> None:
    got = nets(dtype)[name].logdet(damping=TAUS.tolist())
    assert got.dtype == dtype and got.shape == (3,)
    expected = damped_logdets(nets(torch.float64)[name].to_dense()).to(dtype)
    torch.testing.assert_close(got, expected)


def test_what_is_kept_is_not_given_away() -> None:
    G = nets(torch.float64)["few"]
    expected = G.logdet(damping=TAUS)
    G.eigvalsh().zero_()
    torch.testing.assert_close(G.logdet(damping=TAUS), expected)


@pytest.mark.parametrize("name", ["few", "KFAC", "diagonal"])
def test_derivatives_in_the_dampings(name: str) -> None:
    op = nets(torch.float64)[name]
    taus = TAUS.clone().requires_grad_()
    op.logdet(damping=taus).sum().backward()
    A, unit = op.to_dense(), torch.eye(op.shape[0], dtype=torch.float64)
    traces = torch.stack([torch.linalg.inv(A + tau * unit).trace() for tau in TAUS])
    torch.testing.assert_close(taus.grad, traces)


def test_bad_dampings() -> None:
    G = nets(torch.float64)["few"]
    for damping, message in [
        (torch.ones(2, 2), "damping: a finite number"),
        ([1.0, math.nan], "damping: a finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            G.logdet(damping=damping)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square"):
        G.factor.logdet(damping=1.0)  # type: ignore[attr-defined]
    assert G.logdet(damping=[]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("delta", [1e-310, 1e-200, 1e-40, 1e-12, 1e30])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_dampings_of_every_size(size: float, delta: float, dtype: torch.dtype) -> None:
    """λ/δ need not be a number of the dtype; four of five eigenvalues are zero."""
    column = torch.full((5, 1), (size / 5.0) ** 0.5, dtype=dtype)
    eigenvalue = float(column.double().square().sum())
    expected = math.log(eigenvalue + delta) + 4 * math.log(delta)
    V = vl.Dense(column)
    op, unit = V @ V.T, vl.Identity(5)
    tensor = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
    for got in (
        (op + delta * unit).logdet(),
        op.logdet(damping=delta),
        *op.logdet(damping=[delta, delta]),
        (3.0 * op + 3.0 * delta * unit).logdet() - 5 * math.log(3.0),
        (op + tensor * unit).logdet(),
    ):
        assert abs(got.item() - expected) <= 1e2 * torch.finfo(dtype).eps * max(
            abs(expected), 1.0
        )


def test_matrices_that_are_not_symmetric() -> None:
    """Transposes, inverses and restrictions of matrices are damped as these are."""
    A = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()
    dense, index = vl.Dense(A), torch.tensor([3, 0, 1])
    hidden = vl.from_scipy(A.numpy()).restrict(index)
    for op, matrix in (
        (dense.T, A.T),
        (dense.inv(), torch.linalg.inv(A)),
        (dense.inv().T, torch.linalg.inv(A).T),
        (hidden, A[index][:, index]),
        (Gram(vl.Dense(A[:, :3]), vl.Dense(A[:, 2:])), A[:, :3].T @ A[:, 2:]),
    ):
        torch.testing.assert_close(op.logdet(damping=TAUS), damped_logdets(matrix))
        unit = torch.eye(len(matrix), dtype=torch.float64)
        for delta in (0.3, -0.7):
            damped = op + delta * vl.Identity(len(matrix))
            exact = torch.linalg.inv(matrix + delta * unit)
            torch.testing.assert_close(damped.inv().to_dense(), exact)
            torch.testing.assert_close(damped.logdet(), -torch.linalg.slogdet(exact)[1])


@pytest.mark.parametrize("delta", [0.0, -0.5, -1.0, -40.0])
def test_negative_dampings(delta: float) -> None:
    """Nodes of low rank have the determinant of a difference too."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 2), (6, 9)):
        V = torch.randn(shape, generator=generator, dtype=torch.float64)
        A = V @ V.T
        op, unit = vl.Dense(V) @ vl.Dense(V).T, vl.Identity(6)
        dense = A + delta * torch.eye(6, dtype=torch.float64)
        expected = torch.linalg.slogdet(dense).logabsdet
        if delta == 0.0 and shape[1] < 6:
            expected = torch.tensor(-math.inf, dtype=torch.float64)
        for got in (
            op.logdet(damping=delta),
            op.logdet(damping=[1.0, delta])[1],
            (op + delta * unit).logdet(),
            (-2.0 * op - 2.0 * delta * unit).logdet() - 6 * math.log(2.0),
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("number", [0.1, -3e20, 1e-38])
def test_numbers_round_as_in_torch(
    dtype: torch.dtype, shape: tuple[int, ...], number: float
) -> None:
    X = torch.randn(shape, dtype=dtype).mul(1e3).requires_grad_()
    c = torch.tensor(number, dtype=dtype, requires_grad=True)
    for ours, expected in ((times, X * number), (plus, X + number)):
        for result in (ours(X, number), ours(X, c)):
            assert result.dtype == dtype
            assert torch.equal(result, expected)
        (slope,) = torch.autograd.grad(ours(X, number).sum(), X)
        assert torch.equal(slope, torch.autograd.grad(expected.sum(), X)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-30, 1e-39, 1e-300])
def test_dampings_beneath_single_precision(damping: float, dtype: torch.dtype) -> None:
    """λ/δ may be more than float32 holds; the logarithm is not."""
    op = nets(dtype)["few"]
    D, evals = op.shape[0], op.eigvalsh().double().clamp(min=0.0)
    rank = min(D, op.factor.shape[1])
    top = evals.sort().values[-rank:]
    expected = (top + damping).log().sum() + (D - rank) * math.log(damping)
    delta = torch.tensor(damping, dtype=torch.float64, requires_grad=True)
    for found in (
        (op + damping * vl.Identity(D)).logdet(),
        (op + delta * vl.Identity(D)).logdet().detach(),
        op.logdet(damping=[damping, 1.0])[0],
    ):
        assert found.double() == pytest.approx(float(expected), rel=1e-5)
