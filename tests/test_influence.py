"""Influence against dense matrices, and against training without a sample."""

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk
from tests.pairs import pairwise
from tests.posterior_cases import KINDS, inverse, matrix
from tests.toys import toy

float64 = torch.float64
NAMES = ["mlp_ce_mean", "more_columns_than_parameters", "repeated_samples"]


RTOL = {float64: 1e-10, torch.float32: 1e-3}


@pytest.mark.parametrize(
    ("kind", "name", "dtype"), pairwise(KINDS, NAMES, RTOL), ids=str
)
def test_within_a_risk(kind: str, name: str, dtype: torch.dtype) -> None:
    rtol = RTOL[dtype]
    of, truth = risk(name, dtype), dense(name)
    S, U = inverse(kind, of), vl.PerSampleGradients(of)
    expected = truth.U.T @ matrix(kind, name, risk(name)) @ truth.U
    found = vl.influence(U, S, U)
    assert found.dtype == dtype
    assert close(found, expected, rtol)
    of_itself = vl.self_influence(S, U)
    assert close(of_itself, expected.diagonal(), rtol)
    assert (of_itself >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_across_two_risks(kind: str) -> None:
    net, loss, data = toy(9)
    train = vl.EmpiricalRisk(net, loss, data)
    X = torch.linspace(-2, 2, 20, dtype=float64).view(5, 4).sin()
    test = vl.EmpiricalRisk(net, loss, [(X[:2], data[1][:2]), (X[2:], data[1][2:5])])
    S = inverse(kind, train)
    U, V = vl.PerSampleGradients(test), vl.PerSampleGradients(train)
    gradients = gradients_of(net, loss, train), gradients_of(net, loss, test)
    expected = gradients[1].T @ S.to_dense() @ gradients[0]
    assert close(vl.influence(U, S, V), expected, 1e-10)
    # Of outputs instead of losses.
    J = vl.Jacobian(test)
    expected = J.to_dense() @ S.to_dense() @ gradients[0]
    assert close(vl.influence(J.T, S, V), expected, 1e-10)


def gradients_of(net: nn.Module, loss: nn.Module, of: vl.EmpiricalRisk) -> Tensor:
    columns = []
    for X, y in of.batches():
        for n in range(len(y)):
            value = loss(net(X[n : n + 1]), y[n : n + 1])
            parts = torch.autograd.grad(value, list(net.parameters()))
            columns.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(columns, dim=1)


def trained(X: Tensor, y: Tensor, weights: Tensor, tau: float) -> nn.Module:
    """Logistic regression with weighted samples and a penalty, by Newton's method."""
    net = nn.Linear(X.shape[1], 2, dtype=float64)
    theta = torch.zeros(2 * X.shape[1] + 2, dtype=float64)

    def objective(theta: Tensor) -> Tensor:
        W, b = theta[:-2].view(2, -1), theta[-2:]
        losses = nn.functional.cross_entropy(X @ W.T + b, y, reduction="none")
        return (weights * losses).mean() + tau / 2 * theta @ theta

    for _ in range(8):
        slope = torch.func.grad(objective)(theta)
        theta = theta - torch.linalg.solve(torch.func.hessian(objective)(theta), slope)
    with torch.no_grad():
        net.weight.copy_(theta[:-2].view(2, -1))
        net.bias.copy_(theta[-2:])
    return net


def test_it_is_the_derivative_of_training() -> None:
    """−r u_mᵀ S u_n is how a test loss moves with the weight of a sample."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 3, generator=generator, dtype=float64)
    y = (X[:, 0] + 0.5 * torch.randn(20, generator=generator) > 0).long()
    loss, tau, ones = nn.CrossEntropyLoss(), 0.05, torch.ones(20, dtype=float64)
    net = trained(X, y, ones, tau)
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    U = vl.PerSampleGradients(risk)
    # The GGN of a linear model is its Hessian.
    S = (vl.GGN(risk) + tau * vl.Identity(risk.num_params)).inv()
    influences = vl.influence(U, S, U)
    for n in (0, 7):
        moved = []
        for epsilon in (1e-4, -1e-4):
            weights = ones.clone()
            weights[n] += epsilon
            losses = nn.functional.cross_entropy(
                trained(X, y, weights, tau)(X), y, reduction="none"
            )
            moved.append(losses.detach())
        slope = (moved[0] - moved[1]) / 2e-4
        assert close(slope, -risk.reduction_factor * influences[:, n], 1e-5)


def test_leaving_out_samples() -> None:
    """Self-influence is what leaving out a sample does to its loss, about."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 3, generator=generator, dtype=float64)
    y = (X[:, 0] + 0.5 * torch.randn(20, generator=generator) > 0).long()
    tau, ones = 1.0, torch.ones(20, dtype=float64)
    net = trained(X, y, ones, tau)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    S = (vl.GGN(risk) + tau * vl.Identity(risk.num_params)).inv()
    found = risk.reduction_factor * vl.self_influence(S, vl.PerSampleGradients(risk))
    before = nn.functional.cross_entropy(net(X), y, reduction="none")
    some = found.argsort()[::3]
    rises = []
    for n in some:
        weights = ones.clone()
        weights[n] = 0.0
        without = nn.functional.cross_entropy(
            trained(X, y, weights, tau)(X), y, reduction="none"
        )
        rises.append(without[n] - before[n])
    actual = torch.stack(rises).detach()
    assert torch.corrcoef(torch.stack([found[some], actual]))[0, 1] > 0.99
    assert (found[some] / actual - 1).abs().max() < 0.2


def test_what_is_refused() -> None:
    of = risk("mlp_ce_mean")
    U, S = vl.PerSampleGradients(of), inverse("ggn", of)
    with pytest.raises(TypeError, match="U: an operator"):
        vl.self_influence(S, U.to_dense())
    with pytest.raises(TypeError, match="U_test: an operator"):
        vl.influence(U.to_dense(), S, U)
    with pytest.raises(ValueError, match="U_test: has 3 rows"):
        vl.influence(vl.Dense(torch.rand(3, 2)), S, U)
    with pytest.raises(ValueError, match="S: a self-adjoint operator"):
        vl.influence(U, vl.Identity(3), U)
