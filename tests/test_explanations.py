"""``explain()``: of every operator, and what it says is what is done."""

import pytest
import torch
from torch import nn

import vivit_linop as vl
from tests import placing
from tests.operator_market import MARKET, build
from vivit_linop.linalg import IterativeInverse
from vivit_linop.operators import rules

FLOAT64 = torch.float64
D = 8 * 9 + 9 * 3 + 12  # of the net below: more rows than a solver takes products


def risk_of(samples: int = 12) -> vl.EmpiricalRisk:
    torch.manual_seed(0)
    X, y = torch.rand(samples, 8).double(), torch.randint(3, (samples,))
    net = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))


def prior() -> vl.Diagonal:
    return vl.Diagonal(torch.linspace(1, 2, D, dtype=FLOAT64))


@pytest.mark.parametrize("name", MARKET)
def test_every_operator(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    op, _ = build(name, FLOAT64, "cpu")
    said = op.explain()
    printed = capsys.readouterr().out
    assert said is not None and str(said).split("\n")[0] in printed


def test_iterations_are_those_that_run() -> None:
    of = risk_of()
    H, G = vl.Hessian(of), vl.GGN(of)
    for op in (H, H + G, prior() + H):
        way = op.explain(k=2).ways["eigh(k=2)"]
        assert way == f"{op.eigh(k=2).route}, some 44 products: no closed form"
    shifted = (2 * H + vl.Identity(D)).explain(k=2)
    assert "shifted" in shifted.ways["eigh(k=2)"]
    assert placing.krylov("Hessian") in shifted.parts[0].parts[0].ways["eigh(k=2)"]
    assert "conjugate gradients" in H.explain().ways["solve"]
    assert isinstance(vl.operators.verbs.solver(H), IterativeInverse)
    few = vl.Hessian(risk_of().over(["2.bias"]))
    assert "few rows" in few.explain().ways["eigh(k)"]


def test_inverses_of_low_rank_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """The side that is smaller, and whether it is decomposed already."""
    for samples, side in ((12, "24 x 24 Gram matrix"), (90, f"{D} x {D} V Vᵀ")):
        G = vl.GGN(risk_of(samples))
        A = G + 0.1 * vl.Identity(D)
        assert f"{side} factorised" in A.explain().ways["solve"]
        G.eigh()
        assert f"{side} decomposed" in A.explain().ways["solve"]
        by_entry = (G + prior()).explain()
        assert "P^-½ V" in by_entry.ways["solve"] and side in by_entry.ways["solve"]
    capsys.readouterr()
    A.inv().explain()
    assert "inv took 'dense G'" in capsys.readouterr().out


def test_sandwiches_say_which_gram_matrices() -> None:
    of, test = risk_of(), risk_of(5)
    G, J, U = vl.GGN(of), vl.Jacobian(test), vl.PerSampleGradients(of)
    S = (G + 0.1 * vl.Identity(D)).inv()
    ways = (J @ S @ J.T).explain().ways
    assert "24 x 15" in ways["to_dense"] and f"nothing has {D} rows" in ways["to_dense"]
    assert "digits" not in ways
    V = G.factor
    assert "VᵀV" in (V.T @ S @ U).explain().ways["to_dense"]
    assert "weights" in (U.T @ prior() @ U).explain().ways["to_dense"]
    close_by = (G + 1e-12 * vl.Identity(D)).inv()
    assert "λ_max/δ" in (U.T @ close_by @ U).explain().ways["digits"]


def test_sums_of_factors_say_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = vl.GGN(risk_of()), vl.GGN(risk_of(5))
    first.gram.matrix  # noqa: B018
    (first + second).explain(k=2)
    printed = capsys.readouterr().out
    assert "V is stacked of 2 parts" in printed and "1 of 2 on the diagonal" in printed


def test_gram_operators_say_whether_their_matrix_is_known() -> None:
    K = vl.GGN(risk_of()).gram
    assert "not known yet" in K.explain().ways["products"]
    K.to_dense()
    assert "which is known" in K.explain().ways["products"]


def test_blocks_and_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    K = vl.KFAC(risk_of())
    said = K.explain()
    assert "2 of type Kronecker" in said.ways["all"]
    assert {type(part).__name__ for part in said.parts} == {"Explanation"}
    assert any("9 x 9, 8 x 8" in part.ways["all"] for part in said.parts)
    assert "of type Dense" in (K + prior()).explain().ways["all"]
    monkeypatch.setattr(rules, "DENSE_ROWS", 0)
    sums = [part for part in (K + prior()).explain().parts if "solve" in part.ways]
    assert any("preconditions" in part.ways["solve"] for part in sums)


def test_products_are_explained_without_being_computed() -> None:
    of = risk_of()
    J, H = vl.Jacobian(of), vl.Hessian(of)
    short = vl.Dense(torch.rand(3, D, dtype=FLOAT64))
    assert "3 x 3" in (short @ H @ short.T).explain().ways["all else"]
    assert (
        "√B" in (J.T @ vl.Dense(torch.eye(36).double()) @ J).explain().ways["all else"]
    )


def test_inverses_by_iteration_say_what_preconditions_them() -> None:
    A, M = vl.Hessian(risk_of()) + vl.Identity(D), prior()
    said = IterativeInverse(A, 1e-5, M).explain().ways["products"]
    assert "1.0e-05" in said and "Diagonal" in said
    unsymmetric = vl.Dense(torch.eye(D).double().roll(1, 0)) @ vl.Hessian(risk_of())
    assert "GMRES" in IterativeInverse(unsymmetric).explain().ways["products"]
