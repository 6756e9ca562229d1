"""Models that return several outputs: a tuple, a mapping, an object of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.comparing import assert_near, inputs, jacobian
from tests.pairs import in_turn


class Named(NamedTuple):
    mean: Tensor
    variance: Tensor


@dataclass
class Held:
    mean: Tensor
    variance: Tensor
    note: str = "not a tensor"


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda mean, variance: (mean, variance),
    "named tuple": Named,
    "mapping": lambda mean, variance: {"mean": mean, "variance": variance},
    "dataclass": Held,
    "list": lambda mean, variance: [mean, variance],
    "nested": lambda mean, variance: ((mean, None), {"variance": variance}),
}


def parts(output: Any) -> tuple[Tensor, Tensor]:
    """The tensors in any of these containers."""
    if isinstance(output, Held):
        return output.mean, output.variance
    if isinstance(output, dict):
        return output["mean"], output["variance"]
    first, second = output
    return (first[0], second["variance"]) if isinstance(second, dict) else output


class MeanVariance(nn.Module):
    def __init__(self, container: str, variances: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4)
        self.mean, self.spread = nn.Linear(4, 2), nn.Linear(4, variances)
        self.container = container

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).tanh()
        variance = F.softplus(self.spread(hidden)) + 0.1
        return CONTAINERS[self.container](self.mean(hidden), variance)


class Truth:
    """J of the outputs side by side, and H, by plain autograd."""

    def __init__(self, model: nn.Module, loss: Any, X: Tensor, y: Any) -> None:
        outputs = torch.cat([part.flatten(1) for part in parts(model(X))], dim=1)
        self.J = jacobian(outputs, model.parameters())
        self.f = f = outputs.detach()
        shapes = [part[0].shape for part in parts(model(X))]
        first = shapes[0].numel()

        def value(f: Tensor) -> Tensor:
            a, b = f[:, :first], f[:, first:]
            a, b = a.reshape(-1, *shapes[0]), b.reshape(-1, *shapes[1])
            return loss(a, b, y)

        self.value = value(f)
        H = torch.autograd.functional.hessian(value, f)
        self.H = H.reshape(f.numel(), f.numel())
        self.G = self.J.T @ self.H @ self.J


@pytest.mark.parametrize(("container", "variances"), in_turn(CONTAINERS, [1, 2]))
def test_gaussian_nll_of_mean_and_variance(container: str, variances: int) -> None:
    """``nn.GaussianNLLLoss`` has both from the net, and a Fisher matrix."""
    model = MeanVariance(container, variances).double()
    X, y = inputs(6, 3), inputs(6, 2)
    truth = Truth(model, lambda m, v, y: F.gaussian_nll_loss(m, y, v), X, y)
    data = [(X[:4], y[:4]), (X[4:], y[4:])]
    risk = vl.EmpiricalRisk(model, nn.GaussianNLLLoss(), data)
    assert risk.num_outputs == 2 + variances
    assert_near(risk.value(), truth.value)
    G = vl.GGN(risk)
    assert_near(vl.Jacobian(risk).to_dense(), truth.J)
    assert_near(vl.LossHessian(risk).to_dense(), truth.H)
    assert_near(G.to_dense(), truth.G)
    assert_near(G.eigh(k=1).eigenvalues, torch.linalg.eigvalsh(truth.G)[-1:])
    v = truth.f[:, 2:]
    fisher = torch.cat([1 / v.expand(-1, 2), (2 // variances) / (2 * v**2)], dim=1)
    S = vl.LossHessian(risk).sqrt(20_000, torch.Generator().manual_seed(1)).to_dense()
    expected = torch.diag(fisher.reshape(-1) / 12)
    size = expected.diagonal().outer(expected.diagonal()).sqrt()
    assert ((S @ S.T - expected).abs() <= 24 / 20_000**0.5 * size + 1e-12).all()
    assert vl.KFAC(risk).trace() > 0
    for other in (risk.subset([0, 5, 2]), risk.at(), pickle.loads(pickle.dumps(risk))):
        assert vl.GGN(other, mc_samples=1).trace() > 0
    assert_near(vl.GGN(copy.deepcopy(risk)).to_dense(), truth.G)


class TwoTasks(nn.Module):
    """Classes of an image's pixels, and a number of the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.pixels = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 3, 1)
        self.number = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).tanh()
        return self.pixels(hidden), self.number(hidden.flatten(1))


def both(a: Tensor, b: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(a, y[0]) + 0.5 * F.mse_loss(b, y[1])


def draw(f: tuple[Tensor, Tensor], y: Any, draws: Any) -> tuple[Tensor, Tensor]:
    a, b = f
    pixels = draws.categories(a.softmax(1).movedim(1, -1))
    return pixels, b + draws.normal(b)


@pytest.mark.parametrize("kind", ["function", "vl.Loss", "closed"])
def test_two_tasks(kind: str) -> None:
    model = TwoTasks().double()
    X = inputs(5, 1, 3, 3)
    y = torch.arange(20).reshape(5, 2, 2) % 3, inputs(5, 1)
    truth = Truth(model, both, X, y)

    def function(f: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        return both(*f, y)

    def gradient(f: tuple[Tensor, Tensor], y: Any) -> tuple[Tensor, Tensor]:
        labels = F.one_hot(y[0], 3).movedim(-1, 1)
        return (f[0].softmax(1) - labels) / 4, f[1] - y[1]

    losses: dict[str, Any] = {
        "function": function,
        "vl.Loss": vl.Loss(function, sample=draw),
        "closed": vl.Loss(function, gradient=gradient),
    }
    options = {"reduction": "mean"} if kind == "function" else {}
    risk = vl.EmpiricalRisk(model, losses[kind], (X, y), **options)
    assert_near(vl.GGN(risk).to_dense(), truth.G)
    assert_near(vl.LossHessian(risk).to_dense(), truth.H)
    U = vl.PerSampleGradients(risk)
    assert_near(U @ torch.ones(5).double() / 5, risk.gradient())
    if kind == "vl.Loss":
        S = vl.LossHessian(risk).sqrt(2000, torch.Generator().manual_seed(0))
        # The pixels' losses are a mean of four, so their squares are a quarter.
        own = truth.H.diagonal().reshape(5, 13)
        expected = torch.cat([own[:, :12] / 4, own[:, 12:]], dim=1).reshape(-1)
        found = S.to_dense().square().sum(1)
        assert ((found - expected).abs() <= 24 / 2000**0.5 * expected).all()
        assert vl.EKFAC(risk, mc_samples=2).trace() > 0


def test_a_list_of_outputs_or_of_samples() -> None:
    """As many tensors as samples are one for each; others are several outputs."""
    X, y = inputs(6, 3), inputs(6, 2)
    model = MeanVariance("tuple", 2).double()

    def loss(f: Any, y: Tensor) -> Tensor:
        a, b = f if isinstance(f, list) else f.unbind(1)
        return ((a - y).square() * b).sum()

    def by_sample(model: nn.Module, x: Tensor) -> list[Tensor]:
        return list(torch.stack(model(x), dim=1))

    data = [(X[:4], y[:4]), (X[4:], y[4:])]  # the second has two samples, too
    several, samples, whole = (
        vl.EmpiricalRisk(model, loss, data, reduction="sum", predict=predict)
        for predict in (
            lambda model, x: list(model(x)),
            by_sample,
            lambda model, x: torch.stack(model(x), dim=1),
        )
    )
    for kind in (vl.GGN, vl.Hessian):
        expected = kind(whole).to_dense()
        assert_near(kind(several).to_dense(), expected)
        assert_near(kind(samples).to_dense(), expected)


def test_a_function_model_of_several_outputs() -> None:
    w, X, y = inputs(3, 4), inputs(6, 3), inputs(6, 2)

    def model(params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        f = (x @ params["w"]).sin()
        return {"a": f[:, :2], "b": f[:, 2:]}

    def loss(f: dict[str, Tensor], y: Tensor) -> Tensor:
        return ((f["a"] - y).square() * f["b"].exp()).sum()

    def joined(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["w"]).sin()

    def of_joined(f: Tensor, y: Tensor) -> Tensor:
        return loss({"a": f[:, :2], "b": f[:, 2:]}, y)

    data = [(X[:4], y[:4]), (X[4:], y[4:])]
    options: dict[str, Any] = {"reduction": "sum"}
    several = vl.EmpiricalRisk(model, loss, data, {"w": w}, **options)
    one = vl.EmpiricalRisk(joined, of_joined, data, {"w": w}, **options)
    for kind in (vl.GGN, vl.Hessian, vl.EmpiricalFisher):
        assert_near(kind(several).to_dense(), kind(one).to_dense())


def test_several_outputs_that_are_refused() -> None:
    X, y = inputs(6, 3), inputs(6, 2)
    model = MeanVariance("tuple", 2).double()
    with pytest.raises(
        TypeError, match=r"model: returned \(.*MSELoss takes one tensor"
    ):
        vl.EmpiricalRisk(model, nn.MSELoss(), (X, y))
    # What has no sample axis, or is no number.
    for extra in (torch.ones(2), torch.ones(()), torch.ones(6).long()):
        with pytest.raises(TypeError, match=r"model: must return a tensor.*predict="):
            vl.EmpiricalRisk(
                model,
                nn.GaussianNLLLoss(),
                (X, y),
                predict=lambda model, x, extra=extra: (model(x)[0], extra),
            )
    # Torch would broadcast.
    for other in (y[:, :1], y[:, 0], y[:, None]):
        with pytest.raises(ValueError, match=r"data: GaussianNLLLoss needs targets"):
            vl.EmpiricalRisk(model, nn.GaussianNLLLoss(), [(X[:2], other[:2])])
    with pytest.raises(ValueError, match="KFRA"):
        vl.KFRA(vl.EmpiricalRisk(model, nn.GaussianNLLLoss(), (X, y)))
    joined = vl.EmpiricalRisk(
        model, nn.MSELoss(), (X, y), predict=lambda model, x: model(x)[0]
    )
    assert joined.num_outputs == 2


def test_trained_weights_of_tasks_are_outputs() -> None:
    """As the error for losses with parameters of the model says."""

    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)
            self.s = nn.Parameter(torch.tensor([0.3, -0.2]))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), self.s.expand(len(x), 2)

    def loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        f, s = output
        return ((-s).exp() * (f - y).square() + s).sum(1).mean()

    torch.manual_seed(0)
    net, X, y = Tasks().double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    alone, s = nn.Linear(3, 2).double(), nn.Parameter(net.s.detach().clone())
    alone.register_parameter("s", s)
    with pytest.raises(ValueError, match=r"trained are outputs of the model"):
        vl.EmpiricalRisk(alone, lambda f, t: loss((f, s), t), (X, y), reduction="mean")
    risk = vl.EmpiricalRisk(net, loss, (X, y), reduction="mean")
    params = dict(net.named_parameters())

    def value(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in params.values()])
        named = zip(params.items(), parts, strict=True)
        state = {name: part.view_as(p) for (name, p), part in named}
        return loss(torch.func.functional_call(net, state, (X,)), y)

    theta = torch.cat([p.detach().flatten() for p in params.values()])
    exact = torch.func.hessian(value)(theta)
    torch.testing.assert_close(vl.Hessian(risk).to_dense(), exact)
    torch.testing.assert_close(risk.gradient(), torch.func.grad(value)(theta))
