"""The loss is part of the risk: what it holds stays, and the model is none of it."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import vivit_linop as vl

SCALE = torch.zeros((), dtype=torch.float64)


def toy() -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    return net, (torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 4)


class Scaled(nn.Module):
    """Temperature scaling."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.log_scale.exp() * output, y)


class Anchored(nn.Module):
    """Centres of classes, one a buffer, one a plain attribute, one in a list."""

    reduction = "sum"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.zeros((), dtype=torch.float64))
        self.plain = self.log_scale.clone()
        self.parts = [self.plain, nn.Parameter(self.plain.clone())]

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        scale = self.log_scale + self.plain + self.parts[1]
        return F.cross_entropy(scale.exp() * output, y, reduction="sum")


def changed(loss: Any) -> None:
    with torch.no_grad():
        loss.log_scale.add_(1.0)
        if isinstance(loss, Anchored):
            loss.plain.add_(1.0)
            loss.parts[1].add_(1.0)


WAYS: dict[str, Callable[[Any], Any]] = {
    "module": lambda loss: loss,
    "lambda": lambda loss: lambda o, t: loss(o, t),
    "method": lambda loss: loss.forward,
    "partial": lambda loss: functools.partial(lambda m, o, t: m(o, t), loss),
    "default": lambda loss: lambda o, t, m=loss: m(o, t),
}


def results(risk: vl.EmpiricalRisk) -> list[Tensor]:
    x = torch.linspace(-1, 1, risk.num_params, dtype=torch.float64)
    return [vl.GGN(risk) @ x, vl.Hessian(risk) @ x, risk.gradient()]


@pytest.mark.parametrize("make", [Scaled, Anchored])
@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_a_loss_stay(way: str, make: Callable[[], Any]) -> None:
    net, data = toy()
    loss = make()
    expected = results(vl.EmpiricalRisk(net, make(), data))
    risk = vl.EmpiricalRisk(net, WAYS[way](loss), data, reduction=loss.reduction)
    changed(loss)
    for found, want in zip(results(risk), expected, strict=True):
        torch.testing.assert_close(found, want)
    assert all(p.grad is None for p in loss.parameters())


def test_a_loss_is_left_as_it_is() -> None:
    class Keeps(Scaled):
        def forward(self, output: Tensor, y: Tensor) -> Tensor:
            self.last = super().forward(output, y)
            return self.last

    net, data = toy()
    loss = Keeps()
    results(vl.EmpiricalRisk(net, loss, data))
    assert "last" not in vars(loss)


def test_a_global_tensor_is_frozen() -> None:
    net, data = toy()

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(SCALE.exp() * output, y)

    risk = vl.EmpiricalRisk(net, loss, data, reduction="mean")
    before = results(risk)
    SCALE.add_(1.0)
    try:
        for found, want in zip(results(risk), before, strict=True):
            torch.testing.assert_close(found, want)
    finally:
        SCALE.zero_()


NUMBERS = {"scale": 1.0}
NUMBER = 1.0


def of_a_number(kind: str, numbers: dict[str, float], listed: list[float]) -> Any:
    """A loss with factors that stand around it."""
    number, array = listed[0], np.ones(1)

    def factor() -> float:
        return number

    def squares(output: Tensor, y: Tensor, default: list[float] = listed) -> Tensor:
        if kind == "default":
            return default[0] * output.square().sum(1).mean()
        return factor() * output.square().sum(1).mean()

    made: dict[str, Any] = {
        "number": lambda o, t: number * o.square().sum(1).mean(),
        "mapping": lambda o, t: numbers["scale"] * o.square().sum(1).mean(),
        "list": lambda o, t: listed[0] * o.square().sum(1).mean(),
        "global mapping": lambda o, t: NUMBERS["scale"] * o.square().sum(1).mean(),
        "global number": lambda o, t: NUMBER * o.square().sum(1).mean(),
        "helper": squares,
        "default": squares,
        "partial": functools.partial(lambda s, o, t: s[0] * squares(o, t), listed),
        "by functions": vl.Loss(lambda o, t: numbers["scale"] * o.square().sum(1)),
        "array": lambda o, t: float(array[0]) * o.square().sum(1).mean(),
        "array as a tensor": lambda o, t: (
            torch.from_numpy(array)[0] * o.square().sum(1).mean()
        ),
        "array of a partial": functools.partial(
            lambda a, o, t: float(a[0]) * o.square().sum(1).mean(), array
        ),
    }

    def changed() -> None:
        nonlocal number
        number = numbers["scale"] = listed[0] = array[0] = 3.0

    return made[kind], changed


@pytest.mark.parametrize(
    "kind",
    [
        *("number", "mapping", "list", "global mapping", "global number"),
        *("helper", "default", "partial", "by functions"),
        *("array", "array as a tensor", "array of a partial"),
    ],
)
def test_numbers_around_a_loss_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a loop over some, whose variable has the last one in the end."""
    net, data = toy()
    loss, changed = of_a_number(kind, {"scale": 1.0}, [1.0])
    risk = vl.EmpiricalRisk(net, loss, data, reduction="mean")
    f = net(data[0])
    value = f.square().sum(1).mean()
    slope = torch.autograd.grad(value, list(net.parameters()))
    changed()
    monkeypatch.setitem(NUMBERS, "scale", 3.0)
    monkeypatch.setitem(globals(), "NUMBER", 3.0)
    torch.testing.assert_close(risk.value(), value.detach())
    torch.testing.assert_close(risk.gradient(), risk.flatten(slope))
    J = vl.Jacobian(risk).to_dense()
    torch.testing.assert_close(vl.GGN(risk).to_dense(), J.T @ J * (2 / 6))
    later = vl.EmpiricalRisk(net, loss, data, reduction="mean")
    torch.testing.assert_close(later.value() > risk.value(), torch.tensor(True))


def of_a_global_number(output: Tensor, y: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return NUMBER * output.square().sum(1).mean()


class OfAGlobalNumber(nn.Module):
    reduction = "mean"

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return NUMBER * output.square().sum(1).mean()


def through_a_helper(output: Tensor, y: Tensor) -> Tensor:
    return 1.0 * of_a_global_number(output, y)


class ThroughAHelper(nn.Module):
    reduction = "mean"

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return of_a_global_number(output, y)


CALLS = 0


@pytest.mark.parametrize(
    "loss",
    [
        of_a_global_number,
        functools.partial(of_a_global_number),
        OfAGlobalNumber(),
        vl.Loss(of_a_global_number),
        through_a_helper,
        ThroughAHelper(),
    ],
)
def test_global_numbers_that_a_named_loss_reads_must_stay(
    loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that is pickled by its name cannot have numbers of its own."""
    net, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data, reduction="mean")
    before = results(risk)
    again = pickle.loads(pickle.dumps(risk))
    monkeypatch.setitem(globals(), "mean", 3.0)  # an attribute has that name, too
    for one in (risk, again):
        for found, expected in zip(results(one), before, strict=True):
            torch.testing.assert_close(found, expected)
    G, x = vl.GGN(risk), torch.ones(risk.num_params, dtype=torch.float64)
    monkeypatch.setitem(globals(), "NUMBER", 3.0)
    asked = [risk.gradient, lambda: G @ x, lambda: vl.Hessian(risk) @ x]
    for ask in asked:
        with pytest.raises(ValueError, match=r"'NUMBER', which was 1\.0 .* and is 3"):
            ask()


SETTINGS = {"beta": 1.0, "step": 0.0}
OPTIONS, LOG = types.SimpleNamespace(beta=1.0, step=0.0), [0.0]
COUNTED: list[float] = []


def of_a_mapping(output: Tensor, y: Tensor) -> Tensor:
    return SETTINGS["beta"] * output.square().sum(1).mean()


def of_an_object(output: Tensor, y: Tensor) -> Tensor:
    return OPTIONS.beta * output.square().sum(1).mean()


def through_both(output: Tensor, y: Tensor) -> Tensor:
    return 0.5 * of_a_mapping(output, y) + 0.5 * of_an_object(output, y)


class OfAnObject(nn.Module):
    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.options = OPTIONS

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return self.options.beta * output.square().sum(1).mean()


def around_an_object() -> Any:
    options = OPTIONS
    return lambda output, y: options.beta * output.square().sum(1).mean()


@pytest.mark.parametrize(
    "build",
    [
        lambda: of_a_mapping,
        lambda: of_an_object,
        lambda: through_both,
        OfAnObject,
        around_an_object,
        lambda: lambda output, y: of_an_object(output, y),
    ],
)
def test_numbers_in_what_a_loss_reads_must_stay(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = toy()
    risk = vl.EmpiricalRisk(net, build(), data, reduction="mean")
    value = net(data[0]).square().sum(1).mean()
    slope = torch.autograd.grad(value, list(net.parameters()))
    torch.testing.assert_close(risk.gradient(), risk.flatten(slope))
    G, x = vl.GGN(risk), torch.ones(risk.num_params, dtype=torch.float64)
    before = G @ x
    monkeypatch.setitem(SETTINGS, "step", 1.0)  # which the loss does not read
    monkeypatch.setattr(OPTIONS, "step", 1.0)
    torch.testing.assert_close(G @ x, before)
    monkeypatch.setitem(SETTINGS, "beta", 3.0)
    monkeypatch.setattr(OPTIONS, "beta", 3.0)
    for ask in (risk.gradient, lambda: G @ x, lambda: vl.Hessian(risk) @ x):
        with pytest.raises(ValueError, match=r"whose 'beta' was 1\.0 .* and is 3"):
            ask()


NESTED: dict[str, Any] = {
    "loss": {"beta": 1.0, "step": 0.0, "sizes": [1.0, 2.0]},
    "of": types.SimpleNamespace(inner=types.SimpleNamespace(beta=1.0, step=0.0)),
    "log": {"step": 0.0},
    "table": [[1.0], ([2.0, 1.0], 0.5)],
}


def of_nested(output: Tensor, y: Tensor) -> Tensor:
    scale = (
        NESTED["loss"]["beta"] * NESTED["of"].inner.beta * NESTED["loss"]["sizes"][0]
    ) * NESTED["table"][1][0][1]
    return scale * output.square().sum(1).mean()


@pytest.mark.parametrize(
    "change, name",
    [
        (
            lambda to: to.setitem(NESTED["loss"], "beta", 3.0),
            r"\['loss'\], whose 'beta'",
        ),
        (
            lambda to: to.setitem(NESTED, "loss", {"beta": 3.0}),
            r"\['loss'\], whose 'be",
        ),
        (lambda to: to.setattr(NESTED["of"].inner, "beta", 3.0), r"\['inner'\], whose"),
        (
            lambda to: to.setitem(NESTED["loss"], "sizes", [3.0]),
            r"\['sizes'\], whose 0",
        ),
        (
            lambda to: to.setitem(NESTED, "table", [[1.0], ([2.0, 3.0], 0.5)]),
            r"\['table'\]\[1\]\[0\], whose 1",
        ),
        (
            lambda to: to.setitem(NESTED, "table", [[1.0]]),
            r"\['table'\]\[1\], whose 1",
        ),
        (lambda to: to.delitem(NESTED, "of"), r"\['of'\]\['inner'\], whose 'beta'"),
    ],
)
def test_numbers_in_parts_of_what_a_loss_reads_must_stay(
    change: Callable[[Any], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = toy()
    risk = vl.EmpiricalRisk(net, of_nested, data, reduction="mean")
    x = torch.ones(risk.num_params, dtype=torch.float64)
    G = vl.GGN(risk)
    before = G @ x
    monkeypatch.setitem(NESTED["loss"], "step", 1.0)  # which the loss does not read
    monkeypatch.setitem(NESTED["log"], "step", 1.0)
    monkeypatch.setattr(NESTED["of"].inner, "step", 1.0)
    torch.testing.assert_close(G @ x, before)
    change(monkeypatch)
    with pytest.raises(ValueError, match="reads 'NESTED'" + ".*" + name):
        G @ x


def logging(output: Tensor, y: Tensor) -> Tensor:
    value = output.square().sum(1).mean()
    if len(COUNTED) % 5 == 4:  # not in the first calls
        LOG.append(value.item())
    COUNTED.append(0.0)
    SETTINGS["calls"] = SETTINGS.get("calls", 0.0) + 1.0
    return value


def test_losses_may_write_down_what_they_compute() -> None:
    net, data = toy()
    halves = [tuple(part[:3] for part in data), tuple(part[3:] for part in data)]
    value = net(data[0]).square().sum(1).mean()
    slope = torch.autograd.grad(value, list(net.parameters()))
    for given in (data, halves):
        risk = vl.EmpiricalRisk(net, logging, given, reduction="mean")
        for _ in range(2):
            torch.testing.assert_close(risk.gradient(), risk.flatten(slope))
    assert SETTINGS.pop("calls") > 0 and len(LOG) > 1


@pytest.mark.parametrize("kind", ["module", "function", "traced"])
def test_losses_that_torch_has_compiled(kind: str) -> None:
    def squares(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().mean()

    net, (X, _) = toy()
    y = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
    loss = {
        "module": lambda: torch.jit.script(nn.MSELoss()),
        "function": lambda: torch.jit.script(squares),
        "traced": lambda: torch.jit.trace(squares, (y, y), check_trace=False),
    }[kind]()
    risk = vl.EmpiricalRisk(net, loss, (X, y), reduction="mean")
    plain = vl.EmpiricalRisk(net, nn.MSELoss(), (X, y))
    for found, expected in zip(results(risk), results(plain), strict=True):
        torch.testing.assert_close(found, expected)


class Holder:
    """No module."""

    def __init__(self, scale: Tensor, array: Any = None) -> None:
        self.scale, self.array = scale, array


@pytest.mark.parametrize("kind", ["tensor", "with grad", "array", "as_tensor"])
def test_what_cannot_be_copied_must_not_change(kind: str) -> None:
    net, data = toy()
    array = np.zeros(1)
    holder = Holder(torch.from_numpy(array), array)
    holder.scale.requires_grad_(kind == "with grad")

    def loss(output: Tensor, y: Tensor) -> Tensor:
        scale = holder.scale
        if kind == "array":
            scale = torch.from_numpy(holder.array)
        elif kind == "as_tensor":
            scale = torch.as_tensor(holder.array)
        return F.cross_entropy(scale.exp() * output, y)

    risk = vl.EmpiricalRisk(net, loss, data, reduction="mean")
    results(risk)
    H, x = vl.Hessian(risk), torch.ones(risk.num_params, dtype=torch.float64)
    H @ x  # on a graph that is kept
    array += 1.0
    with pytest.raises(ValueError, match=r"loss: .* it is not what it was"):
        H @ x
    for use in (
        risk.gradient,
        lambda: vl.GGN(risk) @ torch.ones(risk.num_params, dtype=torch.float64),
        lambda: vl.Hessian(risk) @ torch.ones(risk.num_params, dtype=torch.float64),
    ):
        with pytest.raises(ValueError, match=r"loss: .* it is not what it was"):
            use()


# Losses that reach the model ----------------------------------------------------------


class Regularised(nn.Module):
    reduction = "mean"

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return F.cross_entropy(output, y) + 0.1 * penalty


def through_a_method(net: Any) -> Any:
    net.penalised = lambda o, t: F.cross_entropy(o, t) + net[0].weight.norm()
    return net.penalised


def through_what_was_computed(net: Any) -> Any:
    flat = parameters_to_vector(net.parameters())
    return lambda o, t: F.cross_entropy(o, t) + flat.square().sum()


def through_an_object(net: Any) -> Any:
    holder = Holder(net[2].bias)
    return lambda o, t: F.cross_entropy(o, t) + holder.scale.square().sum()


def through_an_object_computed(net: Any) -> Any:
    holder = Holder(net[2].bias.exp())
    return lambda o, t: F.cross_entropy(o, t) + holder.scale.sum()


def frozen_parameter(net: Any) -> Any:
    net[0].bias.requires_grad_(False)
    return lambda o, t: F.cross_entropy(o, t) + net[0].bias.square().sum()


REACHING: dict[str, Callable[[Any], Any]] = {
    "module": Regularised,
    "function": lambda net: (lambda loss: lambda o, t: loss(o, t))(Regularised(net)),
    "partial": lambda net: functools.partial(
        lambda p, o, t: F.cross_entropy(o, t) + p.norm(), net[0].weight
    ),
    "method": through_a_method,
    "computed": through_what_was_computed,
    "object": through_an_object,
    "object, computed": through_an_object_computed,
    "frozen": frozen_parameter,
    "weight of classes": lambda net: nn.CrossEntropyLoss(weight=net[2].bias),
    "computed weight": lambda net: nn.CrossEntropyLoss(weight=net[2].bias.exp()),
}


@pytest.mark.parametrize("kind", REACHING)
def test_a_loss_that_reaches_the_model_is_refused(kind: str) -> None:
    net, data = toy()
    with torch.no_grad():
        net[2].bias.abs_()
    loss = REACHING[kind](net)
    with pytest.raises(ValueError, match=r"loss: .* parameters of the model.*Identity"):
        vl.EmpiricalRisk(net, loss, data, reduction="mean")


def test_a_loss_that_reaches_given_parameters_is_refused() -> None:
    w = torch.randn(3, 4, dtype=torch.float64)

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ params["w"]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) + w.square().sum()

    with pytest.raises(ValueError, match=r"loss: .* parameters of the model"):
        vl.EmpiricalRisk(model, loss, toy()[1], {"w": w}, reduction="mean")


def test_what_the_error_says_to_do() -> None:
    """GGN + τ I, and the gradient by hand, are those of the regularised risk."""
    net, data = toy()
    tau, params = 0.2, list(net.parameters())
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
    total = Regularised(net)(net(data[0]), data[1])
    grads = torch.autograd.grad(total, params, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in grads])
    x = torch.linspace(-1, 1, risk.num_params, dtype=torch.float64)
    theta = torch.cat([p.detach().reshape(-1) for p in params])
    torch.testing.assert_close(risk.gradient() + tau * theta, gradient.detach())
    Hx = torch.cat([h.reshape(-1) for h in torch.autograd.grad(gradient, params, x)])
    H = vl.Hessian(risk) + tau * vl.Identity(risk.num_params)
    torch.testing.assert_close(H @ x, Hx)


@pytest.mark.parametrize("kind", ["method", "buffer", "teacher", "holds it"])
def test_losses_that_may_stay(kind: str) -> None:
    """Those that use other things of the model, or only have a way to it."""
    net, data = toy()
    net.classes = 4  # type: ignore[assignment]
    net.register_buffer("weights", torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    teacher = copy.deepcopy(net)

    def method(m: Any, o: Tensor, t: Tensor) -> Tensor:
        m.last = F.cross_entropy(o[:, : m.classes], t)
        return m.last

    loss = {
        "method": method.__get__(net),
        "buffer": lambda o, t: F.cross_entropy(
            o, t, weight=net.weights, reduction="sum"
        ),
        "teacher": lambda o, t: F.cross_entropy(
            o, teacher.weights * o.detach().softmax(1)
        ),
        "holds it": lambda o, t: F.cross_entropy(o, t) * len(list(net.parameters())),
    }[kind]
    reduction = "sum" if kind == "buffer" else "mean"
    risk = vl.EmpiricalRisk(net, loss, data, reduction=reduction)
    (X, y), params = data, list(net.parameters())
    grads = torch.autograd.grad(loss(net(X), y), params)
    expected = torch.cat([g.reshape(-1) for g in grads])
    vars(net).pop("last", None)
    torch.testing.assert_close(risk.gradient(), expected)
    assert "last" not in vars(net)
    net.weights.zero_()
    torch.testing.assert_close(risk.gradient(), expected)


@pytest.mark.parametrize("make", [Scaled, Anchored])
def test_risks_with_such_losses_travel(make: Callable[[], nn.Module]) -> None:
    net, data = toy()
    risk = vl.EmpiricalRisk(net, make(), data)
    for again in (copy.deepcopy(risk), pickle.loads(pickle.dumps(risk))):
        for found, want in zip(results(again), results(risk), strict=True):
            torch.testing.assert_close(found, want)
