"""The Laplace approximation, and risks over some parameters, against dense matrices."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl

D64 = torch.float64
STRUCTURES = ["full", "kfac", "ekfac", "diag", "last_layer"]


def problem(reduction: str = "mean", samples: int = 30) -> vl.EmpiricalRisk:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = torch.randn(samples, 4, dtype=D64), torch.arange(samples) % 3
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(reduction=reduction), (X, y))


def dense_curvature(risk: vl.EmpiricalRisk, structure: str) -> Tensor:
    """Of Σ_n ℓ_n."""
    G = vl.GGN(risk).to_dense() / risk.reduction_factor
    if structure == "diag":
        return G.diagonal().diag()
    if structure == "kfac":
        return vl.KFAC(risk, variant="exact").to_dense() / risk.reduction_factor
    if structure == "ekfac":
        return vl.EKFAC(risk, variant="exact").to_dense() / risk.reduction_factor
    return G[25:, 25:] if structure == "last_layer" else G


def jacobian(risk: vl.EmpiricalRisk, X: Tensor, names: list[str]) -> Tensor:
    """By autograd, ``[N, C, D]``."""
    params = {name: p.detach() for name, p in risk.params.items()}
    hidden = torch.tanh(X @ params["0.weight"].T + params["0.bias"])
    assert (risk.outputs[0].shape[1], hidden.shape[1]) == (3, 5)

    def outputs(params: dict[str, Tensor]) -> Tensor:
        a = torch.tanh(X @ params["0.weight"].T + params["0.bias"])
        return a @ params["2.weight"].T + params["2.bias"]

    J = torch.func.jacrev(outputs)(params)
    return torch.cat([J[name].flatten(2) for name in names], dim=2)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("samples", [5, 30])
def test_it_is_that_of_dense_matrices(
    structure: str, reduction: str, samples: int
) -> None:
    risk = problem(reduction, samples)
    tau = 0.7
    la = vl.Laplace(risk, tau, structure)
    A = dense_curvature(risk, structure)
    D = len(A)
    precision = A + tau * torch.eye(D, dtype=D64)
    covariance = precision.inverse()
    torch.testing.assert_close(la.covariance.to_dense(), covariance)
    assert (la.covariance.shape, la.mean.shape) == ((D, D), (D,))

    # −Σ_n ℓ_n − ½ τ |θ|² + ½ D log τ − ½ log det(A + τ I)
    log_likelihood = -risk.value() / risk.reduction_factor
    evidence = log_likelihood - 0.5 * tau * la.mean.square().sum()
    evidence += 0.5 * (D * math.log(tau) - precision.logdet())
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence)

    X = torch.randn(7, 4, dtype=D64)
    names = list(risk.params)[2:] if structure == "last_layer" else list(risk.params)
    J = jacobian(risk, X, names)
    mean, found = la.predictive(X)
    params = {name: p.detach() for name, p in risk.params.items()}
    expected = torch.tanh(X @ params["0.weight"].T + params["0.bias"])
    torch.testing.assert_close(mean, expected @ params["2.weight"].T + params["2.bias"])
    torch.testing.assert_close(found, J @ covariance @ J.mT)
    v = found.diagonal(dim1=1, dim2=2)
    probit = (mean / (1 + math.pi * v / 8).sqrt()).softmax(1)
    torch.testing.assert_close(la.predictive(X).probabilities(), probit)


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(1, keepdim=True)


def sigmoid(logits: Tensor) -> Tensor:
    return 1.0 / (1.0 + (-logits).exp())


@pytest.mark.parametrize(
    ("net", "loss", "shape", "link"),
    [
        (nn.Linear(3, 1), nn.BCEWithLogitsLoss(), (1,), sigmoid),
        (nn.Linear(3, 4), nn.BCEWithLogitsLoss(reduction="sum"), (4,), sigmoid),
        (
            nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)),
            nn.BCEWithLogitsLoss(),
            (),
            sigmoid,
        ),
        (nn.Linear(3, 4), nn.CrossEntropyLoss(), (4,), softmax),
        (nn.Linear(3, 4), vl.losses.Weighted(nn.BCEWithLogitsLoss()), (4,), sigmoid),
        (nn.Conv1d(3, 2, 1), nn.CrossEntropyLoss(), (2, 5), softmax),
        (nn.Conv1d(3, 1, 1), nn.BCEWithLogitsLoss(), (1, 5), sigmoid),
        (nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)), nn.NLLLoss(), (4,), softmax),
    ],
)
def test_probabilities_are_those_of_the_loss(
    net: nn.Module, loss: nn.Module, shape: tuple[int, ...], link: Any
) -> None:
    net, N = copy.deepcopy(net).double(), 8
    X = torch.rand(N, 3, *shape[1:], dtype=D64)
    y: Any = torch.rand(N, *shape, dtype=D64)
    if link is softmax:
        y = torch.randint(shape[0], (N, *shape[1:]))
    if isinstance(loss, vl.losses.Weighted):
        y = (y, torch.rand(N, dtype=D64))
    la = vl.Laplace(vl.EmpiricalRisk(net, loss, (X, y)), 0.5)
    predictive = la.predictive(X)
    mean, covariance = predictive
    assert torch.equal(mean.reshape(N, *shape), net(X))
    v = covariance.diagonal(dim1=1, dim2=2)
    expected = link((mean / (1 + math.pi * v / 8).sqrt()).reshape(N, *shape))
    for each in (predictive, copy.deepcopy(predictive), copy.copy(predictive)):
        torch.testing.assert_close(each.probabilities(), expected)
    again = pickle.loads(pickle.dumps(predictive))
    torch.testing.assert_close(again.probabilities(), expected)


def own_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return -(target * output.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("loss", [nn.MSELoss(), own_cross_entropy])
def test_no_probabilities_of_what_may_be_no_logits(loss: Any) -> None:
    X, y = torch.rand(8, 3, dtype=D64), torch.rand(8, 2, dtype=D64).softmax(1)
    risk = vl.EmpiricalRisk(nn.Linear(3, 2).double(), loss, (X, y), reduction="mean")
    predictive = vl.Laplace(risk).predictive(X)
    with pytest.raises(TypeError, match="outputs are logits"):
        predictive.probabilities()
    v = predictive.covariance.diagonal(dim1=1, dim2=2)
    expected = softmax(predictive.mean / (1 + math.pi * v / 8).sqrt())
    torch.testing.assert_close(predictive.probabilities(softmax), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_have_the_covariance(structure: str) -> None:
    la = vl.Laplace(problem(), 0.7, structure)
    covariance = la.covariance.to_dense()
    draws = la.sample(10_000, torch.Generator().manual_seed(0))
    centered = draws - la.mean[:, None]
    empirical = centered @ centered.T / 10_000
    assert (empirical - covariance).norm() < 0.1 * covariance.norm()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_prior_at_the_maximum_of_the_evidence(structure: str) -> None:
    la = vl.Laplace(problem(), 30.0, structure)
    found = la.optimize_prior()
    assert found is la.prior_precision and found.shape == ()
    best = la.log_marginal_likelihood()
    grid = torch.logspace(-3, 3, 61, dtype=D64)
    values = torch.stack([la.log_marginal_likelihood(tau.item()) for tau in grid])
    assert best >= values.max() - 1e-6
    assert abs(float((grid[values.argmax()] / found).log10())) < 0.11


def test_a_prior_for_each_parameter() -> None:
    la = vl.Laplace(problem(), structure="kfac")
    la.optimize_prior()
    one = la.log_marginal_likelihood()
    found = la.optimize_prior(per_parameter=True)
    assert found.shape == (4,)
    assert la.log_marginal_likelihood() > one
    log = found.log().requires_grad_()
    la.log_marginal_likelihood(log.exp()).backward()
    assert log.grad is not None and log.grad.norm() < 1e-2
    named = vl.Laplace(la.risk, dict(zip(la.risk.params, found, strict=True)), "kfac")
    torch.testing.assert_close(
        named.log_marginal_likelihood(), la.log_marginal_likelihood()
    )


@pytest.mark.parametrize("structure", ["full", "kfac", "diag"])
def test_it_agrees_with_laplace_torch(structure: str) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    laplace = pytest.importorskip("laplace")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = torch.randn(30, 4, dtype=D64), torch.arange(30) % 3
    names = {"full": "full", "kfac": "kron", "diag": "diag"}
    own = vl.Laplace(
        vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y)), 0.7, structure
    )
    backend = laplace.curvature.BackPackGGN
    other = laplace.Laplace(
        copy.deepcopy(net),
        "classification",
        "all",
        names[structure],
        prior_precision=0.7,
        backend=backend,
    )
    other.fit(DataLoader(TensorDataset(X, y), batch_size=30))
    torch.testing.assert_close(
        own.log_marginal_likelihood(), other.log_marginal_likelihood()
    )
    torch.testing.assert_close(own.predictive(X).probabilities(), other(X))


def test_the_last_layer_of_other_nets() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)  # first of the parameters, last in use
            self.body = nn.Conv1d(1, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.body(x.unsqueeze(1)).tanh().mean(2))
            return result

    X, y = torch.randn(9, 5), torch.arange(9) % 3
    risk = vl.EmpiricalRisk(Head(), nn.CrossEntropyLoss(), (X, y))
    la = vl.Laplace(risk, structure="last_layer")
    assert list(la.risk.params) == ["head.weight", "head.bias"]
    G = vl.GGN(risk).to_dense()[:15, :15]
    torch.testing.assert_close(la.curvature.to_dense(), G)
    assert la.predictive(X[:2]).covariance.shape == (2, 3, 3)


class WithScale(nn.Module):
    """Takes a second argument, which targets would be taken for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.layer(x) if scale is None else self.layer(x) * scale.unsqueeze(1)


@pytest.mark.parametrize("net", [WithScale(), nn.Linear(3, 2)])
@pytest.mark.parametrize("form", ["loader", "list", "pair"])
def test_targets_are_no_inputs_of_a_predictive(net: nn.Module, form: str) -> None:
    net, X, y = net.double(), torch.rand(6, 3, dtype=D64), torch.arange(6) % 2
    la = vl.Laplace(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y)))
    with_targets: Any = {
        "loader": DataLoader(TensorDataset(X, y), batch_size=4),
        "list": [(X[:4], y[:4]), (X[4:], y[4:])],
        "pair": (X, y),
    }[form]
    with pytest.raises(ValueError, match=r"X: a batch has 2 tensors, the risk's .* 1"):
        la.predictive(with_targets)
    whole = la.predictive(X)
    for inputs in ((X,), [X[:4], X[4:]], DataLoader(TensorDataset(X), batch_size=4)):
        found = la.predictive(inputs)
        torch.testing.assert_close(found.mean, whole.mean)
        torch.testing.assert_close(found.covariance, whole.covariance)


def test_inputs_of_several_tensors() -> None:
    """Those of the risk's form are taken, with what is in them."""
    net, X, scale = WithScale().double(), torch.rand(6, 3, dtype=D64), torch.rand(6)
    y, scale = torch.arange(6) % 2, scale.double()
    la = vl.Laplace(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), ((X, scale), y)))
    assert torch.equal(la.predictive((X, scale)).mean, net(X, scale))
    assert torch.equal(la.predictive(X).mean, net(X))


class Sequences(nn.Module):
    """Of [T, N, 3] and weights [N, T], as recurrent layers have them."""

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.RNN(3, 4), nn.Linear(4, 2)
        self.weighted = weighted

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        h = self.inner(x)[0]
        return self.last(
            h[-1] if weights is None else (weights.T[..., None] * h).sum(0)
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_samples_of_a_predictive_are_where_those_of_the_risk_are(
    weighted: bool, count: int
) -> None:
    net = Sequences(weighted).double()

    def inputs(n: int) -> Any:
        x = torch.randn(5, n, 3, dtype=D64)
        return (x, torch.rand(n, 5, dtype=D64)) if weighted else x

    risk = vl.EmpiricalRisk(
        net, nn.CrossEntropyLoss(), (inputs(7), torch.arange(7) % 2)
    )
    la, X = vl.Laplace(risk), inputs(count)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        given = X if weighted else (X,)
        result: Tensor = torch.func.functional_call(net, params, given)
        return result

    J = torch.cat(
        [part.flatten(2) for part in torch.func.jacrev(outputs)(params).values()], 2
    )
    mean, covariance = la.predictive(X)
    torch.testing.assert_close(mean, outputs(params))
    torch.testing.assert_close(covariance, J @ la.covariance.to_dense() @ J.mT)


def test_bad_input() -> None:
    risk = problem()
    for arguments, error, message in [
        ((vl.GGN(risk),), TypeError, "risk: an EmpiricalRisk"),
        ((risk, 1.0, "block"), ValueError, "structure: one of 'full'"),
        ((risk, -1.0), ValueError, "prior_precision: must be positive"),
        ((risk, torch.ones(3)), ValueError, "prior_precision: a number"),
        ((risk, torch.ones(4), "last_layer"), ValueError, "prior_precision: a number"),
    ]:
        with pytest.raises(error, match=message):
            vl.Laplace(*arguments)  # type: ignore[arg-type]


# Risks over some parameters -----------------------------------------------------------


def build(kind: str) -> vl.EmpiricalRisk:
    risk = problem()
    if kind == "module":
        return risk
    if kind == "moved":
        return risk.at(torch.arange(43, dtype=D64).cos())
    X, y = torch.randn(8, 4, dtype=D64), torch.arange(8) % 3
    params = {name: p.detach() for name, p in risk.params.items()}

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        a = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
        return a @ params["2.weight"].T + params["2.bias"]

    return vl.EmpiricalRisk(model, nn.CrossEntropyLoss(), (X, y), params)


@pytest.mark.parametrize("kind", ["module", "moved", "function"])
@pytest.mark.parametrize(
    "names", [["2.weight", "2.bias"], ["0.bias"], ["2.bias", "0.weight"]]
)
def test_over_some_parameters(kind: str, names: list[str]) -> None:
    whole = build(kind)
    part = whole.over(names)
    assert list(part.params) == [name for name in whole.params if name in names]
    ends = torch.tensor([0, *whole.sizes]).cumsum(0).tolist()
    places = dict(zip(whole.params, itertools.pairwise(ends), strict=False))
    index = torch.cat([torch.arange(*places[name]) for name in part.params])
    assert part.num_params == len(index)
    assert not any(p.requires_grad for p in part.params.values())
    assert not vl.log_marginal_likelihood(part, vl.GGN(part), 1.0).requires_grad
    torch.testing.assert_close(part.value(), whole.value())
    torch.testing.assert_close(part.gradient(), whole.gradient()[index])
    for make in (vl.GGN, vl.Hessian, vl.EmpiricalFisher):
        expected = make(whole).to_dense()[index][:, index]
        torch.testing.assert_close(make(part).to_dense(), expected)
    torch.testing.assert_close(
        vl.GGN(part).eigvalsh()[-4:],
        torch.linalg.eigvalsh(vl.GGN(whole).to_dense()[index][:, index])[-4:],
    )
    # It moves along its own parameters; the others stay.
    step = torch.full((len(index),), 0.1, dtype=D64)
    theta = whole.flatten(whole.params).detach()
    moved = part.at(theta[index] + step)
    everything = whole.at(theta.index_add(0, index, step))
    torch.testing.assert_close(moved.value(), everything.value())
    torch.testing.assert_close(moved.gradient(), everything.gradient()[index])
    if kind != "function":
        again = pickle.loads(pickle.dumps(part))
        torch.testing.assert_close(again.gradient(), part.gradient())


def test_over_follows_the_model() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data: Any = (torch.randn(9, 4), torch.arange(9) % 3)
    part = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data).over(["0.weight"])
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    fresh = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data, [net[0].weight])
    torch.testing.assert_close(part.at().value(), fresh.value())
    torch.testing.assert_close(part.at().gradient(), fresh.gradient())


def test_over_none_and_others() -> None:
    risk = problem()
    with pytest.raises(ValueError, match=r"names: some of .* found 'weight'"):
        risk.over(["0.bias", "weight"])
    with pytest.raises(ValueError, match=r"names: some of .* found none"):
        risk.over([])


def test_noise_of_regression_is_the_variance_of_the_loss() -> None:
    """As sigma_noise of laplace-torch: the evidence of N(f, σ²), densely."""
    torch.manual_seed(0)
    X, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    net, sigma, tau = nn.Linear(3, 2).double(), 0.3, 2.0
    targets = torch.stack([y, torch.full_like(y, sigma**2)], -1)
    loss = nn.GaussianNLLLoss(reduction="sum", full=True)
    la = vl.Laplace(vl.EmpiricalRisk(net, loss, (X, targets)), tau)
    design = torch.cat([X, torch.ones(7, 1).double()], 1)
    precision = design.T @ design / sigma**2 + tau * torch.eye(4).double()
    evidence = torch.distributions.Normal(net(X), sigma).log_prob(y).sum()
    theta = torch.cat([net.weight, net.bias[:, None]], 1)
    evidence = evidence - tau / 2 * theta.square().sum()
    evidence = evidence + 4 * math.log(tau) - torch.logdet(precision)
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence.detach())
    assert repr(la).startswith("<Laplace 'full' of <EmpiricalRisk: 8 parameters")
