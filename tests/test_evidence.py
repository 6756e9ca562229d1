"""The Laplace evidence, its gradients in the prior, and posterior precisions."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk
from tests.pairs import pairwise

float64 = torch.float64
NAMES = ["mlp_ce_mean", "mlp_mse_sum", "more_columns_than_parameters"]

Curvature = Callable[[vl.EmpiricalRisk], vl.TorchLinearOperator]
CURVATURES: dict[str, Curvature] = {
    "ggn": vl.GGN,
    "fisher": vl.EmpiricalFisher,
    "kfac": lambda of: vl.KFAC(of, variant="exact"),
    "ekfac": lambda of: vl.EKFAC(of, variant="exact"),
    "diagonal": lambda of: vl.Diagonal(vl.GGN(of).diagonal()),
    "blocks": lambda of: vl.GGN(of).block_diagonal("parameter"),
    "modules": lambda of: vl.GGN(of).block_diagonal("module"),
    "dense": lambda of: vl.Dense(vl.GGN(of).to_dense()),
}


def truth(name: str, A: Tensor, entries: Tensor) -> Tensor:
    """By its definition, with dense matrices."""
    of, D = dense(name), len(A)
    theta = risk(name).flatten(risk(name).params).detach()
    P = torch.diag(entries.expand(D))
    fit = -of.value / of.r - 0.5 * theta @ P @ theta
    return fit + 0.5 * (torch.logdet(P) - torch.logdet(A / of.r + P))


def per_entry(name: str, kind: str) -> tuple[Tensor, Tensor]:
    """A precision of a kind that requires grad, and its entries."""
    of = risk(name)
    generator = torch.Generator().manual_seed(0)
    count = {"scalar": (), "parameter": (len(of.sizes),), "entry": (of.num_params,)}
    precision = 0.5 + torch.rand(count[kind], generator=generator, dtype=float64)
    precision.requires_grad_()
    if kind != "parameter":
        return precision, precision
    return precision, precision.repeat_interleave(torch.tensor(of.sizes))


KINDS = ["scalar", "parameter", "entry"]


@pytest.mark.parametrize(
    ("curvature", "kind", "name"), pairwise(CURVATURES, KINDS, NAMES)
)
def test_value_and_gradient(curvature: str, kind: str, name: str) -> None:
    A = CURVATURES[curvature](risk(name))
    precision, entries = per_entry(name, kind)
    value = vl.log_marginal_likelihood(risk(name), A, precision)
    expected = truth(name, A.to_dense(), entries)
    assert close(value, expected, 1e-11)
    (slope,) = torch.autograd.grad(value, precision)
    (expected_slope,) = torch.autograd.grad(expected, precision)
    assert close(slope, expected_slope, 1e-9)


@pytest.mark.parametrize("kind", ["scalar", "parameter"])
@pytest.mark.parametrize("curvature", ["ggn", "kfac", "diagonal"])
def test_float32(curvature: str, kind: str) -> None:
    of = risk("mlp_ce_mean", torch.float32)
    A = CURVATURES[curvature](of)
    precision, entries = per_entry("mlp_ce_mean", kind)
    single = precision.detach().float().requires_grad_()
    value = vl.log_marginal_likelihood(of, A, single)
    exact = CURVATURES[curvature](risk("mlp_ce_mean")).to_dense()
    expected = truth("mlp_ce_mean", exact, entries)
    assert value.dtype == torch.float32
    assert close(value, expected, 1e-5)
    (slope,) = torch.autograd.grad(value, single)
    (expected_slope,) = torch.autograd.grad(expected, precision)
    assert slope.dtype == torch.float32
    assert close(slope, expected_slope, 1e-4)


def test_precisions_by_name_and_as_numbers() -> None:
    of = risk("mlp_ce_mean")
    K = vl.KFAC(of, variant="exact")
    values = torch.linspace(0.5, 2.0, len(of.sizes), dtype=float64)
    by_order = vl.log_marginal_likelihood(of, K, values)
    by_name = dict(zip(of.params, values.tolist(), strict=True))
    assert close(vl.log_marginal_likelihood(of, K, by_name), by_order, 1e-14)
    all_equal = dict.fromkeys(of.params, 0.3)
    number = vl.log_marginal_likelihood(of, K, 0.3)
    assert close(vl.log_marginal_likelihood(of, K, all_equal), number, 1e-12)


@pytest.mark.parametrize("names", [["0.weight"], None])
def test_by_name_there_is_one_number_each(names: list[str] | None) -> None:
    """Of a single parameter some other numbers would be repeated without a word."""
    of = risk("mlp_ce_mean")
    of = of if names is None else of.over(names)
    G, all_equal = vl.GGN(of), vl.log_marginal_likelihood(of, vl.GGN(of), 2.0)
    for shape in ((), (1,), (1, 1)):
        named = {name: torch.full(shape, 2.0, dtype=float64) for name in of.params}
        assert close(vl.log_marginal_likelihood(of, G, named), all_equal, 1e-12)
    first, *others = of.params
    for numbers in (torch.ones(2), torch.ones(0), torch.ones_like(of.params[first])):
        given = {first: numbers, **dict.fromkeys(others, 1.0)}
        with pytest.raises(ValueError, match=r"^prior_precision: one number for each"):
            vl.posterior_precision(of, G, given)


FORMS = {
    "a list": lambda n: [2.0] * n,
    "an array": lambda n: np.full(n, 2.0),
    "NumPy's number": lambda n: np.float32(2.0),
    "an array without axes": lambda n: np.array(2.0),
    "an integer": lambda n: torch.tensor(2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_parameter", [False, True])
def test_a_prior_in_any_form_is_where_an_optimum_is_looked_for_from(
    form: str, per_parameter: bool
) -> None:
    of = risk("mlp_mse_sum")
    expected = vl.Laplace(of, 2.0).optimize_prior(per_parameter)
    given = FORMS[form](len(of.params))
    found = vl.Laplace(of, given).optimize_prior(per_parameter)
    assert close(found, expected, 1e-12)


def test_evidence_of_a_linear_model_is_exact() -> None:
    """Gaussian data with variance 1/2: the marginal of y is a Gaussian, too."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(7, 3, generator=generator, dtype=float64)
    y = torch.randn(7, 1, generator=generator, dtype=float64)
    delta, net = 1.7, nn.Linear(3, 1, bias=False, dtype=float64)
    minimum = torch.linalg.solve(2 * X.T @ X + delta * torch.eye(3), 2 * X.T @ y)
    with torch.no_grad():
        net.weight.copy_(minimum.T)
    of = vl.EmpiricalRisk(net, nn.MSELoss(), (X, y))
    value = vl.log_marginal_likelihood(of, vl.GGN(of), delta)
    covariance = 0.5 * torch.eye(7, dtype=float64) + X @ X.T / delta
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(7, dtype=float64), covariance
    ).log_prob(y.squeeze(1))
    constant = 7 / 2 * torch.log(torch.tensor(torch.pi, dtype=float64))
    assert close(value - constant, marginal, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_precision(kind: str) -> None:
    of, r = risk("mlp_ce_mean"), dense("mlp_ce_mean").r
    precision, entries = per_entry("mlp_ce_mean", kind)
    for name in ("ggn", "kfac", "diagonal"):
        A = CURVATURES[name](of)
        P = vl.posterior_precision(of, A, precision.detach())
        expected = A.to_dense() / r + torch.diag(entries.detach().expand(of.num_params))
        assert close(P.to_dense(), expected)
        assert close(P.inv().to_dense(), torch.linalg.inv(expected), 1e-9)


def test_what_is_refused() -> None:
    of = risk("mlp_ce_mean")
    G, D = vl.GGN(of), of.num_params
    for bad in (0.0, -1.0, float("nan"), torch.zeros(D)):
        with pytest.raises(ValueError, match="prior_precision: must be positive"):
            vl.log_marginal_likelihood(of, G, bad)
    with pytest.raises(ValueError, match=rf"prior_precision: .*\[{D}\]"):
        vl.log_marginal_likelihood(of, G, torch.ones(D + 1))
    with pytest.raises(ValueError, match="prior_precision: names"):
        vl.log_marginal_likelihood(of, G, {"foreign": 1.0})
    with pytest.raises(ValueError, match="curvature: a self-adjoint operator of shape"):
        vl.log_marginal_likelihood(of, vl.Identity(D + 1), 1.0)
    # The determinant of what is no curvature is a number, too.
    upper = vl.Dense(torch.ones(D, D, dtype=float64).triu())
    for function in (vl.log_marginal_likelihood, vl.posterior_precision):
        with pytest.raises(TypeError, match="curvature: must be self-adjoint"):
            function(of, upper, 1.0)
    with pytest.raises(TypeError, match="risk: an EmpiricalRisk"):
        vl.log_marginal_likelihood(G, G, 1.0)
    # Of more rows than a matrix is formed of.
    net, data = nn.Linear(2000, 1), (torch.rand(2, 2000), torch.rand(2, 1))
    large = vl.EmpiricalRisk(net, nn.MSELoss(), data)
    with pytest.raises(TypeError, match="prior_precision: no closed-form"):
        entries = torch.linspace(1, 2, large.num_params)
        vl.log_marginal_likelihood(large, vl.Hessian(large) + vl.GGN(large), entries)


def test_curvatures_without_a_closed_form() -> None:
    of = risk("mlp_ce_mean")
    A = vl.Hessian(of) + vl.GGN(of)
    entries = torch.linspace(5, 6, of.num_params, dtype=float64)
    expected = truth("mlp_ce_mean", A.to_dense(), entries)
    found = vl.log_marginal_likelihood(of, A, entries)
    assert abs(found - expected) <= 1e-9 * abs(expected)
    with pytest.raises(ValueError, match="there is no posterior"):
        vl.log_marginal_likelihood(of, A, 0.01 * entries)


def of_weight_and_bias(of: vl.EmpiricalRisk) -> vl.TorchLinearOperator:
    A = vl.GGN(of).to_dense()
    return vl.BlockDiagonal([vl.Dense(A[:6, :6]), vl.Dense(A[6:, 6:])])


INDEFINITE: dict[str, Curvature] = {
    "ggn": vl.GGN,
    "blocks": of_weight_and_bias,
    "dense": lambda of: vl.Dense(vl.GGN(of).to_dense()),
    "diagonal": lambda of: vl.Diagonal(vl.GGN(of).diagonal()),
    "multiple": lambda of: -1.0 * vl.KFAC(of, variant="empirical"),
}


@pytest.mark.parametrize("kind", INDEFINITE)
@pytest.mark.parametrize("negative", [0, 1, 2])
def test_without_a_posterior_there_is_no_evidence(kind: str, negative: int) -> None:
    """Of a loss that is not convex; with two negative eigenvalues det > 0 again."""
    net = nn.Linear(3, 2).double()
    X = torch.randn(10, 3).double()
    y = net(X).detach() + 0.3 * torch.randn(10, 2).double()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).mul(3).cos().sum()

    of = vl.EmpiricalRisk(net, loss, (X, y), reduction="sum")
    A = INDEFINITE[kind](of)
    dense_A = A.to_dense()
    evals = torch.linalg.eigvalsh(dense_A)
    assert evals[1] < 0.0
    tau = (
        1.0 - evals[0] if negative == 0 else -evals[negative - 1 : negative + 1].mean()
    )
    P = dense_A + tau * torch.eye(8, dtype=float64)
    if negative == 0:
        theta = of.flatten(of.params)
        expected = -of.value() - 0.5 * tau * theta @ theta + 4 * tau.log()
        value = vl.log_marginal_likelihood(of, A, tau)
        assert close(value, expected - 0.5 * torch.logdet(P))
        return
    with pytest.raises(ValueError, match=r"curvature: there is no posterior, .* -"):
        vl.log_marginal_likelihood(of, A, tau)
    if kind == "diagonal":
        for precision in (tau, tau.expand(8)):
            with pytest.raises(ValueError, match="curvature: there is no posterior"):
                vl.posterior_precision(of, A, precision)
            with pytest.raises(ValueError, match="curvature: there is no posterior"):
                vl.log_marginal_likelihood(of, A, precision)


@pytest.mark.parametrize("precision", [0.5, "entries"])
@pytest.mark.parametrize("down", [[0], [0, 3], [2, 5, 6]])
def test_a_diagonal_may_take_a_curvature_below_zero(down: list[int], precision) -> None:
    """Of two negative eigenvalues the determinant is positive."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    data = torch.randn(40, 3).double(), torch.randn(40, 1).double()
    r = vl.EmpiricalRisk(net, nn.MSELoss(reduction="sum"), data)
    entries, G = torch.full((r.num_params,), 0.25, dtype=float64), vl.GGN(r)
    assert not G.by_gram
    P = 2 * entries if precision == "entries" else precision
    value = vl.log_marginal_likelihood(r, G + vl.Diagonal(entries), P)
    log_det = torch.logdet(G.to_dense() + torch.eye(r.num_params).double() * 0.75)
    theta = r.flatten(r.params)
    prior = r.num_params * math.log(0.5) - 0.5 * theta @ theta
    assert close(value, -r.value() + 0.5 * (prior - log_det))
    entries[down] = -1e4
    with pytest.raises(ValueError, match="curvature: there is no posterior"):
        vl.log_marginal_likelihood(r, G + vl.Diagonal(entries), P)


def test_an_evidence_without_a_maximum_is_not_looked_for() -> None:
    """It rises without bounds where the prior meets a negative eigenvalue."""
    X, net = torch.randn(10, 3).double(), nn.Linear(3, 1).double()
    y = net(X).detach() + 0.3 * torch.randn(10, 1).double()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).mul(3).cos().sum()

    of = vl.EmpiricalRisk(net, loss, (X, y), reduction="sum")
    for structure in ("full", "diag"):
        with pytest.raises(ValueError, match="positive_part=True"):
            vl.Laplace(of, 1.0, structure).optimize_prior()
    positive = vl.GGN(of, positive_part=True)
    value = vl.log_marginal_likelihood(of, positive, 1.0)
    theta = of.flatten(of.params)
    P = positive.to_dense() + torch.eye(4, dtype=float64)
    expected = -of.value() - 0.5 * theta @ theta - 0.5 * torch.logdet(P)
    assert close(value, expected)


def test_numbers_for_parameters_or_for_entries() -> None:
    """With an empty parameter there may be as many of the ones as of the others."""
    net = nn.Linear(3, 1).double()  # D = 4
    net.empty, net.none = (nn.Parameter(torch.zeros(0).double()) for _ in range(2))
    data = torch.rand(5, 3).double(), torch.rand(5, 1).double()
    r = vl.EmpiricalRisk(net, nn.MSELoss(), data)
    G, numbers = vl.GGN(r), torch.tensor([0.5, 2.0, 1.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"prior_precision: \[4\] may be .* a mapping"):
        vl.log_marginal_likelihood(r, G, numbers)
    named = dict(zip(r.params, numbers, strict=True))
    plain = nn.Linear(3, 1).double()
    plain.load_state_dict({n: net.state_dict()[n] for n in ("weight", "bias")})
    other = vl.EmpiricalRisk(plain, nn.MSELoss(), data)
    assert close(
        vl.log_marginal_likelihood(r, G, named),
        vl.log_marginal_likelihood(other, vl.GGN(other), numbers[:2]),
    )
    single = vl.EmpiricalRisk(nn.Linear(1, 1).double(), nn.MSELoss(), (data[1],) * 2)
    value = vl.log_marginal_likelihood(single, vl.GGN(single), numbers[:2])
    assert value.isfinite()


@pytest.mark.parametrize(
    ("loss", "share"),
    [
        (nn.CrossEntropyLoss(torch.tensor([2.0, 2.0]).double()), 0.5),
        (nn.CrossEntropyLoss(ignore_index=1), 2.0),
        (nn.BCEWithLogitsLoss(), 0.5),
        (nn.CrossEntropyLoss(), 1.0),
        (nn.CrossEntropyLoss(reduction="sum"), 1.0),
        (nn.MSELoss(), 1.0),
    ],
)
def test_a_mean_over_something_else_than_samples_is_told(
    loss: nn.Module, share: float
) -> None:
    net = nn.Linear(3, 2, dtype=float64)
    X, y = torch.rand(8, 3, dtype=float64), torch.arange(8) % 2
    target = y if isinstance(loss, nn.CrossEntropyLoss) else torch.eye(2)[y].double()
    risks = [vl.EmpiricalRisk(net, loss, (X, target)) for _ in range(3)]
    asked: list[Callable[[vl.EmpiricalRisk], object]] = [
        lambda of: vl.Laplace(of).optimize_prior(),
        lambda of: vl.log_marginal_likelihood(of, vl.GGN(of), 1.0),
        lambda of: vl.posterior_precision(of, vl.GGN(of), 1.0),
    ]
    for ask, of in zip(asked, risks, strict=True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ask(of)
        found = [str(each.message) for each in told]
        assert len(found) == (share != 1.0)
        assert all(f"L/r is {share:.3g} times" in each for each in found)
