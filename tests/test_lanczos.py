"""Thick-restart Lanczos: pairs at the ends of spectra, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import vivit_linop as vl
from vivit_linop.linalg import krylov
from vivit_linop.linalg.eigen import WHICH

FLOAT64 = torch.float64
DTYPES = (torch.float32, FLOAT64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
N = 150


def spectra() -> dict[str, Tensor]:
    numbers = torch.arange(N, dtype=FLOAT64)
    noise = torch.rand(N, generator=torch.Generator().manual_seed(3)).double()
    return {
        "decaying": 1 / (1 + numbers),
        "outliers": torch.where(numbers < 9, 1 - numbers / 12, 0.02 * noise),
        "indefinite": noise - 0.5,
        "rank 4": torch.where(numbers < 4, 1 + numbers, 0.0),
        "multiple": torch.where(numbers < 5, 1.0, torch.where(numbers < 8, 0.5, 0.1)),
        "one value": torch.full((N,), 2.0, dtype=FLOAT64),
        "zero": torch.zeros(N, dtype=FLOAT64),
        "large": 1e6 * torch.exp(-numbers / 5),
        "small": 1e-6 * torch.exp(-numbers / 5),
        "negative": -1 - noise,
    }


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=FLOAT64))[0]
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def chosen(values: Tensor, k: int, which: str) -> Tensor:
    values = values.sort().values
    if which == "LM":
        return values[values.abs().argsort(stable=True)[-k:]].sort().values
    return values[-k:] if which == "LA" else values[:k]


def check(A: Tensor, values: Tensor, found: tuple[Tensor, Tensor], which: str) -> None:
    """The values, orthonormal vectors, and small residuals."""
    evals, E = found
    dtype = evals.dtype
    eps, size = torch.finfo(dtype).eps, values.abs().max().item()
    expected = chosen(values, len(evals), which)
    if which == "LM":
        # Of two that are as large, either may be taken.
        evals_to_compare, expected = evals.abs().sort().values, expected.abs()
        expected = expected.sort().values
    else:
        evals_to_compare = evals
    error = (evals_to_compare.double() - expected).abs().max()
    assert error <= 50 * eps * size
    E = E.double()
    unit = torch.eye(len(evals), dtype=FLOAT64)
    assert (E.T @ E - unit).abs().max() <= 100 * eps
    residuals = (A @ E - E * evals.double()).norm(dim=0)
    assert residuals.max() <= 50 * eps * size
    assert torch.equal(evals, evals.sort().values)


@every_dtype
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", spectra())
def test_ends_of_spectra(name: str, which: str, dtype: torch.dtype) -> None:
    values = spectra()[name]
    A = with_spectrum(values)
    own = A.to(dtype)
    start = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
    if which == "SA" and name in ("large", "small"):
        # Smaller than rounding, on many scales: no polynomial separates them.
        with pytest.raises(krylov.NotConverged):
            krylov.lanczos(own.mv, start, 6, which, restarts=30)
        found = krylov.lanczos(own.mv, start, 6, which, hidden=1e-3)
        assert found[0].abs().max() <= 2e-3 * values.max()
    else:
        check(A, values, krylov.lanczos(own.mv, start, 6, which), which)


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_few_rows_and_all_pairs(n: int, dtype: torch.dtype) -> None:
    for seed, values in enumerate(
        (torch.linspace(-1, 3, n, dtype=FLOAT64), torch.ones(n, dtype=FLOAT64))
    ):
        A = with_spectrum(values, seed)
        own, start = A.to(dtype), torch.ones(n, dtype=dtype)
        for k in {1, max(1, n - 1), n}:
            for which in WHICH:
                found = krylov.lanczos(own.mv, start, k, which)
                check(A, values, found, which)


@pytest.mark.parametrize("k", [40, N - 1, N])
def test_many_pairs(k: int) -> None:
    values = spectra()["indefinite"]
    A = with_spectrum(values)
    check(A, values, krylov.lanczos(A.mv, torch.ones(N).double(), k), "LA")


def test_a_start_that_is_an_eigenvector_does_not_hide_the_others() -> None:
    values = torch.linspace(0, 1, N, dtype=FLOAT64)
    A = torch.diag(values)
    for start in (torch.eye(N, dtype=FLOAT64)[3], torch.eye(N, dtype=FLOAT64)[-1]):
        check(A, values, krylov.lanczos(A.mv, start, 4), "LA")


@every_dtype
def test_it_takes_no_more_products_than_arpack(dtype: torch.dtype) -> None:
    """In all over the spectra that ARPACK separates."""
    ours = arpacks = 0
    for name in ("decaying", "outliers", "indefinite"):
        A = with_spectrum(spectra()[name]).to(dtype)
        counts = [0, 0]

        def multiplied(x: Any, way: int, A: Any, counts: list[int] = counts) -> Any:
            counts[way] += 1
            return A @ x

        start = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
        numbers = A.numpy()
        op = LinearOperator(
            A.shape,
            matvec=lambda x, A=numbers, f=multiplied: f(x, 0, A),
            dtype=numbers.dtype,
        )
        eigsh(op, 10, which="LA", v0=start.numpy())
        krylov.lanczos(lambda x, A=A, f=multiplied: f(x, 1, A), start, 10)
        arpacks, ours = arpacks + counts[0], ours + counts[1]
    assert ours <= 1.1 * arpacks


def test_a_tolerance_spares_products_and_is_kept() -> None:
    values = spectra()["indefinite"]
    A, counts = with_spectrum(values), []
    for tol in (1e-2, 1e-5, 0.0):
        products = []

        def product(x: Tensor, seen: list[int] = products) -> Tensor:
            seen.append(1)
            return A @ x

        evals, E = krylov.lanczos(product, torch.ones(N).double(), 9, tol=tol)
        counts.append(len(products))
        residuals = (A @ E - E * evals).norm(dim=0)
        assert (residuals <= max(tol, 1e-13) * evals.abs()).all()
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_what_is_not_found_is_said() -> None:
    # Rotations by small angles: nothing is separated in two rounds.
    values = torch.linspace(1, 1.001, N, dtype=FLOAT64)
    A = with_spectrum(values)
    with pytest.raises(krylov.NotConverged):
        krylov.lanczos(A.mv, torch.ones(N).double(), 3, restarts=1)


def risk_of(dtype: torch.dtype) -> vl.EmpiricalRisk:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    data = torch.rand(40, 5).to(dtype), torch.randint(3, (40,))
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)


@every_dtype
def test_operators_by_the_route_that_is_asked_for(dtype: torch.dtype) -> None:
    risk, exact = risk_of(dtype), risk_of(FLOAT64)
    G, H = vl.GGN(risk), vl.Hessian(risk)
    dense = {
        "GGN": vl.GGN(exact).to_dense(),
        "Hessian": vl.Hessian(exact).to_dense(),
    }
    for op, name in ((G, "GGN"), (H, "Hessian")):
        truth = (dense[name] + dense[name].T) / 2
        values = torch.linalg.eigvalsh(truth)
        for which in WHICH:
            pairs = op.eigh(k=3, which=which, route="Lanczos", tol=0.0)
            # The small end of a GGN is no better separated than rounding errors.
            end = (name, which) == ("GGN", "SA")
            assert pairs.route == ("dense" if end else f"Lanczos on {name}")
            # Of the net's own rounding, too.
            size = 1e3 * torch.finfo(dtype).eps * values.abs().max()
            expected = chosen(values, 3, which)
            assert (pairs.eigenvalues.double() - expected).abs().max() <= size
            E = pairs.eigenvectors.double()
            assert (truth @ E - E * pairs.eigenvalues.double()).norm() <= 3 * size
        assert op.eigh(k=3, route="ARPACK").route == f"ARPACK on {name}"
    for route in ("Lanczos on G", "Lanczos on K"):
        pairs = G.eigh(k=3, route=route)
        assert pairs.route == route
        expected = torch.linalg.eigvalsh(dense["GGN"])[-3:]
        error = (pairs.eigenvalues.double() - expected).abs().max()
        assert error <= 1e3 * torch.finfo(dtype).eps * expected[-1]


def test_more_pairs_than_the_rank_come_from_the_dense_way() -> None:
    V = vl.Dense(torch.rand(50, 3, dtype=FLOAT64) @ torch.rand(3, 30, dtype=FLOAT64))
    op = V @ V.T
    pairs = op.eigh(k=5, route="Lanczos on K")
    assert pairs.route == "dense Gram"
    values = torch.linalg.eigvalsh(op.to_dense())
    check(op.to_dense(), values, (pairs.eigenvalues, pairs.eigenvectors), "LA")


def test_a_start_reaches_it_and_a_good_one_spares_products() -> None:
    H = vl.Hessian(risk_of(FLOAT64))
    pairs = H.eigh(k=1, route="Lanczos")
    seen = []

    class Seen(vl.TorchLinearOperator):
        self_adjoint = True

        def _multiply(self, X: Tensor) -> Tensor:
            seen.append(X.clone())
            return H.apply(X)

    op = Seen(H.shape, H.torch_dtype, H.device)
    start = pairs.eigenvectors[:, 0]
    again = op.eigh(k=1, route="Lanczos", v0=3 * start, tol=1e-3)
    torch.testing.assert_close(seen[0][:, 0], start)
    torch.testing.assert_close(again.eigenvalues, pairs.eigenvalues)


def test_what_it_does_not_separate_comes_from_the_matrix() -> None:
    values = torch.linspace(1, 1 + 1e-9, 200, dtype=FLOAT64)
    A = vl.Dense(with_spectrum(values)) @ vl.Identity(200)
    op = vl.Dense(A.to_dense()) + vl.Kronecker(
        torch.zeros(2, 2, dtype=FLOAT64), torch.zeros(100, 100, dtype=FLOAT64)
    )
    pairs = op.eigh(k=3, route="Lanczos")
    expected = torch.linalg.eigvalsh(op.to_dense())[-3:]
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("route", ["ARPACK on K", "Lanczos on G"])
def test_an_iteration_that_gives_up_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    def gives_up(*_: Any, **__: Any) -> None:
        raise krylov.NotConverged(1)

    monkeypatch.setattr(krylov, "eigsh", gives_up)
    monkeypatch.setattr(krylov, "lanczos", gives_up)
    G = vl.GGN(risk_of(FLOAT64))
    solver = route.split()[0]
    with pytest.raises(RuntimeError, match=f"{solver} has found 1 of 3 pairs of .*GGN"):
        G.eigh(k=3, route=route)


def test_derivatives_and_states_are_left_alone() -> None:
    d = torch.linspace(0, 1, N, dtype=FLOAT64)
    state = torch.get_rng_state()
    with torch.inference_mode():
        evals, _ = krylov.lanczos(lambda x: d * x, torch.ones(N).double(), 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(evals, d[-2:])
