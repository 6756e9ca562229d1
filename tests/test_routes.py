"""Ways to eigenpairs and inverses: each gives the truth, and the cheapest is chosen."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import vivit_linop as vl
from tests import comparing
from vivit_linop.curvature import plan
from vivit_linop.net.costs import LayerCost

close = functools.partial(comparing.close, rtol=1e-9)

ROUTES = (
    *("dense Gram", "dense G", "ARPACK on K", "ARPACK on G"),
    *("Lanczos on K", "Lanczos on G"),
)
CPU = torch.device("cpu")


def risk_of(samples: int, calls: list[int] | None = None) -> vl.EmpiricalRisk:
    """5 · 6 + 6 + 6 · 3 + 3 = 57 parameters; 2 columns a sample; calls are noted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    if calls is not None:
        net.register_forward_hook(lambda *_: calls.append(1))
    data = torch.rand(samples, 5, dtype=torch.float64), torch.randint(3, (samples,))
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)


def operators(samples: int) -> dict[str, Any]:
    risk = risk_of(samples)
    J, U = vl.Jacobian(risk), vl.PerSampleGradients(risk)
    generator = torch.Generator().manual_seed(1)
    V = torch.randn(57, 2 * samples, generator=generator, dtype=torch.float64)
    return {
        "GGN": vl.GGN(risk),
        "3 GGN": 3 * vl.GGN(risk),
        "Fisher": vl.EmpiricalFisher(risk),
        "JᵀJ": J.T @ J,
        "covariance": U.covariance(),
        "block": vl.GGN(risk).block_diagonal("parameter").blocks[0],
        "V Vᵀ": (lambda V: V @ V.T)(vl.Dense(V)),
    }


NAMES = list(operators(4))


@pytest.mark.parametrize("samples", [6, 40])  # fewer and more columns than rows
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("known", [False, True])
def test_every_factor_has_all_routes(name: str, samples: int, known: bool) -> None:
    A = operators(samples)[name].to_dense()
    expected = torch.linalg.eigvalsh(A)
    unit = vl.Identity(len(A))
    exact = torch.linalg.inv(A + 0.1 * torch.eye(len(A), dtype=torch.float64))
    op = operators(samples)[name]
    if known:
        (op + 0.1 * unit).inv()
    for route in ROUTES:
        pairs = op.eigh(k=3, route=route)
        assert pairs.route == route
        assert close(pairs.eigenvalues, expected[-3:])
        E = pairs.eigenvectors
        assert (A @ E - pairs.eigenvalues * E).norm() <= 1e-9 * expected[-1]
        shifted = vl.linalg.eigh(2 * (op + 0.1 * unit), k=3, route=route)
        assert shifted.route == route
        assert close(shifted.eigenvalues, 2 * (expected[-3:] + 0.1))
        E = shifted.eigenvectors
        assert (A @ E - pairs.eigenvalues * E).norm() <= 1e-9 * expected[-1]
    for route in ROUTES[:2]:
        evals = op.eigvalsh(route=route)
        count = min(op.factor.shape)
        assert len(evals) == count and close(evals, expected[-count:])
        every = op.eigh(route=route)
        assert close((every.eigenvectors * every.eigenvalues) @ every.eigenvectors.T, A)
        damped = op + 0.1 * unit
        assert close(damped.inv(route=route).to_dense(), exact)
        assert close(damped.eigvalsh(route=route), expected + 0.1)
        assert close(op.routed(route).small_side.trace(), A.trace())


@pytest.mark.parametrize("route", ["fast", "Dense G", "", "dense"])
def test_a_wrong_name_lists_the_right_ones(route: str) -> None:
    G = vl.GGN(risk_of(4))
    with pytest.raises(ValueError, match=f"route: found {route!r}.*'ARPACK on K'"):
        G.eigh(k=2, route=route)
    for call in (
        lambda: G.eigh(route=route),
        lambda: G.eigvalsh(route=route),
        lambda: (G + vl.Identity(57)).inv(route=route),
        lambda: G.block_diagonal("module").eigvalsh(route=route),
    ):
        with pytest.raises(ValueError, match=r"give one of 'dense Gram', 'dense G'\.$"):
            call()


def test_routes_that_do_not_exist_are_refused() -> None:
    G = vl.GGN(risk_of(4))
    for call in (
        lambda: G.eigh(route="ARPACK on K"),  # all pairs
        lambda: G.eigh(select=lambda evals: [0], route="ARPACK on G"),
        lambda: G.eigvalsh(route="ARPACK on K"),
        lambda: (G + vl.Identity(57)).eigh(route="ARPACK on K"),
        lambda: (vl.Identity(57) - G).eigh(k=2, route="ARPACK on K"),
    ):
        with pytest.raises(ValueError, match="route: found 'ARPACK on"):
            call()
    with pytest.raises(ValueError, match="one way only"):
        vl.Dense(torch.eye(3)).eigh(k=1, route="dense G")
    with pytest.raises(ValueError, match=r"ARPACK finds at most 7 pairs.*k is 8"):
        G.eigh(k=8, route="ARPACK on K")


def test_a_known_gram_matrix_decides_anew() -> None:
    """As many columns as LAPACK needs long for; ARPACK multiplies by the matrix."""
    shape = 10**6, 9000
    cost = plan.FactorCost.of_dense(*shape, 8, CPU)
    known = plan.choose(shape, 10, None, 8, 10**12, True, CPU)
    assert known.chosen.name == "ARPACK on K"
    assert known.chosen.flops < 0.2 * known.routes[0].flops
    few = plan.choose((10**6, 150), 10, None, 8, 10**12, True, CPU)
    assert few.chosen.name == "dense Gram"
    most = plan.choose(shape, 5000, None, 8, 10**12, True, CPU)
    assert most.chosen.name == "dense Gram" and "half of the pairs" in most.why
    fresh = plan.choose(shape, 10, cost, 8, 10**6, True, CPU)
    assert fresh.chosen.name == "ARPACK on K" and "are free" in fresh.why


def test_a_known_matrix_of_some_hundred_rows_is_iterated_on() -> None:
    """What is taken is what explain says, known or not."""
    generator = torch.Generator().manual_seed(0)
    V = vl.Dense(torch.randn(900, 400, generator=generator))
    for known, route in ((False, "dense Gram"), (True, "ARPACK on K")):
        G = V @ V.T
        if known:
            _ = (G + vl.Identity(900)).inv()
        said = G.explain(k=5).chosen.name
        pairs = G.eigh(k=5)
        assert pairs.route == said == route
        expected = torch.linalg.eigvalsh(V.matrix.double().T @ V.matrix.double())
        assert close(pairs.eigenvalues.double(), expected[-5:], rtol=1e-5)


@pytest.mark.parametrize("samples", [6, 40])
def test_arpack_on_a_known_matrix_takes_no_pass(samples: int) -> None:
    calls: list[int] = []
    G = vl.GGN(risk_of(samples, calls))
    (G + 0.1 * vl.Identity(57)).inv()
    assert calls
    calls.clear()
    route = "ARPACK on K" if samples == 6 else "ARPACK on G"
    evals = G.eigh(k=2, route=route).eigenvalues
    assert close(evals, vl.GGN(risk_of(samples)).eigvalsh()[-2:]) and not calls


@pytest.mark.parametrize("name", NAMES)
def test_explain_names_what_is_taken(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    op = operators(6)[name]
    choice = op.explain(k=2)
    assert str(choice) in capsys.readouterr().out
    assert op.eigh(k=2).route == choice.chosen.name
    assert all(route.name in str(choice) for route in choice.routes)
    (op + 0.1 * vl.Identity(op.shape[0])).inv().explain()
    assert "inv took 'dense G" in capsys.readouterr().out
    assert "matrix is known" in op.explain(k=2).why


def test_whatever_asks_for_the_gram_matrix_keeps_its_columns() -> None:
    """Vectors and solves then need no pass through the net."""
    for ask in (
        lambda G: (G + 0.1 * vl.Identity(57)).inv(),
        lambda G: G.eigh(k=3, route="dense Gram"),
        lambda G: G.gram.matrix,
        lambda G: G.eigvalsh(),
    ):
        calls: list[int] = []
        G = vl.GGN(risk_of(6, calls))
        ask(G)
        assert calls
        calls.clear()
        got = (G + 0.1 * vl.Identity(57)).inv() @ torch.ones(57).double()
        assert not calls and G.factor.stored is not None
        A = G.to_dense() + 0.1 * torch.eye(57).double()
        assert close(A @ got, torch.ones(57).double())


def test_columns_beyond_the_budget_are_not_kept() -> None:
    net = nn.Linear(5, 3).double()
    data = torch.rand(6, 5).double(), torch.randint(3, (6,))
    G = vl.GGN(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), [data], memory=0))
    (G + 0.1 * vl.Identity(18)).inv()
    assert G.factor.stored is None


def test_explain_says_what_products_run_on(capsys: pytest.CaptureFixture[str]) -> None:
    G = vl.GGN(risk_of(6))
    G.explain()
    assert "products run on the linearisation: " in capsys.readouterr().out
    G.factor.keep_columns()
    G.explain()
    assert "products run on stored columns: " in capsys.readouterr().out


def layer(nbytes: float, forward: float, use: str = "linear") -> LayerCost:
    return LayerCost("weight", use, "pairs", forward, 0.0, forward, forward, nbytes)


def test_columns_are_made_where_reading_them_pays() -> None:
    assert plan.columns_pay([layer(1e6, 1e9)], 10, CPU)
    assert not plan.columns_pay([layer(1e8, 1e9)], 10, CPU)
    # A GPU reads more bytes in the time of a forward pass by its rate.
    assert plan.columns_pay([layer(1e8, 1e9)], 10, torch.device("cuda"))


def test_columns_stay_where_they_fit_and_spare_a_linearisation() -> None:
    assert plan.columns_stay([layer(1e6, 1e6)], 10**6, 10**7, CPU)
    assert not plan.columns_stay([layer(1e6, 1e6)], 10**6, 10**5, CPU)
    assert not plan.columns_stay([layer(1e9, 1e6)], 10**9, 10**10, CPU)
    # A convolution's linearisation is traced first.
    assert plan.columns_stay([layer(1e9, 1e6, "conv2d")], 10**9, 10**10, CPU)


@pytest.mark.parametrize("name", NAMES)
def test_damped_and_scaled_operators_take_the_way_of_what_they_are_of(
    name: str,
) -> None:
    op = operators(6)[name]
    chosen, expected = op.explain(k=2).chosen.name, op.eigvalsh()[-2:]
    for outer, truth in (
        (op + 0.5 * vl.Identity(op.shape[0]), expected + 0.5),
        (3 * (op + vl.Identity(op.shape[0])), 3 * expected + 3),
    ):
        pairs = outer.eigh(k=2)
        assert pairs.route == chosen and close(pairs.eigenvalues, truth)
    # The largest of 2 I - A belong to A's zeros.
    with pytest.raises(ValueError, match="2 eigenvalues at this end include 2,"):
        (2 * vl.Identity(op.shape[0]) - op).eigh(k=2)


def test_verbs_as_functions_take_routes() -> None:
    G = vl.GGN(risk_of(4))
    damped, expected = G + 0.1 * vl.Identity(57), torch.linalg.eigvalsh(G.to_dense())
    for route in ROUTES[:2]:
        assert close(vl.linalg.eigvalsh(G, route=route), expected[-8:])
        inverse = vl.linalg.inv(damped, route=route)
        assert close(inverse.to_dense() @ damped.to_dense(), torch.eye(57).double())
    with pytest.raises(ValueError, match="route: found 'quick'"):
        vl.linalg.eigh(G, 3, route="quick")


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("shape", [(57, 12), (57, 200), (10**4, 300), (10**5, 100)])
@pytest.mark.parametrize("forward", [1e4, 1e8, 1e12])
def test_where_calls_alone_decide_costs_do_too(
    shape: tuple[int, int], k: int, forward: float
) -> None:
    assert plan.dense_suffices(shape, k, CPU)
    D, columns = shape
    entries = float(D) * columns
    for nbytes in (0.0, 8 * entries):  # of any structure up to formed columns
        gram = entries * min(shape)
        costs = [replace(layer(nbytes, forward), gram_flops=gram)]
        cost = plan.FactorCost.of_layers(costs, shape, 10, 10**9, 0.0, CPU)
        choice = plan.choose(shape, k, cost, 8, 10**12, columns <= D, CPU)
        assert choice.chosen.name.startswith("dense")


def test_small_problems_count_no_costs_of_layers() -> None:
    G = vl.GGN(risk_of(6))
    assert close(G.eigh(k=3).eigenvalues, vl.GGN(risk_of(6)).eigvalsh()[-3:])
    assert not [key for key in G.risk.kept.everywhere if "layer costs" in key]
    assert G.factor.stored is not None
    shape = 10**6, 9000
    assert not plan.dense_suffices(shape, 10, CPU)
    assert not plan.few_stay(10**8, CPU) and plan.few_stay(10**6, CPU)
