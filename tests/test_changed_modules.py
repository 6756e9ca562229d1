"""Modules that compute something else than their type says: hooks, forward methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.comparing import jacobian

X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3).sin()
CLASSES = torch.arange(6) % 2
NUMBERS = X[:, :2].exp()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def changed(module: nn.Module, change: Callable[[Any], object]) -> Any:
    change(module)
    return module


def doubled(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A hook on gradients."""
    return tuple(g if g is None else 2 * g for g in inputs)


def check(model: nn.Module, loss: nn.Module, y: Tensor) -> vl.EmpiricalRisk:
    """Compare with autograd of the user's own modules."""
    parameters = list(model.parameters())
    output = model(X)
    value = loss(output, y)
    gradients = torch.autograd.grad(value, parameters, retain_graph=True)
    J = jacobian(output, parameters)
    H: Any = torch.autograd.functional.hessian(
        lambda f: loss(f.view_as(output), y), output.detach().reshape(-1)
    )
    risk = vl.EmpiricalRisk(model, loss, (X, y))
    x = torch.arange(risk.num_params, dtype=torch.float64).cos()
    for got, expected in [
        (risk.value(), value.detach()),
        (risk.gradient(), torch.cat([g.reshape(-1) for g in gradients])),
        (vl.Jacobian(risk).to_dense(), J),
        (vl.GGN(risk) @ x, J.T @ (H @ (J @ x))),
        (vl.GGN(risk).diagonal(), (J.T @ H @ J).diagonal()),
        (vl.Hessian(risk).diagonal(), vl.Hessian(risk).to_dense().diagonal()),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    return risk


LOSSES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a hook": (
        lambda: changed(
            nn.CrossEntropyLoss(),
            lambda loss: loss.register_forward_hook(lambda m, args, out: 3 * out),
        ),
        CLASSES,
    ),
    "a hook before": (
        lambda: changed(
            nn.MSELoss(reduction="sum"),
            lambda loss: loss.register_forward_pre_hook(
                lambda m, args: (args[0].sinh(), args[1])
            ),
        ),
        NUMBERS,
    ),
    "a forward of its own": (
        lambda: changed(
            nn.CrossEntropyLoss(),
            lambda loss: setattr(
                loss, "forward", lambda f, y: F.cross_entropy(2 * f, y)
            ),
        ),
        CLASSES,
    ),
    "a hook on gradients": (
        lambda: changed(
            nn.CrossEntropyLoss(),
            lambda loss: loss.register_full_backward_hook(doubled),
        ),
        CLASSES,
    ),
    "a hook on a loss of one's own": (
        lambda: changed(
            vl.Loss(lambda f, y: (f - y).square().sum(1)),
            lambda loss: loss.register_forward_hook(lambda m, args, out: 3 * out),
        ),
        NUMBERS,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_compute_something_else_than_their_type(name: str) -> None:
    make, y = LOSSES[name]
    risk = check(net(), make(), y)
    assert not risk.loss.tested  # so it is compared with autograd


def _if_loss(change: Callable[..., Any]) -> Callable[..., Any]:
    """A hook on all modules that does something to losses."""

    def hook(module: nn.Module, *given: Any) -> Any:
        return change(*given) if isinstance(module, nn.modules.loss._Loss) else None

    return hook


# By name, how hooks are put on all modules, and what they do.
ON_ALL: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "outputs": (
        nn.modules.module.register_module_forward_hook,
        _if_loss(lambda args, out: 3 * out),
    ),
    "inputs": (
        nn.modules.module.register_module_forward_pre_hook,
        _if_loss(lambda args: (args[0].sinh(), args[1])),
    ),
    "gradients": (
        nn.modules.module.register_module_full_backward_hook,
        _if_loss(lambda inputs, outputs: doubled(nn.Module(), inputs, outputs)),
    ),
    "layers": (
        nn.modules.module.register_module_forward_hook,
        lambda module, args, out: 2 * out if isinstance(module, nn.Tanh) else None,
    ),
}


@pytest.mark.parametrize("name", ON_ALL)
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss, nn.HuberLoss])
def test_hooks_on_all_modules(kind: type[nn.Module], name: str) -> None:
    register, hook = ON_ALL[name]
    handle = register(hook)
    try:
        y = CLASSES if kind is nn.CrossEntropyLoss else NUMBERS
        assert not check(net(), kind(), y).loss.tested
        for make in (vl.KFRA, vl.PositiveCurvatureHessian):
            with pytest.raises(ValueError, match=r"^model: .*hooks on all modules"):
                make(net(), kind(), (X, y))
    finally:
        handle.remove()
    check(net(), kind(), y)


def test_losses_that_vectorise_themselves() -> None:
    """Also a weighted one with a hook on it, whose targets have the weights."""

    class Vectorised(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return torch.func.vmap(F.cross_entropy)(output, target).mean()

    assert not check(net(), Vectorised(), CLASSES).loss.tested
    weights = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    data = X, (CLASSES, weights)
    inner = LOSSES["a hook on gradients"][0]()
    with pytest.raises(ValueError, match=r"^loss: a hook on gradients"):
        vl.EmpiricalRisk(net(), vl.losses.Weighted(inner), data)
    plain = vl.losses.Weighted(nn.CrossEntropyLoss())
    hooked = changed(
        vl.losses.Weighted(nn.CrossEntropyLoss()),
        lambda loss: loss.register_forward_hook(lambda m, args, out: 3 * out),
    )
    expected, found = (vl.GGN(net(), loss, data) for loss in (plain, hooked))
    torch.testing.assert_close(found.diagonal(), 3 * expected.diagonal())
    torch.testing.assert_close(
        found.factor.risk.value(), 3 * expected.factor.risk.value()
    )


LAYERS: dict[str, Callable[[nn.Sequential], object]] = {
    "a hook": lambda n: n[1].register_forward_hook(lambda m, args, out: 2 * out),
    "a hook before": lambda n: n[2].register_forward_pre_hook(
        lambda m, args: (2 * args[0],)
    ),
    "a forward of its own": lambda n: setattr(n[1], "forward", lambda x: x.tanh() * 2),
    "a forward of the whole": lambda n: setattr(
        n, "forward", lambda x: n[2](2 * n[1](n[0](x)))
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_compute_something_else_than_their_type(name: str) -> None:
    """BackPACK goes by types."""
    risk = check(changed(net(), LAYERS[name]), nn.CrossEntropyLoss(), CLASSES)
    for make in (vl.KFRA, vl.PositiveCurvatureHessian):
        with pytest.raises(ValueError, match=r"^model: BackPACK cannot compute"):
            make(risk)
    loss, y = LOSSES["a hook"]
    with pytest.raises(ValueError, match=r"^model: BackPACK cannot compute"):
        vl.KFRA(net(), loss(), (X, y))


@pytest.mark.parametrize("make", [vl.KFRA, vl.PositiveCurvatureHessian])
def test_recursions_know_nothing_of_hooks_on_gradients(
    make: Callable[..., Any],
) -> None:
    layers, loss = net(), nn.CrossEntropyLoss()
    for part in (layers[1], loss):
        handle = part.register_full_backward_hook(doubled)
        with pytest.raises(ValueError, match=r"^model: .*hooks on gradients"):
            make(layers, loss, (X, CLASSES))
        handle.remove()
    make(layers, loss, (X, CLASSES))


def test_hooks_that_only_look_are_no_reason_to_refuse() -> None:
    seen: list[int] = []
    model = net()
    model[1].register_forward_hook(lambda m, args, out: seen.append(1))
    args = nn.CrossEntropyLoss(), (X, CLASSES)
    found, expected = vl.KFRA(model, *args), vl.KFRA(net(), *args)
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
    assert seen


class AsksForItsParameters(nn.Linear):
    """Computes something else where its weight is no ``nn.Parameter``."""

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X) * (1 if self.is_usual(self.weight) else 2)

    def is_usual(self, weight: Tensor) -> bool:
        return isinstance(weight, nn.Parameter)


class AsksForLeaves(AsksForItsParameters):
    def is_usual(self, weight: Tensor) -> bool:
        return weight.is_leaf and weight.requires_grad


class AsksForItsType(AsksForItsParameters):
    def is_usual(self, weight: Tensor) -> bool:
        return type(weight) is nn.Parameter


@pytest.mark.parametrize("kind", [AsksForItsParameters, AsksForLeaves, AsksForItsType])
def test_nets_that_ask_what_their_parameters_are(kind: type[nn.Linear]) -> None:
    model = net()
    model[0] = kind(3, 4).double()
    risk = check(model, nn.CrossEntropyLoss(), CLASSES)
    torch.testing.assert_close(
        risk.at().gradient(), risk.gradient(), rtol=1e-12, atol=1e-14
    )
    if kind is not AsksForLeaves:
        last = risk.over(["2.weight", "2.bias"])
        assert torch.equal(last.gradient(), risk.gradient()[-last.num_params :])


def test_nets_that_ask_what_their_frozen_parameters_are() -> None:
    model = net()
    model[0] = AsksForItsParameters(3, 4).double().requires_grad_(False)
    risk = vl.EmpiricalRisk(model, nn.CrossEntropyLoss(), (X, CLASSES))
    for _ in range(2):
        value = nn.CrossEntropyLoss()(model(X), CLASSES).detach()
        torch.testing.assert_close(risk.at().value(), value, rtol=1e-12, atol=0)
        with torch.no_grad():
            model[0].weight.mul_(2)


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.requires_grad_])
def test_functions_of_parameters_have_the_kind_that_is_given(kind: Any) -> None:
    def function(params: dict[str, Tensor], X: Tensor) -> Tensor:
        factor = 2 if isinstance(params["w"], nn.Parameter) else 1
        return factor * (X @ params["w"])

    params = {"w": kind(torch.ones(3, 2, dtype=torch.float64))}
    value = nn.MSELoss()(function(params, X), NUMBERS).detach()
    risk = vl.EmpiricalRisk(function, nn.MSELoss(), (X, NUMBERS), params)
    torch.testing.assert_close(risk.value(), value)
    torch.testing.assert_close(risk.at().value(), value)


class Slotted(nn.Linear):
    """What it reads lies in a slot, and not among its attributes."""

    __slots__ = ("scale",)

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X) * self.scale


def test_attributes_in_slots() -> None:
    model, layer = net(), Slotted(3, 4).double()
    layer.scale = torch.tensor([1.0, 2.0, 0.5, -1.0], dtype=torch.float64)
    model[0] = layer
    risk = check(model, nn.CrossEntropyLoss(), CLASSES)
    gradient = risk.gradient()
    layer.scale = 2 * layer.scale
    assert not risk.is_current()
    assert torch.equal(risk.gradient(), gradient)
    check(model, nn.CrossEntropyLoss(), CLASSES)
