"""Damped steps, and the decrease that they predict."""

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk

float64 = torch.float64


def by_definition(A: Tensor, g: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    step = -torch.linalg.solve(A + P, g)
    return step, -(g @ step) - 0.5 * step @ A @ step


@pytest.mark.parametrize("dtype, rtol", [(float64, 1e-7), (torch.float32, 1e-2)])
@pytest.mark.parametrize("name", ["mlp_ce_mean", "more_columns_than_parameters"])
@pytest.mark.parametrize("kind", ["ggn", "hessian", "kfac"])
def test_against_dense(name: str, kind: str, dtype: torch.dtype, rtol: float) -> None:
    of, truth = risk(name, dtype), dense(name)
    make, A = {
        "ggn": (vl.GGN, truth.G),
        "hessian": (vl.Hessian, truth.hessian),
        "kfac": (
            lambda r: vl.KFAC(r, variant="exact"),
            vl.KFAC(risk(name), variant="exact").to_dense(),
        ),
    }[kind]
    delta = 0.3
    if kind == "hessian":  # by iteration, to a residual of the root of eps
        rtol = max(rtol, 1e-5)
    expected = by_definition(A, truth.gradient, delta * torch.eye(truth.D))
    step, predicted = vl.trust_region_step(of, make(of), delta)
    assert step.dtype == dtype
    assert close(step, expected[0], rtol)
    assert close(predicted, expected[1], rtol)
    assert predicted > 0


def test_marquardt_scaling() -> None:
    of, truth = risk("mlp_ce_mean"), dense("mlp_ce_mean")
    entries = truth.G.diagonal() + 0.1
    G = vl.GGN(of)
    step, predicted = vl.trust_region_step(of, G, 0.5 * vl.Diagonal(entries))
    expected = by_definition(truth.G, truth.gradient, 0.5 * torch.diag(entries))
    assert close(step, expected[0], 1e-9)
    assert close(predicted, expected[1], 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_quadratic_falls_as_predicted(reduction: str) -> None:
    X, y = torch.rand(9, 3, dtype=float64), torch.rand(9, 2, dtype=float64)
    net = nn.Linear(3, 2, dtype=float64)
    of = vl.EmpiricalRisk(net, nn.MSELoss(reduction=reduction), (X, y))
    for delta in (1e-3, 1.0):
        step, predicted = vl.trust_region_step(of, vl.GGN(of), delta)
        after = of.at(of.flatten(of.params) + step)
        assert close(of.value() - after.value(), predicted, 1e-10)


def test_at_a_minimum() -> None:
    X = torch.rand(9, 3, dtype=float64)
    net = nn.Linear(3, 1, dtype=float64)
    of = vl.EmpiricalRisk(net, nn.MSELoss(), (X, net(X).detach()))
    step, predicted = vl.trust_region_step(of, vl.GGN(of), 0.1)
    assert torch.equal(step, torch.zeros_like(step))
    assert predicted == 0.0


def test_what_is_refused() -> None:
    of, truth = risk("mlp_ce_mean"), dense("mlp_ce_mean")
    H = vl.Hessian(of)
    lowest = torch.linalg.eigvalsh(truth.hessian)[0].item()
    assert lowest < 0.0
    concave = vl.Dense(-truth.G)
    with pytest.raises(ValueError, match="damping: the step has the slope"):
        vl.trust_region_step(of, concave, 1e-6)
    for damping in (-1e-3, -1, torch.tensor(-2.0)):  # longer than the Newton step
        with pytest.raises(ValueError, match="damping: at least 0"):
            vl.trust_region_step(of, vl.GGN(of), damping)
    with pytest.raises(ValueError, match="A: a self-adjoint operator of shape"):
        vl.trust_region_step(of, vl.Identity(3), 0.1)
    with pytest.raises(ValueError, match="damping: a self-adjoint operator"):
        vl.trust_region_step(of, H, vl.Identity(3))
    with pytest.raises(TypeError, match="A: must be self-adjoint"):
        unsymmetric = vl.Dense(torch.randn(truth.D, truth.D, dtype=float64))
        vl.trust_region_step(of, unsymmetric, 0.1)
    with pytest.raises(TypeError, match="risk: an EmpiricalRisk"):
        vl.trust_region_step(H, H, 0.1)
