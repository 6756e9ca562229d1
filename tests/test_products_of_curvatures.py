"""Traces, norms and diagonals of products of curvatures, of their inverses too."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.pairs import pairwise
from vivit_linop.operators import CorrectedKronecker, Dense, Diagonal

TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-4}


@cache
def operators(dtype: torch.dtype, n: int) -> dict[str, Any]:
    """Curvatures of two risks, D = 107, with 2 n columns each; inverses of them."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    net, D = nn.Sequential(*layers).to(dtype), 107
    first, second = (
        vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
        for data in zip(
            torch.randn(2, n, 6, dtype=dtype), torch.randint(3, (2, n)), strict=True
        )
    )
    K, E = vl.KFAC(first, variant="exact"), vl.EKFAC(first, variant="exact")
    G, other = vl.GGN(first), vl.GGN(second)
    prior, unit = Diagonal(0.5 + torch.rand(D, dtype=dtype)), vl.Identity(D)
    return {
        "KFAC": K,
        "EKFAC": E,
        "KFAC of other data": vl.KFAC(second, variant="exact"),
        "GGN": G,
        "GGN of other data": other,
        "Fisher": vl.EmpiricalFisher(first),
        "diagonal": prior,
        "inverse": (G + 0.1 * unit).inv(),
        "inverse of other data": (other + 0.2 * unit).inv(),
        "inverse with a prior": (G + prior).inv(),
        "inverse of KFAC": (K + 0.1 * unit).inv(),
        "inverse of EKFAC": (E + 0.1 * unit).inv(),
    }


@cache
def matrix(dtype: torch.dtype, n: int, name: str) -> Tensor:
    result: Tensor = operators(dtype, n)[name].to_dense()
    return result.double().cpu()


NAMES = list(operators(torch.float64, 8))


# With 16 columns and with 160, of 107 rows.
@pytest.mark.parametrize(
    ("both", "dtype", "n"),
    pairwise(combinations(NAMES, 2), TOLERANCES, [8, 80]),
    ids=str,
)
def test_products_of_two(both: tuple[str, str], dtype: torch.dtype, n: int) -> None:
    A, B = (operators(dtype, n)[name] for name in both)
    a, b = (matrix(dtype, n, name) for name in both)
    difference, squares = A - B, a.square().sum() + b.square().sum()
    for found, truth, size in [
        ((A @ B).trace(), (a @ b).trace(), a.norm() * b.norm()),
        ((B @ A).trace(), (a @ b).trace(), a.norm() * b.norm()),
        ((A @ B).diagonal(), (a @ b).diagonal(), (a @ b).diagonal().norm()),
        ((B @ A).diagonal(), (b @ a).diagonal(), (a @ b).diagonal().norm()),
        ((difference @ difference).trace(), (a - b).square().sum(), squares),
    ]:
        error = (found.double().cpu() - truth).norm()
        assert error <= TOLERANCES[dtype] * size, (error / size).item()
    # Half of the digits are there also where terms cancel.
    assert error <= 10 * torch.finfo(dtype).eps ** 0.5 * truth


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_norms_of_what_differs_little_keep_their_digits(dtype: torch.dtype) -> None:
    """Of the terms of |A − B|² nothing would be left."""
    first, second = (torch.randn(k, 9, dtype=torch.float64) for k in (6, 7))
    factors = [(part @ part.T).to(dtype) for part in (first, second)]
    A = vl.Kronecker(*factors)
    turned = vl.Kronecker(
        *(part + 1e-3 * torch.eye(len(part)).to(part) for part in factors)
    )
    E = CorrectedKronecker(turned, A.eigenvalues * (1 + 1e-3))
    for B in (E, turned):
        Z = A - B
        truth = (A.to_dense().double() - B.to_dense().double()).square().sum()
        for product in (Z @ Z, (A - B) @ (A - B)):
            error = (product.trace().double() - truth).abs() / truth
            assert error < (1e-9 if dtype == torch.float64 else 1e-2)


def test_traces_of_products_in_two_eigenbases() -> None:
    """Of eigenvalues that have nothing to do with each other."""
    parts = [torch.randn(2, k, k, dtype=torch.float64) for k in (3, 4)]
    E, F = (
        CorrectedKronecker(
            vl.Kronecker(*(part[number] @ part[number].T for part in parts)),
            torch.rand(12, dtype=torch.float64),
        )
        for number in range(2)
    )
    truth = (E.to_dense() * F.to_dense()).sum()
    for product in (E @ F, F @ E):
        torch.testing.assert_close(product.trace(), truth)


def test_norms_of_large_kronecker_products() -> None:
    """Of 120,000 rows, which nobody can multiply one by one."""
    parts = [torch.randn(k, k, dtype=torch.float64) / k**0.5 for k in (300, 400)]
    A = vl.Kronecker(*(part @ part.T for part in parts))
    E = CorrectedKronecker(A, A.eigenvalues + 0.5)
    Z = 2.0 * E - 2.0 * A
    torch.testing.assert_close((Z @ Z).trace().item(), 120_000.0)
    other = vl.Kronecker(*(part.T @ part for part in parts))
    F = CorrectedKronecker(other, other.eigenvalues)
    truth = 1.0
    for part in parts:
        truth *= ((part @ part.T) * (part.T @ part)).sum().item()
    torch.testing.assert_close((A @ F).trace().item(), truth)
    shift = 0.5 * other.trace().item()
    torch.testing.assert_close((E @ F).trace().item(), truth + shift)
    assert (F @ E).trace().item() == pytest.approx(truth + shift)


def test_diagonals_of_large_kronecker_products() -> None:
    sides = 120, 150
    parts = [torch.randn(2, k, k, dtype=torch.float64) / k**0.5 for k in sides]
    A, B = (
        vl.Kronecker(*(part[number] @ part[number].T for part in parts))
        for number in range(2)
    )
    E, F = (CorrectedKronecker(op, op.eigenvalues + 0.5) for op in (A, B))
    first, second = ([part.to_dense() for part in op.factors] for op in (A, B))

    def kron(left: Tensor, right: Tensor) -> Tensor:
        return torch.outer(left.diagonal(), right.diagonal()).flatten()

    both = kron(*(a @ b for a, b in zip(first, second, strict=True)))
    a, b = kron(*first), kron(*second)
    close = torch.testing.assert_close
    close((A @ F).diagonal(), both + 0.5 * a)
    close((F @ A).diagonal(), both + 0.5 * a)
    close((E @ F).diagonal(), both + 0.5 * a + 0.5 * b + 0.25)
    turned = vl.Kronecker(*reversed(A.factors)), vl.Kronecker(*reversed(B.factors))
    E, F = (CorrectedKronecker(op, op.eigenvalues + 0.5) for op in turned)
    found = (F @ E).diagonal().view(sides[::-1]).T.flatten()
    close(found, both + 0.5 * a + 0.5 * b + 0.25)


class Counted(Dense):
    """Counts the columns that it is multiplied with."""

    columns = 0

    def _multiply(self, X: Tensor) -> Tensor:
        Counted.columns += X.shape[1]
        return super()._multiply(X)


def test_diagonals_of_products_of_inverses_take_products_with_few_columns() -> None:
    D, unit = 400, vl.Identity(400)
    V, W = (Counted(torch.randn(D, 3, dtype=torch.float64)) for _ in range(2))
    S, T = (V @ V.T + 0.1 * unit).inv(), (W @ W.T + 0.3 * unit).inv()
    truth = (S.to_dense() @ T.to_dense()).diagonal()
    Counted.columns = 0
    torch.testing.assert_close((S @ T).diagonal(), truth)
    assert Counted.columns < 100


def test_few_digits_of_a_diagonal_come_from_products() -> None:
    """Rows in the range of V are of size 1/λ, and what is subtracted of size 1/δ."""
    D, delta = 30, 1e-7
    V = torch.zeros(D, 2, dtype=torch.float64)
    V[0, 0], V[1, 1] = 20.0, 30.0
    V[2:] = 1e-6 * torch.rand(D - 2, 2, dtype=torch.float64)
    S = (vl.Dense(V) @ vl.Dense(V).T + delta * vl.Identity(D)).inv()
    W = torch.rand(D, 2, dtype=torch.float64)
    T = (vl.Dense(W) @ vl.Dense(W).T + vl.Identity(D)).inv()
    exact = torch.linalg.inv(V @ V.T + delta * torch.eye(D, dtype=torch.float64))
    truth = (exact @ T.to_dense()).diagonal()
    found = (S @ T).diagonal()
    assert ((found - truth).abs() <= 1e-5 * truth.abs()).all()
