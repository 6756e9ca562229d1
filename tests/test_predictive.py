"""Covariances of predictions against dense ones, within one risk and across two."""

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk
from tests.pairs import pairwise
from tests.posterior_cases import KINDS, inverse, matrix
from tests.refusals import refuse_products
from tests.toys import toy

float64 = torch.float64
NAMES = ["mlp_ce_mean", "more_columns_than_parameters", "repeated_samples", "cnn"]
RTOL = {float64: 1e-10, torch.float32: 1e-3}


def by_definition(J: Tensor, S: Tensor, C: int) -> Tensor:
    blocks = J.reshape(-1, C, J.shape[1])
    return blocks @ S @ blocks.mT


@pytest.mark.parametrize(
    ("name", "kind", "dtype"), pairwise(NAMES, KINDS, RTOL), ids=str
)
def test_of_training_samples(name: str, kind: str, dtype: torch.dtype) -> None:
    rtol = RTOL[dtype]
    of, truth = risk(name, dtype), dense(name)
    S = inverse(kind, of)
    found = vl.predictive_covariance(vl.Jacobian(of), S)
    expected = by_definition(truth.J, matrix(kind, name, risk(name)), truth.C)
    assert found.dtype == dtype
    assert close(found, expected, rtol)
    variances = vl.predictive_covariance(vl.Jacobian(of), S, diagonal=True)
    assert close(variances, expected.diagonal(dim1=1, dim2=2), rtol)
    assert (variances >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_of_test_samples(kind: str) -> None:
    """Across two risks, and from inputs alone."""
    net, loss, data = toy(9)
    train = vl.EmpiricalRisk(net, loss, data)
    S = inverse(kind, train)
    X = torch.linspace(-2, 2, 20, dtype=float64).view(5, 4).sin()
    J = vl.Jacobian(net, [X[:2], X[2:]])
    rows = torch.func.jacrev(
        lambda theta: torch.func.functional_call(
            net, dict(zip(train.params, train.unflatten(theta), strict=True)), (X,)
        )
    )(train.flatten(train.params))
    expected = by_definition(rows.reshape(15, -1), S.to_dense(), 3)
    assert close(vl.predictive_covariance(J, S), expected, 1e-10)
    variances = vl.predictive_covariance(J, S, diagonal=True)
    assert close(variances, expected.diagonal(dim1=1, dim2=2), 1e-10)


@pytest.mark.parametrize("kind", ["ggn", "scaled", "identity", "kfac", "diagonal"])
def test_without_a_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the columns of each sample alone: J is multiplied with nothing."""
    of, truth = risk("cnn"), dense("cnn")
    S = inverse(kind, of)
    expected = by_definition(truth.J, matrix(kind, "cnn", of), truth.C)

    J = vl.Jacobian(of)
    refuse_products(monkeypatch, vl.Jacobian)
    assert close(vl.predictive_covariance(J, S), expected, 1e-10)
    J.pullback.gram.to_dense()  # also where it is known
    assert close(vl.predictive_covariance(J, S), expected, 1e-10)


def test_bayesian_linear_regression() -> None:
    """For a linear model it is the posterior predictive in closed form."""
    generator = torch.Generator().manual_seed(0)
    X, X_test = torch.randn(2, 12, 3, generator=generator, dtype=float64)
    net = nn.Linear(3, 1, bias=False, dtype=float64)
    of = vl.EmpiricalRisk(net, nn.MSELoss(), (X, X.sum(1, keepdim=True)))
    S = vl.posterior_precision(of, vl.GGN(of), 0.7).inv()
    precision = 2 * X.T @ X + 0.7 * torch.eye(3, dtype=float64)  # a variance of 1/2
    expected = (X_test * torch.linalg.solve(precision, X_test.T).T).sum(1)
    found = vl.predictive_covariance(vl.Jacobian(net, X_test), S)
    assert close(found.flatten(), expected)


@pytest.mark.parametrize("damping", ["a number", "entries", "of a matrix"])
def test_variances_of_more_outputs_than_parameters(damping: str) -> None:
    """Columns of S are far larger than what J leaves of them, and so is rounding."""
    torch.manual_seed(1)
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)
    net, X = nn.Sequential(*layers).double(), 2 * torch.rand(300, 4).double() - 1
    data, loss = (X, torch.rand(300, 2).double()), nn.MSELoss(reduction="sum")
    exact = vl.EmpiricalRisk(net, loss, data)
    J, U = vl.Jacobian(exact).to_dense(), vl.PerSampleGradients(exact).to_dense()
    D = exact.num_params
    P = torch.full((D,), 1e-3, dtype=float64)
    if damping == "entries":
        P[::2] *= 3
    precision = 2 * J.T @ J + P.diag()
    variances = (J * torch.linalg.solve(precision, J.T).T).sum(1).reshape(300, 2)
    influences = (U * torch.linalg.solve(precision, U)).sum(0)

    of = vl.EmpiricalRisk(net.float(), loss, tuple(part.float() for part in data))
    G = vl.GGN(of)
    assert not G.by_gram
    S: vl.TorchLinearOperator = {
        "a number": G + 1e-3 * vl.Identity(D),
        "entries": G + vl.Diagonal(P.float()),
        "of a matrix": vl.Dense(G.to_dense()) + 1e-3 * vl.Identity(D),
    }[damping].inv()
    units = vl.PerSampleGradients(of)
    for found, expected in [
        (vl.predictive_covariance(vl.Jacobian(of), S, diagonal=True), variances),
        (vl.self_influence(S, units), influences),
        (vl.self_influence(S, vl.Dense(units.to_dense())), influences),
    ]:
        assert ((found.double() - expected) / expected).abs().max() < 1e-2
    trace = (units.T @ S @ units).trace()
    assert close(trace.double(), influences.sum(), 1e-3)


def test_what_is_refused() -> None:
    of = risk("mlp_ce_mean")
    J, S = vl.Jacobian(of), inverse("ggn", of)
    with pytest.raises(TypeError, match=r"J_test: a vl\.Jacobian"):
        vl.predictive_covariance(J.to_dense(), S)
    with pytest.raises(ValueError, match="S: a self-adjoint operator of shape"):
        vl.predictive_covariance(J, vl.Identity(3))
    with pytest.raises(ValueError, match="S: a self-adjoint operator of shape"):
        vl.predictive_covariance(J, S.to_dense())
    unsymmetric = vl.Dense(torch.randn(of.num_params, of.num_params, dtype=float64))
    with pytest.raises(TypeError, match="S: must be self-adjoint"):
        vl.predictive_covariance(J, unsymmetric)
