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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("absolute", [False, True])
def test_weights_are_those_of_curve_fit(absolute: bool, reduction: str) -> None:
    sigma = np.linspace(0.05, 0.3, 40)
    model, params, X, y, pcov = fitted(float64, sigma, absolute_sigma=absolute)
    # Three samples more count for nothing, in the degrees of freedom neither.
    w = torch.cat([torch.tensor(sigma) ** -2, torch.zeros(3, dtype=float64)])
    X, y = torch.cat([X, X[:3]]), torch.cat([y, 5.0 + y[:3]])
    loss = vl.losses.Weighted(nn.MSELoss(reduction=reduction))
    batches = [(X[:13], (y[:13], w[:13])), (X[13:], (y[13:], w[13:]))]
    of = vl.EmpiricalRisk(model, loss, batches, params)
    assert close(vl.covariance(of, absolute_sigma=absolute).matrix, pcov, 1e-6)


class OfNodes(nn.Module):
    """Outputs of the nodes of a graph, some graphs together."""

    def __init__(self) -> None:
        super().__init__()
        self.node = nn.Linear(3, 2)

    def forward(self, x: Tensor, owner: Tensor) -> Tensor:
        return self.node(x)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
def test_squares_of_the_items_of_samples(absolute: bool, weighted: bool) -> None:
    net, owner = OfNodes().double(), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    x, y = torch.randn(10, 3, dtype=float64), torch.randn(10, 2, dtype=float64)
    w = torch.rand(10, dtype=float64) + 0.5 if weighted else torch.ones(10).double()

    def take(X: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        nodes = [(X[1] == i).nonzero().flatten() for i in index]
        sizes = torch.tensor([len(each) for each in nodes])
        numbers = torch.arange(len(index)).repeat_interleave(sizes)
        return X[0][torch.cat(nodes)], numbers

    def count(X: tuple[Tensor, Tensor]) -> int:
        return int(X[1].max()) + 1

    plain = nn.MSELoss()
    loss, targets = (vl.losses.Weighted(plain), (y, w)) if weighted else (plain, y)
    data = [((x, owner), targets)]
    of = vl.EmpiricalRisk(net, loss, data, take=take, count=count)
    assert of.num_samples == 4
    with_ones = torch.cat([x, torch.ones(10, 1, dtype=float64)], dim=1)
    J = torch.einsum("nd,ce->nced", with_ones, torch.eye(2, dtype=float64))
    J = torch.cat([J[..., :3].flatten(2), J[..., 3]], dim=2).reshape(20, 8)
    W = w.repeat_interleave(2)
    expected = torch.linalg.inv(J.T @ (W.unsqueeze(1) * J))
    if not absolute:
        residuals = (net.node(x) - y).detach().reshape(-1)
        expected *= (W * residuals.square()).sum() / (20 - 8)
    assert close(vl.covariance(of, absolute_sigma=absolute).matrix, expected, 1e-9)


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


@pytest.mark.parametrize("dtype, rtol", [(float64, 1e-9), (torch.float32, 1e-3)])
def test_units_of_the_parameters(dtype: torch.dtype, rtol: float) -> None:
    """They may be of any sizes beside each other; what the data leave open stays so."""
    x, units = torch.rand(40, 3, dtype=float64), torch.tensor([1.0, 1e9, 1e-9]).double()
    net = nn.Linear(3, 1, bias=False).to(dtype)
    data = ((x * units).to(dtype), torch.rand(40, 1, dtype=dtype))
    cov = vl.covariance(vl.EmpiricalRisk(net, nn.MSELoss(), data), absolute_sigma=True)
    in_units = units.unsqueeze(1) * cov["weight"].double() * units
    assert close(in_units, torch.linalg.inv(x.T @ x), rtol)
    for column in (x[:, 0], torch.zeros(40, dtype=float64)):
        x[:, 2] = column
        data = ((x * units).to(dtype), data[1])
        with pytest.raises(ValueError, match="risk: its data determine 2 of 3"):
            vl.covariance(vl.EmpiricalRisk(net, nn.MSELoss(), data))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_other_likelihoods(reduction: str) -> None:
    """Of a Poisson regression, (Xᵀ diag(λ) X)⁻¹."""
    X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=float64)
    net = nn.Linear(3, 1, bias=False, dtype=float64)
    rates = net(X).detach().exp()
    loss = nn.PoissonNLLLoss(reduction=reduction)
    of = vl.EmpiricalRisk(net, loss, [(X[:20], rates[:20]), (X[20:], rates[20:])])
    assert close(vl.covariance(of).matrix, torch.linalg.inv(X.T @ (rates * X)))


def test_a_mean_over_several_outputs_is_of_the_same_likelihood() -> None:
    """As their sum is: a mean divides by N·C, or by weights of classes."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 3, generator=generator, dtype=float64)
    net = nn.Linear(3, 2, bias=False, dtype=float64)
    y = net(X).detach().exp()
    variances = 0.1 + torch.rand(30, 2, generator=generator, dtype=float64)
    classes = torch.arange(30) % 2
    p = net(X).detach().softmax(1)[:, :1]
    weights = torch.tensor([0.5, 3.0], dtype=float64)
    cases = [
        (nn.PoissonNLLLoss, {}, y, y),
        (nn.GaussianNLLLoss, {}, torch.stack([y, variances], -1), 1 / variances),
        (nn.CrossEntropyLoss, {"weight": weights, "ignore_index": 0}, classes, None),
    ]
    for kind, options, targets, curvature in cases:
        for reduction in ("mean", "sum"):
            loss = kind(reduction=reduction, **options)
            if curvature is None:  # of the first class, by its logit alone
                model = nn.Linear(3, 1, bias=False, dtype=float64)
                model.weight = nn.Parameter(net.weight[:1] - net.weight[1:])
                of = vl.EmpiricalRisk(
                    model,
                    loss,
                    (X, targets),
                    predict=lambda m, x: torch.cat([m(x), torch.zeros(len(x), 1)], 1),
                )
                h = 3.0 * (classes == 1)[:, None] * p * (1 - p)
                expected = X.T @ (h * X)
            else:
                of = vl.EmpiricalRisk(net, loss, (X, targets))
                blocks = [X.T @ (h[:, None] * X) for h in curvature.unbind(1)]
                expected = torch.block_diag(*blocks)
            assert close(vl.covariance(of).matrix, torch.linalg.inv(expected))


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
