"""What construction asks of a model: is it one function of each sample?"""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.cases import Lambda, mlp
from tests.comparing import jacobian
from vivit_linop.risk.model.functional import FunctionalModel

X, Y = torch.rand(12, 4).double(), torch.randint(3, (12,))
CE = nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    return mlp(4, 5, 3)


def build(forward: Any, data: Any = (X, Y), **keywords: Any) -> vl.EmpiricalRisk:
    return vl.EmpiricalRisk(Lambda(forward, f=net()), CE, data, **keywords)


# Models that differentiate inside -----------------------------------------------------


class Residual(nn.Module):
    """A physics-informed net: its output holds a derivative in the input."""

    def __init__(self, kind: str = "slope", mixes: str = "") -> None:
        super().__init__()
        self.net, self.kind, self.mixes = mlp(1, 6, 1), kind, mixes

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.net(x)
        if self.mixes == "mean":
            u = u - u.mean(0)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        if self.kind == "laplacian":
            (du,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return du + u


class Forces(nn.Module):
    """The negative gradient of a potential in positions, ``[n, 3, 2]``."""

    def __init__(self, mixes: str = "") -> None:
        super().__init__()
        self.net, self.mixes = mlp(3, 5, 1), mixes

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        distances = (x.unsqueeze(1) - x.unsqueeze(2)).square().sum(-1)
        energy = self.net(distances[:, [0, 0, 1], [1, 2, 2]])
        total = energy.sum().square() if self.mixes else energy.sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
        return -gradient.flatten(1)


def dense_ggn(model: nn.Module, X: Tensor) -> Tensor:
    """2/(N C) JᵀJ, row by row by plain autograd."""
    J = jacobian(model(X), model.parameters())
    return 2.0 * J.T @ J / len(J)


@pytest.mark.parametrize("cut", [12, 6, 5])
@pytest.mark.parametrize("kind", ["slope", "laplacian", "forces"])
def test_models_that_differentiate_inside(kind: str, cut: int) -> None:
    model: nn.Module = Forces() if kind == "forces" else Residual(kind)
    x = torch.rand(12, 3, 2) if kind == "forces" else torch.rand(12, 1)
    x, y = x.double(), torch.zeros(12, 6 if kind == "forces" else 1).double()
    G = dense_ggn(model.double(), x)
    batches = list(zip(x.split(cut), y.split(cut), strict=True))
    with torch.no_grad():  # of the caller
        risk = vl.EmpiricalRisk(model, nn.MSELoss(), batches)
        vector = torch.linspace(-1.0, 1.0, len(G)).double()
        torch.testing.assert_close(vl.GGN(risk) @ vector, G @ vector)
    torch.testing.assert_close(vl.GGN(risk).trace(), G.trace())
    part = risk.subset([7, 2, 3])
    torch.testing.assert_close(
        vl.GGN(part).trace(), dense_ggn(model, x[[2, 3, 7]]).trace()
    )


@pytest.mark.parametrize("cut", [12, 4])
@pytest.mark.parametrize("model", [Residual(mixes="mean"), Forces("square")])
def test_models_that_differentiate_inside_and_mix(model: nn.Module, cut: int) -> None:
    x = torch.rand(12, 3, 2) if isinstance(model, Forces) else torch.rand(12, 1)
    y = torch.zeros(12, 6 if isinstance(model, Forces) else 1)
    data = list(zip(x.double().split(cut), y.double().split(cut), strict=True))
    with pytest.raises(ValueError, match="depend on the other samples"):
        vl.EmpiricalRisk(model.double(), nn.MSELoss(), data)


def test_models_that_ask_for_the_grad_mode() -> None:
    """All evaluations are in the mode of products."""
    risk = build(
        lambda m, x: m.f(x) * (1.0 if torch.is_grad_enabled() else 2.0),
        [(X[:6], Y[:6]), (X[6:], Y[6:])],
    )
    plain = vl.EmpiricalRisk(risk.model, CE, (X, Y), risk.params)  # type: ignore[arg-type]
    torch.testing.assert_close(risk.gradient(), plain.gradient())


# Random numbers -----------------------------------------------------------------------


def seeded_features(m: Any, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return m.f(torch.cos(x @ torch.randn(4, 4).to(x)))


UNUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a coin of training mode": lambda m, x: (
        m.f(x) if m.training or torch.rand([]) < 2.0 else x[:, :3]
    ),
    "seeded": seeded_features,
    "times zero": lambda m, x: m.f(x) + 0.0 * torch.randn(len(x), 3),
    "of samples that are masked": lambda m, x: m.f(
        torch.where(torch.zeros(4, dtype=torch.bool), torch.rand_like(x), x)
    ),
    "numpy": lambda m, x: m.f(x) if np.random.rand() < 2.0 else x,
    "python": lambda m, x: m.f(x) if random.random() < 2.0 else x,
}


def _other_states() -> tuple[bytes, Any]:
    """Of NumPy and of Python."""
    return pickle.dumps(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", UNUSED)
def test_random_numbers_that_are_not_used(name: str, check: bool) -> None:
    model = Lambda(UNUSED[name], f=net()).eval()
    before, others = torch.random.get_rng_state(), _other_states()
    risk = vl.EmpiricalRisk(model, CE, [(X[:7], Y[:7]), (X[7:], Y[7:])], check=check)
    gradient = risk.gradient()
    G, vector = vl.GGN(risk), torch.linspace(-1.0, 1.0, risk.num_params).double()
    found = G @ vector
    diagonal = vl.Hessian(risk).diagonal()  # BackPACK is tried
    assert torch.equal(before, torch.random.get_rng_state())
    assert _other_states() == others
    with torch.random.fork_rng([]):
        outputs = model(X)
        expected = torch.autograd.grad(CE(outputs, Y), list(model.parameters()))
    torch.testing.assert_close(gradient, risk.flatten(expected))
    H = vl.LossHessian(vl.EmpiricalRisk(model, CE, (X, Y)))
    J = vl.Jacobian(vl.EmpiricalRisk(model, CE, (X, Y)))
    torch.testing.assert_close(found, J.T @ (H @ (J @ vector)))
    torch.testing.assert_close(diagonal, vl.Hessian(risk).to_dense().diagonal())


def in_a_fork(m: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng([]):
        return m.f(x + torch.rand_like(x))


USED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout": lambda m, x: F.dropout(m.f(x), 0.5),
    "a little noise": lambda m, x: m.f(x) + 1e-9 * torch.randn(len(x), 3),
    "a coin": lambda m, x: m.f(x) if torch.rand([]) < 0.5 else m.f(2.0 * x),
    "a coin of NumPy": lambda m, x: m.f(x) if np.random.rand() < 0.5 else m.f(2.0 * x),
    "a coin of Python": lambda m, x: m.f((1 + (random.random() < 0.5)) * x),
    "Python's order": lambda m, x: m.f(x)[random.sample(range(len(x)), len(x))],
    "one sample": lambda m, x: m.f(x + torch.rand([]) * (x == x.max())),
    "order": lambda m, x: m.f(x)[torch.randperm(len(x))],
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", USED)
def test_random_numbers_that_are_used(name: str, check: bool) -> None:
    others = _other_states()
    with pytest.raises(ValueError, match="on batch 0 it drew random numbers"):
        build(USED[name], check=check)
    assert _other_states() == others


def test_random_numbers_of_a_later_batch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch.rand([])
        return m.f(x) if len(x) > 5 else F.dropout(m.f(x), 0.5)

    with pytest.raises(ValueError, match="on batch 1 it drew random numbers"):
        build(forward, [(X[:7], Y[:7]), (X[7:], Y[7:])])


def test_random_numbers_that_nobody_sees() -> None:
    rng, own = np.random.default_rng(0), torch.Generator().manual_seed(0)
    counter = itertools.count()
    for forward in (
        in_a_fork,
        lambda m, x: m.f(x) * (1.0 + rng.random()),
        lambda m, x: m.f(x) * (1.0 + torch.rand(1, generator=own)),
        lambda m, x: m.f(x) * (1.0 + next(counter)),
    ):
        with pytest.raises(ValueError, match="evaluated a second time"):
            build(forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["slope", "laplacian", "forces"])
def test_hessians_of_models_that_differentiate_inside(
    kind: str, dtype: torch.dtype
) -> None:
    model: nn.Module = Forces() if kind == "forces" else Residual(kind)
    x = torch.rand(6, 3, 2) if kind == "forces" else torch.rand(6, 1)
    x, y = x.to(dtype), torch.rand(6, 6 if kind == "forces" else 1).to(dtype)
    params = list(model.to(dtype).parameters())

    def along(parts: list[Tensor], others: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        return sum((a * b).sum() for a, b in zip(parts, others, strict=True))

    direction = [torch.randn_like(p) for p in params]
    total = nn.MSELoss()(model(x), y)
    slope = torch.autograd.grad(
        total, params, create_graph=True, materialize_grads=True
    )
    expected = torch.autograd.grad(
        along(direction, slope), params, materialize_grads=True
    )
    with torch.no_grad():  # of the caller
        H = vl.Hessian(model, nn.MSELoss(), [(x[:2], y[:2]), (x[2:], y[2:])])
        found = H @ H.risk.flatten(direction)
    torch.testing.assert_close(found, H.risk.flatten(expected))
    torch.testing.assert_close(H.diagonal(), H.to_dense().diag(), rtol=1e-4, atol=1e-5)


HELD: list[nn.Module] = []


class Reached(nn.Module):
    """A potential whose last layer is found in a list of the file's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 5), nn.Linear(5, 1)
        HELD[:] = [self.last]

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = HELD[0](self.first(x).tanh())
        return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def test_models_that_differentiate_inside_and_reach_beyond_the_copy() -> None:
    model, x = Reached().double(), torch.rand(5, 2).double()
    params = [model.first.weight, model.first.bias, model.last.weight]
    G = vl.GGN(model, nn.MSELoss(), (x, torch.zeros_like(x)), params)
    J = jacobian(model(x), params)
    torch.testing.assert_close(G.to_dense(), 2.0 * J.T @ J / 10)


class Backward(torch.autograd.Function):
    """A layer whose backward pass has the weight that is in a list of the file's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ HELD[0].weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient @ HELD[0].weight


def test_what_fails_its_certificate_fails_again() -> None:
    model = Lambda(lambda m, x: Backward.apply(m.first(x)), first=nn.Linear(2, 5))
    model.last = nn.Linear(5, 3)
    HELD[:] = [model.last]
    function = FunctionalModel(model.double())
    for _ in range(2):
        with pytest.raises(ValueError, match="backward pass does not get there"):
            function(function.params, torch.rand(4, 2).double())
