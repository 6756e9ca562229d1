"""What activation checkpoints recompute where modules have had other tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_debug_enabled

import vivit_linop as vl

RUNS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda m, x: m.net(x),
    "module": lambda m, x: checkpoint(m.net, x, use_reentrant=False),
    "reentrant": lambda m, x: checkpoint(m.net, x, use_reentrant=True),
    "closure": lambda m, x: checkpoint(lambda z: m.net(z), x, use_reentrant=False),
    "argument": lambda m, x: checkpoint(
        lambda n, z, end: end(n(z)), m.net[:2], x, end=m.net[2], use_reentrant=False
    ),
    "nested": lambda m, x: checkpoint(
        lambda z: m.net[2](checkpoint(m.net[:2], z, use_reentrant=True)),
        x,
        use_reentrant=False,
    ),
}


class Run(nn.Module):
    def __init__(self, net: nn.Module, run: str) -> None:
        super().__init__()
        self.net, self.run = net, run

    def forward(self, x: Tensor) -> Tensor:
        return RUNS[self.run](self, x)


class Scaled(nn.Module):
    """A net whose weights are computed from its parameters."""

    def __init__(self, run: str, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.part = Run(net.requires_grad_(not frozen), run)
        self.scale = nn.Parameter(torch.tensor([1.4, 0.6]))

    def forward(self, x: Tensor) -> Tensor:
        own = self.part.named_parameters()
        params = {name: p * self.scale[i % 2] for i, (name, p) in enumerate(own)}
        return functional_call(self.part, params, (x,))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])


def derivatives(
    outputs: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor], y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, the Jacobian and the Hessian of a mean cross-entropy."""
    sizes = [p.numel() for p in params.values()]

    def flat(theta: Tensor) -> Tensor:
        parts = zip(params.items(), theta.split(sizes), strict=True)
        return outputs({name: part.view_as(p) for (name, p), part in parts})

    theta = torch.cat([p.detach().flatten() for p in params.values()])
    risk = lambda theta: F.cross_entropy(flat(theta), y)  # noqa: E731
    J = torch.func.jacrev(flat)(theta).flatten(0, 1)
    return torch.func.grad(risk)(theta), J, torch.func.hessian(risk)(theta)


def check(make: Callable[[], vl.EmpiricalRisk], truth: tuple[Tensor, ...]) -> None:
    gradient, J, hessian = truth
    risk, x = make(), torch.linspace(-1.0, 1.0, len(gradient)).double()
    close = torch.testing.assert_close
    close(risk.gradient(), gradient)
    close(vl.Jacobian(risk) @ x, J @ x)
    close(vl.Jacobian(risk).to_dense(), J)
    close(vl.PerSampleGradients(make()) @ torch.ones(5).double() / 5, gradient)
    close(vl.Hessian(risk).to_dense(), hessian)
    close(vl.GGN(make()).diagonal(), (J.T @ vl.LossHessian(risk) @ J).diagonal())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("run", [name for name in RUNS if name != "plain"])
def test_weights_that_a_forward_pass_computes(run: str, frozen: bool) -> None:
    net, plain = (Scaled(name, frozen).double() for name in (run, "plain"))
    X, y = data()
    params = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    truth = derivatives(lambda p: functional_call(plain, p, (X,)), params, y)
    check(lambda: vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y)), truth)


@pytest.mark.parametrize("run", ["module", "reentrant", "closure", "nested"])
def test_functions_of_parameters(run: str) -> None:
    """They differ from those that the module has in a backward pass."""
    net, plain = (Scaled(name, frozen=False).double().part for name in (run, "plain"))
    X, y = data()
    params = {n: p.detach() + 0.3 * p.detach().cos() for n, p in net.named_parameters()}
    truth = derivatives(lambda p: functional_call(plain, p, (X,)), params, y)

    def function(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, p, (x,))

    make = lambda: vl.EmpiricalRisk(  # noqa: E731
        function, nn.CrossEntropyLoss(), (X, y), params
    )
    check(make, truth)


def test_checkpoints_may_be_debugged() -> None:
    net, (X, y) = Run(nn.Linear(3, 2).double(), "module"), data()
    with set_checkpoint_debug_enabled(True):
        g = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y)).gradient()
    F.cross_entropy(net.net(X), y).backward()  # type: ignore[operator]
    wanted = torch.cat([p.grad.flatten() for p in net.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(g, wanted)
