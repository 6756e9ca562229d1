"""``vl.covariance`` against SciPy's ``curve_fit`` and dense inverses."""

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk

float64 = torch.float64


def fitted(dtype: torch.dtype, sigma: np.ndarray | None = None, **keywords):
    """A decaying wave, its fit by SciPy and a function of the same parameters."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 3, 40)
    y = 2.0 * np.exp(-0.7 * x) * np.cos(3 * x) + 0.1 * rng.standard_normal(40)

    def f(x, a, b, c):
        return a * np.exp(-b * x) * np.cos(c * x)

    best, pcov = curve_fit(
        f, x, y, p0=[1.5, 1.0, 2.8], sigma=sigma, ftol=1e-14, xtol=1e-14, **keywords
    )
    params = {
        "amplitude": torch.tensor(best[0], dtype=dtype),
        "rates": torch.tensor(best[1:], dtype=dtype),
    }

    def model(p: dict[str, Tensor], X: Tensor) -> Tensor:
        wave = torch.cos(p["rates"][1] * X)
        return p["amplitude"] * torch.exp(-p["rates"][0] * X) * wave

    X, targets = (torch.tensor(v, dtype=dtype).unsqueeze(1) for v in (x, y))
    return model, params, X, targets, torch.tensor(pcov)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype, rtol", [(float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("absolute", [False, True])
def test_it_is_that_of_curve_fit(
    absolute: bool, dtype: torch.dtype, rtol: float, reduction: str
) -> None:
    ones = np.ones(40) if absolute else None
    model, params, X, y, pcov = fitted(dtype, ones, absolute_sigma=absolute)
    batches = [(X[:13], y[:13]), (X[13:], y[13:])]
    of = vl.EmpiricalRisk(model, nn.MSELoss(reduction=reduction), batches, params)
    cov = vl.covariance(of, absolute_sigma=absolute)
    assert cov.matrix.dtype == dtype
    assert close(cov.matrix, pcov, rtol)
    assert torch.equal(cov["rates"], cov.matrix[1:, 1:])
    assert torch.equal(cov["amplitude", "rates"], cov.matrix[:1, 1:])
    errors = cov.standard_errors()
    assert errors["amplitude"].shape == ()
    assert close(errors["rates"], pcov.diagonal()[1:].sqrt(), rtol)


def test_known_variances_are_a_gaussian_likelihood() -> None:
    sigma = np.linspace(0.05, 0.3, 40)
    model, params, X, y, pcov = fitted(float64, sigma, absolute_sigma=True)
    variances = torch.tensor(sigma).unsqueeze(1).square()
    targets = torch.stack([y, variances], dim=-1)
    of = vl.EmpiricalRisk(model, nn.GaussianNLLLoss(), (X, targets), params)
    assert close(vl.covariance(of).matrix, pcov, 1e-6)


def test_ill_conditioned_data() -> None:
    """The condition number is not squared: JᵀJ would lose 13 digits here."""
    x = torch.linspace(0, 1, 60, dtype=float64).unsqueeze(1)
    X = torch.cat([x**k for k in range(10)], dim=1)
    assert torch.linalg.cond(X) > 1e6
    of = vl.EmpiricalRisk(
        nn.Linear(10, 1, bias=False, dtype=float64), nn.MSELoss(), (X, x)
    )
    found = vl.covariance(of, absolute_sigma=True)["weight"]
    _, s, Vt = torch.linalg.svd(X, full_matrices=False)
    assert close(found, (Vt.T / s.square()) @ Vt, 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_other_likelihoods(reduction: str) -> None:
    """Of a Poisson regression, (Xᵀ diag(λ) X)⁻¹."""
    X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=float64)
    net = nn.Linear(3, 1, bias=False, dtype=float64)
    rates = net(X).detach().exp()
    loss = nn.PoissonNLLLoss(reduction=reduction)
    of = vl.EmpiricalRisk(net, loss, [(X[:20], rates[:20]), (X[20:], rates[20:])])
    assert close(vl.covariance(of).matrix, torch.linalg.inv(X.T @ (rates * X)))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"risk: its data determine \d+ of \d+"):
        vl.covariance(risk("mlp_ce_mean"))  # N R < D
    with pytest.raises(ValueError, match="risk: its data determine 6 of 9"):
        vl.covariance(risk("more_columns_than_parameters"))  # softmax does not see 3
    assert dense("more_columns_than_parameters").D == 9
    X, y = torch.rand(4, 3, dtype=float64), torch.rand(4, 1, dtype=float64)
    exact = vl.EmpiricalRisk(nn.Linear(3, 1, dtype=float64), nn.MSELoss(), (X, y))
    with pytest.raises(ValueError, match="risk: 4 residuals leave nothing"):
        vl.covariance(exact)
    cov = vl.covariance(exact, absolute_sigma=True)
    with pytest.raises(KeyError, match="'foreign' is not a parameter"):
        cov["weight", "foreign"]
    with pytest.raises(ValueError, match="absolute_sigma: is for"):
        vl.covariance(risk("mlp_ce_mean"), absolute_sigma=True)
    with pytest.raises(TypeError, match="risk: an EmpiricalRisk"):
        vl.covariance(vl.Identity(3))
