"""Eigenpairs that start from those of a near operator, against dense eigenpairs."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from vivit_linop.operators import verbs

LOSS = nn.CrossEntropyLoss()


def problem(
    samples: int, dtype: torch.dtype = torch.float64, hidden: int = 12, *more: nn.Module
) -> tuple[nn.Module, vl.EmpiricalRisk]:
    torch.manual_seed(0)
    X, y = torch.randn(samples, 6).to(dtype), torch.arange(samples) % 4
    middle = (nn.Tanh(), *more)
    net = nn.Sequential(nn.Linear(6, hidden), *middle, nn.Linear(hidden, 4)).to(dtype)
    return net, vl.EmpiricalRisk(net, LOSS, [(X[:7], y[:7]), (X[7:], y[7:])])


def step(net: nn.Module, risk: vl.EmpiricalRisk, rate: float = 0.2) -> vl.EmpiricalRisk:
    risk.add_to_(net, -rate * risk.gradient())
    return risk.at()


def check(pairs: Any, matrix: Tensor, tol: float) -> None:
    """Values, orthonormal vectors, and Rayleigh quotients that are the values."""
    k = len(pairs)
    evals, evecs = pairs
    matrix, evals, evecs = matrix.double(), evals.double(), evecs.double()
    exact = torch.linalg.eigvalsh(matrix)[-k:]
    rounding = 1e-4 if pairs.eigenvalues.dtype == torch.float32 else 1e-9
    assert (evals <= exact + rounding * exact[-1]).all()  # Ritz values
    assert (exact - evals).sum() <= tol * exact[-1]
    unit = torch.eye(k, dtype=torch.float64)
    assert (evecs.T @ evecs - unit).norm() <= 10 * rounding
    quotients = (evecs * (matrix @ evecs)).sum(0)
    assert (quotients - evals).norm() <= 2 * tol * exact[-1]


@pytest.mark.parametrize("samples", [9, 60])  # N·R below and above D = 136
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_are_followed_through_training(samples: int, dtype: torch.dtype) -> None:
    net, risk = problem(samples, dtype)
    pairs: Any = vl.GGN(risk).eigh(k=3)
    sides = []
    for _ in range(6):
        risk = step(net, risk, 0.05)
        G = vl.GGN(risk)
        pairs = G.eigh(k=3, start=pairs)
        check(pairs, G.to_dense(), 0.02)
        assert pairs.route == "tracked" and pairs.half_steps <= 2
        sides.append(pairs.block.far)
    assert len(set(sides)) == 2  # from one side of the factor to the other
    for tol in (1e-4, 1e-7):
        check(G.eigh(k=3, start=pairs, tol=tol), G.to_dense(), 50 * tol)


def test_one_product_with_a_block_is_enough() -> None:
    """Beside it, one vector for the check; nothing goes through the net again."""
    calls: list[int] = []

    class Counted(nn.Identity):
        def forward(self, input: Tensor) -> Tensor:
            calls.append(1)
            return input

    net, risk = problem(60, torch.float64, 12, Counted())
    pairs = vl.GGN(risk).eigh(k=6)
    now = step(net, risk, 0.05)
    calls.clear()
    assert vl.GGN(now).eigh(k=6, start=pairs).half_steps == 1  # type: ignore[attr-defined]
    assert len(calls) == 2  # a linearisation of each batch


def test_fewer_pairs_than_in_the_block() -> None:
    net, risk = problem(60)
    pairs: Any = vl.GGN(risk).eigh(k=9)
    for _ in range(3):
        risk = step(net, risk)
        G = vl.GGN(risk)
        pairs = G.eigh(k=5, start=pairs)
        check(pairs, G.to_dense(), 0.01)
        assert len(pairs) == 5 and pairs.block.vectors.shape[1] == 9
    assert len(G.eigh(start=vl.GGN(risk).eigh(k=4))) == 4


@pytest.mark.parametrize("kind", ["fisher", "damped", "scaled", "factor", "subset"])
def test_other_operators(kind: str) -> None:
    net, risk = problem(60)
    after = step(net, risk)

    def make(risk: vl.EmpiricalRisk) -> Any:
        G = vl.GGN(risk)
        if kind == "fisher":
            return vl.EmpiricalFisher(risk)
        if kind == "damped":
            return G + 0.3 * vl.Identity(risk.num_params)
        if kind == "scaled":
            return 3 * G
        if kind == "factor":
            V = vl.Dense(vl.GGNFactor(risk).to_dense())
            return V @ V.T
        return vl.GGN(risk.subset(range(50)))  # other columns: from vectors in D

    start = make(risk).eigh(k=6) if kind != "subset" else vl.GGN(risk).eigh(k=6)
    A = make(after)
    pairs = A.eigh(k=6, start=start)
    assert pairs.route == "tracked"
    check(pairs, A.to_dense(), 0.02)


def test_start_that_is_far_away() -> None:
    """It ends at the right pairs, by the iteration or from nothing."""
    _, risk = problem(60)
    G = vl.GGN(risk)
    truth = G.to_dense()
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(136, 5, generator=generator, dtype=torch.float64)).Q
    values = torch.ones(5, dtype=torch.float64)
    for vectors in (Q, Q @ torch.rand(5, 5, generator=generator, dtype=torch.float64)):
        start = vl.linalg.Eigenpairs(values, vectors)
        check(G.eigh(k=5, start=start, tol=1e-4), truth, 1e-2)


def test_more_vectors_than_pairs() -> None:
    """A single layer's GGN has fewer pairs than the block has vectors."""
    X = torch.rand(2, 3, dtype=torch.float64)
    net = nn.Linear(3, 3).double()
    risk = vl.EmpiricalRisk(net, nn.MSELoss(), (X, X))
    vectors = torch.eye(12, dtype=torch.float64)[:, :7]
    start = vl.linalg.Eigenpairs(torch.ones(7, dtype=torch.float64), vectors)
    G = vl.GGN(risk)
    check(G.eigh(k=5, start=start), G.to_dense(), 1e-9)


class Wrong(torch.autograd.Function):
    """tanh with a wrong second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (t,) = ctx.saved_tensors
        return Scaled.apply(g, 1 - t * t)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return g * slope

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return 1.1 * u * slope, None


class Once(Wrong):
    """tanh without a second derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (t,) = ctx.saved_tensors
        return g * (1 - t * t)


class Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x)
        return result


@pytest.mark.parametrize("function", [Wrong, Once])
def test_wrong_and_missing_second_derivatives(function: Any) -> None:
    """J x is not believed: its products are compared with those of Jᵀ."""
    plain, _ = problem(60)
    torch.manual_seed(0)
    X, y = torch.randn(60, 6).double(), torch.arange(60) % 4
    net = nn.Sequential(plain[0], Apply(function), plain[2])  # type: ignore[index]
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    start = vl.GGN(vl.EmpiricalRisk(plain, LOSS, (X, y))).eigh(k=6)
    start.eigenvectors  # noqa: B018  (so that it begins with J x)
    start = vl.linalg.Eigenpairs(*start)
    truth = vl.GGN(vl.EmpiricalRisk(plain, LOSS, (X, y))).to_dense()
    G = vl.GGN(risk.at())
    check(G.eigh(k=6, start=start), truth, 0.02)
    x = torch.arange(136, dtype=torch.float64).cos()
    torch.testing.assert_close(G @ x, truth @ x)  # and later products are right


def test_other_threads_take_certified_products_only() -> None:
    """While a thread certifies its own linearisation, others make and check theirs."""
    plain, _ = problem(60)
    torch.manual_seed(0)
    X, y = torch.randn(60, 6).double(), torch.arange(60) % 4
    truth = vl.GGN(vl.EmpiricalRisk(plain, LOSS, (X, y))).to_dense()
    net = nn.Sequential(plain[0], Apply(Wrong), plain[2])  # type: ignore[index]
    G = vl.GGN(net, LOSS, (X, y))
    x = torch.arange(136, dtype=torch.float64).cos()
    with verbs.few_products(G.factor) as factor:
        own = factor @ (factor.T @ x)  # not certified: here it is wrong
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: G @ x).result()
    assert (own - truth @ x).norm() > 1e-3
    torch.testing.assert_close(other, truth @ x)
    torch.testing.assert_close(vl.GGN(G.risk) @ x, truth @ x)


def test_bad_input() -> None:
    _, risk = problem(9)
    G = vl.GGN(risk)
    pairs = G.eigh(k=3)
    vectors = pairs.eigenvectors.clone()
    vectors[0, 1] = torch.nan
    spoiled = vl.Eigenpairs(pairs.eigenvalues, vectors)
    _, smaller = problem(9, hidden=5)  # as many columns, fewer parameters
    others = vl.GGN(smaller).eigh(k=3)
    for arguments, error, message in [
        ({"start": G.eigvalsh()}, TypeError, "start: eigenpairs"),
        ({"k": 4, "start": pairs}, ValueError, "k: between 1 and 3"),
        ({"k": 0, "start": pairs}, ValueError, "k: between 1 and 3"),
        ({"k": 2, "start": pairs, "tol": 0.0}, ValueError, "tol: a positive"),
        ({"start": vl.Identity(4).eigh(k=2)}, ValueError, "start: pairs of an"),
        ({"start": others}, ValueError, "start: pairs of an"),
        (
            {"start": vl.GGN(smaller).eigh(start=others)},
            ValueError,
            "start: pairs of an",
        ),
        ({"start": spoiled}, ValueError, "start: holds NaN or Inf"),
    ]:
        with pytest.raises(error, match=message):
            G.eigh(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="start: the Dense has no factor"):
        vl.Dense(G.to_dense()).eigh(start=pairs)
