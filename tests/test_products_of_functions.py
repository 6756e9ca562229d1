"""Traces, diagonals, roots and spectra of products of low-rank nodes and inverses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.pairs import pairwise
from vivit_linop.operators.base import TorchLinearOperator

D64, TAU = torch.float64, 0.1
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}


def risk_of(n: int, seed: int, dtype: torch.dtype) -> vl.EmpiricalRisk:
    """95 parameters, 2 columns a sample; some samples come twice."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(n, 8, generator=generator, dtype=D64)
    X[-2:] = X[:2].clone()
    y = torch.arange(n) % 3
    return vl.EmpiricalRisk(net.to(dtype), nn.CrossEntropyLoss(), (X.to(dtype), y))


def operators(n: int, dtype: torch.dtype) -> dict[str, Any]:
    first, second = risk_of(n, 0, dtype), risk_of(n + 1, 5, dtype)
    G, H = vl.GGN(first), 0.5 * vl.GGN(second)
    eye = vl.Identity(G.shape[0])
    return {
        "G": G,
        "H": H,
        "S": (G + TAU * eye).inv(),
        "T": (H + 2 * TAU * eye).inv(),
        "P": vl.Diagonal(torch.linspace(0.1, 1.0, G.shape[0], dtype=dtype)),
        "F": vl.EmpiricalFisher(second),
        "I": eye,
        "C": (C := vl.KFAC(first)),
        "K": (C + TAU * eye).inv().sqrt(),
    }


def dense(n: int) -> dict[str, Tensor]:
    """The same in float64, inverses by LU."""
    made = operators(n, D64)
    found = {name: op.to_dense() for name, op in made.items() if name not in "ST"}
    unit = torch.eye(len(found["G"]), dtype=D64)
    found["I"] = unit
    found["S"] = torch.linalg.inv(found["G"] + TAU * unit)
    found["T"] = torch.linalg.inv(found["H"] + 2 * TAU * unit)
    return found


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns of D rows nodes have been multiplied with."""
    counts, multiplied = list[int](), TorchLinearOperator._multiplied

    def counted(self: TorchLinearOperator, X: Tensor) -> Tensor:
        counts.append(X.shape[1])
        return multiplied(self, X)

    monkeypatch.setattr(TorchLinearOperator, "_multiplied", counted)
    return counts


def inverse(o: dict[str, Any], name: str) -> Any:
    """(A + τ I)⁻¹, made anew each time it is typed."""
    damped = o[name] + TAU * o["I"]
    return torch.linalg.inv(damped) if isinstance(damped, Tensor) else damped.inv()


Expression = Callable[[dict[str, Any]], Any]
PRODUCTS: dict[str, Expression] = {
    "G S": lambda o: o["G"] @ o["S"],
    "S G": lambda o: o["S"] @ o["G"],
    "H S": lambda o: o["H"] @ o["S"],
    "S S": lambda o: o["S"] @ o["S"],
    "S T": lambda o: o["S"] @ o["T"],
    "S F S": lambda o: o["S"] @ o["F"] @ o["S"],
    "(H + tau I) S": lambda o: (o["H"] + TAU * o["I"]) @ o["S"],
    "P S P": lambda o: o["P"] @ o["S"] @ o["P"],
    "G G": lambda o: o["G"] @ o["G"],
    "G S H T": lambda o: o["G"] @ o["S"] @ o["H"] @ o["T"],
    "C (C + tau I)⁻¹": lambda o: o["C"] @ inverse(o, "C"),
    "(C + tau I)⁻¹ C": lambda o: inverse(o, "C") @ o["C"],
    "(C + tau I)⁻²": lambda o: inverse(o, "C") @ inverse(o, "C"),
    "P S": lambda o: o["P"] @ o["S"],
    "(G - H) (G - H)": lambda o: (o["G"] - o["H"]) @ (o["G"] - o["H"]),
    "2 S - G T": lambda o: 2 * o["S"] - o["G"] @ o["T"],
}


# With fewer and with more columns than rows.
@pytest.mark.parametrize(
    ("name", "n", "dtype"), pairwise(PRODUCTS, [6, 60], TOLERANCES), ids=str
)
def test_traces_and_diagonals(name: str, n: int, dtype: torch.dtype) -> None:
    op, A = PRODUCTS[name](operators(n, dtype)), PRODUCTS[name](dense(n))
    rtol = TOLERANCES[dtype]
    assert abs(op.trace().double() - A.trace()) <= rtol * A.diagonal().abs().sum()
    error = op.diagonal().double() - A.diagonal()
    assert error.norm() <= rtol * A.diagonal().norm()


@pytest.mark.parametrize("name", PRODUCTS)
def test_traces_take_no_product_with_each_parameter(
    name: str, columns: list[int]
) -> None:
    op = PRODUCTS[name](operators(6, D64))
    columns.clear()
    op.trace()
    assert max(columns, default=0) < op.shape[0]


def test_diagonals_of_products_are_as_narrow_as_their_factors(
    columns: list[int],
) -> None:
    made = operators(6, D64)
    for name in ("G S", "H S", "S F S", "G G", "G S H T"):
        op = PRODUCTS[name](made)
        columns.clear()
        op.diagonal()
        assert max(columns) < op.shape[0]


@pytest.mark.parametrize("kind", ["inverse", "root", "low rank", "diagonal"])
def test_norms_of_square_sandwiches(kind: str) -> None:
    """tr(AᵀS B BᵀS A): what has the form of a sandwich again has a diagonal."""
    generator = torch.Generator().manual_seed(0)
    V, A, B = (torch.randn(6, k, generator=generator, dtype=D64) for k in (3, 6, 6))
    node, unit = vl.Dense(V), torch.eye(6, dtype=D64)
    G, damped = node @ node.T, node @ node.T + 0.4 * vl.Identity(6)
    p = torch.linspace(1, 2, 6, dtype=D64)
    S: vl.TorchLinearOperator = {
        "inverse": damped.inv,
        "root": damped.sqrt,
        "low rank": lambda: G,
        "diagonal": lambda: vl.Diagonal(p),
    }[kind]()
    evals, evecs = torch.linalg.eigh(V @ V.T + 0.4 * unit)
    dense = {
        "inverse": torch.linalg.inv(V @ V.T + 0.4 * unit),
        "root": evecs * evals.sqrt() @ evecs.T,
        "low rank": V @ V.T,
        "diagonal": p.diag(),
    }[kind]
    op, matrix = vl.Dense(A).T @ S @ vl.Dense(B), A.T @ dense @ B
    for found in ((op.T @ op).trace(), (op @ op.T).trace()):
        torch.testing.assert_close(found, matrix.square().sum())
    torch.testing.assert_close((op @ op).trace(), (matrix @ matrix).trace())
    torch.testing.assert_close(
        (op @ op.T @ op).trace(), (matrix @ matrix.T @ matrix).trace()
    )


def test_traces_of_high_powers(columns: list[int]) -> None:
    """A power of a sum has exponentially many terms."""
    A = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double() / 5
    op, unit = vl.from_scipy(A.numpy()), torch.eye(5, dtype=D64)
    damped, added = op + vl.Identity(5), op + vl.from_scipy((A @ A).numpy())
    for power, exponent, matrix in (
        (damped, 40, A + unit),
        (added, 40, A + A @ A),
        (damped @ added, 20, (A + unit) @ (A + A @ A)),
    ):
        exact = torch.linalg.matrix_power(matrix, exponent).trace()
        columns.clear()
        torch.testing.assert_close((power**exponent).trace(), exact)
        assert len(columns) <= 6 * exponent
    exact = torch.linalg.matrix_power(A + unit, 80)
    torch.testing.assert_close((damped**80 - op).trace(), (exact - A).trace())


MIRRORED: dict[str, Expression] = {
    "G G": lambda o: o["G"] @ o["G"],
    "G³": lambda o: o["G"] @ o["G"] @ o["G"],
    "2 G S 2 G": lambda o: 2 * o["G"] @ o["S"] @ (2 * o["G"]),
    "S again": lambda o: inverse(o, "G") @ o["G"] @ inverse(o, "G"),
    "P G S G P": lambda o: o["P"] @ o["G"] @ o["S"] @ o["G"] @ o["P"],
    "S S": lambda o: o["S"] @ o["S"],
    "KᵀG K": lambda o: o["K"].T @ o["G"] @ o["K"],
}


@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("name", MIRRORED)
def test_spectra_and_inverses_of_mirrored_products(name: str, n: int) -> None:
    op, made = MIRRORED[name](operators(n, D64)), dense(n)
    A = MIRRORED[name](made)
    evals, unit = torch.linalg.eigvalsh(A), torch.eye(len(A), dtype=D64)
    pairs = op.eigh(k=3)
    assert (pairs.eigenvalues - evals[-3:]).norm() <= 1e-9 * evals[-1]
    E = pairs.eigenvectors
    assert (A @ E - E * pairs.eigenvalues).norm() <= 1e-8 * evals[-1]
    root = op.sqrt().to_dense()
    assert (root @ root.T - A).norm() <= 1e-9 * A.norm()
    damped = op + evals[-1].item() * vl.Identity(len(A))
    inverse = torch.linalg.inv(A + evals[-1] * unit)
    assert (damped.inv().to_dense() - inverse).norm() <= 1e-8 * inverse.norm()


def test_powers_of_large_operators_stay_narrow(columns: list[int]) -> None:
    V = vl.Dense(
        torch.rand(3000, 4, generator=torch.Generator().manual_seed(0)).double()
    )
    A = V @ V.T
    S = (A + vl.Identity(3000)).inv()
    evals = torch.linalg.eigvalsh(V.matrix.T @ V.matrix)
    columns.clear()
    assert torch.allclose((A @ A).eigh(k=2).eigenvalues, evals[-2:] ** 2)
    assert torch.allclose((A @ S @ A).eigvalsh(), evals**2 / (evals + 1.0))
    assert torch.allclose((S @ S).eigh(k=1).eigenvalues, torch.ones(1, dtype=D64))
    zeros = torch.zeros(2996, dtype=D64)
    every = torch.cat([zeros, evals])
    damped, root = A + vl.Identity(3000), (A + 2 * vl.Identity(3000)).inv().sqrt()
    for op, expected in (
        (S @ S, (every + 1.0) ** -2),
        (damped @ damped @ damped, (every + 1.0) ** 3),
        (damped @ root @ damped, (every + 1.0) ** 2 * (every + 2.0) ** -0.5),
        (-2.0 * (S @ S), -2.0 * (every + 1.0) ** -2),
    ):
        assert torch.allclose(op.eigvalsh(), expected.sort().values)
    assert max(columns) < 20


@pytest.mark.parametrize("epsilon", [0.05, 0.0999, 0.2, 1e-9])
def test_an_inverse_less_than_the_identity(epsilon: float) -> None:
    """I − ε S is I S⁻¹ S less: its inverse is a closed form while ε is below δ."""
    made, S = operators(6, D64), dense(6)["S"]
    op = made["I"] - epsilon * made["S"]
    if epsilon > TAU:  # indefinite: at D − R eigenvalues 1 − ε/δ
        with pytest.raises(TypeError, match="no closed form"):
            op.inv()
        return
    inverse = torch.linalg.inv(torch.eye(len(S), dtype=D64) - epsilon * S)
    assert (op.inv().to_dense() - inverse).norm() <= 1e-7 * inverse.norm()


def test_derivatives_in_the_damping() -> None:
    made = operators(6, D64)
    G, eye, T = made["G"], made["I"], made["T"]
    truth, unit = dense(6), torch.eye(G.shape[0], dtype=D64)
    tau = torch.tensor(TAU, dtype=D64, requires_grad=True)
    S, exact = (G + tau * eye).inv(), torch.linalg.inv(truth["G"] + tau * unit)
    for found, expected in (
        (S.diagonal(), exact.diagonal()),
        ((G @ S).trace(), (truth["G"] @ exact).trace()),
        ((T @ S).trace(), (truth["T"] @ exact).trace()),
    ):
        weights = torch.linspace(1, 2, found.numel(), dtype=D64)
        first = [
            torch.autograd.grad((x * weights).sum(), tau, create_graph=True)[0]
            for x in (found, expected)
        ]
        second = [torch.autograd.grad(x, tau, retain_graph=True)[0] for x in first]
        assert torch.allclose(found, expected)
        assert torch.allclose(*first) and torch.allclose(*second)
