"""The risk at other parameters against a risk that is made anew there."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests.pairs import in_turn
from vivit_linop.risk import first_pass
from vivit_linop.risk.model.functional import FunctionalModel

X, Y = torch.rand(12, 5, dtype=torch.float64), torch.arange(12) % 3
LOSS = nn.CrossEntropyLoss()


def make(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    inner = layers or (nn.Tanh(),)
    return nn.Sequential(nn.Linear(5, 4), *inner, nn.Linear(4, 3)).double().eval()


def train(net: nn.Module, data: tuple[Tensor, Tensor] = (X, Y)) -> None:
    """A few steps in training mode, which it is left in."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        LOSS(net(data[0]), data[1]).backward()
        optimizer.step()


def check_same(risk: vl.EmpiricalRisk, fresh: vl.EmpiricalRisk) -> None:
    x = torch.arange(fresh.num_params, dtype=risk.dtype).cos()
    for found, expected in [
        (risk.value(), fresh.value()),
        (risk.gradient(), fresh.gradient()),
        (vl.GGN(risk) @ x, vl.GGN(fresh) @ x),
        (vl.GGN(risk).eigvalsh(), vl.GGN(fresh).eigvalsh()),
        (vl.Hessian(risk) @ x, vl.Hessian(fresh) @ x),
        (
            vl.PerSampleGradients(risk).to_dense(),
            vl.PerSampleGradients(fresh).to_dense(),
        ),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_it_follows_the_model_through_training() -> None:
    net = make()
    risk = vl.EmpiricalRisk(net, LOSS, [(X[:7], Y[:7]), (X[7:], Y[7:])])
    before = risk.gradient()
    vl.GGN(risk).eigvalsh()  # the structure of the net is known from then on
    for _ in range(2):
        train(net)
        now = risk.at()
        check_same(now, vl.EmpiricalRisk(net, LOSS, (X, Y)))
    assert torch.equal(risk.gradient(), before)  # the risk that it came from stays
    check_same(now.at(list(risk.params.values())), risk)


@pytest.mark.parametrize("form", ["vector", "list", "names", "float32"])
def test_parameters_may_be_given(form: str) -> None:
    net, other = make(), make()
    train(other)
    other.eval()
    risk, fresh = (vl.EmpiricalRisk(n, LOSS, (X, Y)) for n in (net, other))
    theta = {name: p.detach() for name, p in other.named_parameters()}
    given: Any = {
        "vector": fresh.flatten(theta),
        "list": [p for p in other.parameters()],
        "names": theta,
        "float32": risk.flatten(theta).float(),
    }[form]
    now = risk.at(given)
    if form == "float32":
        assert now.dtype == now.value().dtype == torch.float64
        torch.testing.assert_close(now.value(), fresh.value(), rtol=1e-6, atol=0)
        return
    check_same(now, fresh)
    for p in other.parameters():  # copied
        p.data.zero_()
    check_same(now, fresh)


def test_buffers_and_frozen_parameters_are_the_present_ones() -> None:
    """Running statistics move in training; the risk stays in eval mode."""
    net = make(nn.BatchNorm1d(4), nn.Tanh())
    net[0].weight.requires_grad_(False)
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    net[0].weight.data.mul_(1.5)
    train(net)
    now = risk.at()
    check_same(now, vl.EmpiricalRisk(net.eval(), LOSS, (X, Y)))
    # And from there again, also where only what is given changes.
    theta = now.flatten(list(now.params.values())) + 0.1
    given = dict(zip(now.params, now.unflatten(theta), strict=True))
    check_same(now.at(theta), vl.EmpiricalRisk(net, LOSS, (X, Y), given))
    train(net)
    check_same(now.at(), vl.EmpiricalRisk(net.eval(), LOSS, (X, Y)))


def test_backpack_gets_the_module_at_these_parameters() -> None:
    net = make()
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    train(net)
    fresh = vl.EmpiricalRisk(net.eval(), LOSS, (X, Y))
    for found, expected in zip(
        vl.KFRA(risk.at()).blocks, vl.KFRA(fresh).blocks, strict=True
    ):
        torch.testing.assert_close(found.to_dense(), expected.to_dense())


def replace(net: nn.Module) -> None:
    state = {name: p + 0.1 for name, p in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def in_place(net: nn.Module) -> None:
    net[2].weight.data = torch.ones(3, 4, dtype=torch.float64)


@pytest.mark.parametrize("change", [replace, in_place])
def test_parameters_that_were_exchanged(change: Callable[[nn.Module], None]) -> None:
    net = make()
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    change(net)
    check_same(risk.at(), vl.EmpiricalRisk(net, LOSS, (X, Y)))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a hook": lambda net: net[1].register_forward_hook(lambda m, args, out: 2 * out),
    "a hook before": lambda net: net.register_forward_pre_hook(
        lambda m, args: (args[0].sin(),)
    ),
    "a hook on gradients": lambda net: net[0].register_full_backward_hook(
        lambda m, inputs, outputs: tuple(g if g is None else 2 * g for g in inputs)
    ),
    "another layer": lambda net: net.__setitem__(1, nn.ReLU()),
    "one more layer": lambda net: net.append(nn.Tanh()),
    "one layer less": lambda net: net.__delitem__(1),
    "a forward of its own": lambda net: setattr(net[1], "forward", torch.sin),
    "a parametrization": lambda net: parametrize.register_parametrization(
        net[0], "weight", nn.Tanh()
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_has_become_another_function(name: str) -> None:
    net = make()
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    before = risk.at().gradient()
    CHANGES[name](net)
    if name in ("one layer less", "a parametrization"):
        with pytest.raises(ValueError, match=r"^parameters: .*Make a new risk"):
            risk.at()
    elif name == "a hook on gradients":
        fresh = vl.EmpiricalRisk(net, LOSS, (X, Y))
        assert torch.equal(risk.at().gradient(), fresh.gradient())
    else:
        check_same(risk.at(), vl.EmpiricalRisk(net, LOSS, (X, Y)))
    # What the risk is of has stayed.
    assert torch.equal(risk.gradient(), before)


def test_hooks_that_were_there_stay() -> None:
    net = make()
    handle = net[1].register_forward_hook(lambda m, args, out: 2 * out)
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    train(net)
    check_same(risk.at(), vl.EmpiricalRisk(net, LOSS, (X, Y)))
    handle.remove()
    check_same(risk.at(), vl.EmpiricalRisk(net, LOSS, (X, Y)))


def test_some_parameters_and_foreign_ones() -> None:
    net = make()
    some = vl.EmpiricalRisk(net, LOSS, (X, Y), [net[2].weight])
    foreign = {"2.weight": torch.zeros(3, 4, dtype=torch.float64)}
    own = vl.EmpiricalRisk(net, LOSS, (X, Y), foreign)
    train(net)
    check_same(some.at(), vl.EmpiricalRisk(net.eval(), LOSS, (X, Y), [net[2].weight]))
    foreign["2.weight"] += 0.3  # not the module's: it stays with its own tensors
    check_same(own.at(), vl.EmpiricalRisk(net, LOSS, (X, Y), foreign))


def test_a_function_of_parameters() -> None:
    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ params["a"]) @ params["b"]

    params = {
        "a": torch.rand(5, 4, dtype=torch.float64),
        "b": torch.rand(4, 3, dtype=torch.float64),
    }
    risk = vl.EmpiricalRisk(model, LOSS, (X, Y), params)
    risk.add_to_(params, -risk.gradient())
    check_same(risk.at(), vl.EmpiricalRisk(model, LOSS, (X, Y), params))
    assert risk.at().value() < risk.value()


@pytest.mark.parametrize("change", ["values", "a hook", "of a function", "travel"])
def test_risks_over_some_parameters_follow_what_was_given(change: str) -> None:
    """Also tensors in the place of the module's, which it does not train."""
    net = make()
    of_function = change in ("of a function", "travel")
    given = {name: p.detach().clone() for name, p in net.named_parameters()}
    shift = [0.0]

    def function(params: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(net, params, (x,))
        return output + shift[0]

    model: Any = function if of_function else net
    risk = vl.EmpiricalRisk(model, LOSS, (X, Y), given)
    last = risk.over(["2.weight"])
    if change == "travel":
        last = copy.deepcopy(last)
        assert last.is_current()
        check_same(
            last.at(), vl.EmpiricalRisk(model, LOSS, (X, Y), given).over(["2.weight"])
        )
        return
    assert last.is_current()
    given["0.weight"] += 0.3
    assert not last.is_current()
    if change == "a hook":
        net.register_forward_hook(lambda module, args, output: output.sin())
    if change == "of a function":
        check_same(
            last.at(), vl.EmpiricalRisk(model, LOSS, (X, Y), given).over(["2.weight"])
        )
        shift[0] = 0.5
    fresh = vl.EmpiricalRisk(model, LOSS, (X, Y), given).over(["2.weight"])
    check_same(last.at(), fresh)


def test_it_is_one_evaluation_and_knows_the_structure() -> None:
    net, calls = make(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    calls.clear()
    vl.GGN(risk).eigvalsh()
    assert not calls  # of the run of construction
    for _ in range(2):
        now = risk.at()
        assert len(calls) == 1
        vl.GGN(now).eigvalsh()
        assert len(calls) == 1  # by the same run
        now.gradient()
        assert len(calls) == 2
        calls.clear()


def test_subsets_loaders_and_travel() -> None:
    net = make()
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    risk = vl.EmpiricalRisk(net, LOSS, loader)
    part, there = risk.subset([3, 8]), pickle.loads(pickle.dumps(risk))
    train(net)
    fresh = vl.EmpiricalRisk(net.eval(), LOSS, loader)
    check_same(risk.at(), fresh)
    check_same(part.at(), fresh.subset([3, 8]))
    with pytest.raises(ValueError, match=r"parameters: the module .* is gone"):
        there.at()
    check_same(there.at(fresh.params), fresh)


# What else changes of a model ---------------------------------------------------------


class Scaled(nn.Module):
    """A layer with attributes, and a function that leads to a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.factor, self.options = 1.0, {"shifts": [0.0, 0.5]}
        self.cut, self.last = False, torch.zeros(())
        self.gain = torch.ones(4, dtype=torch.float64)
        self.function = functools.partial(F.linear, bias=torch.zeros(4).double())
        self.act: Any = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        shift = sum(self.options["shifts"])
        x = self.act(self.inner(x)) * self.factor * self.gain + shift
        self.last = x.detach()
        return self.function(x.detach() if self.cut else x, torch.eye(4).double())


def rebound(layer: Scaled) -> None:
    layer.factor = 2.0


def nested(layer: Scaled) -> None:
    layer.options["shifts"][1] = -3.0


def written(layer: Scaled) -> None:
    layer.gain[2] = 7.0


def exchanged(layer: Scaled) -> None:
    layer.act = nn.Sigmoid()


def another_function(layer: Scaled) -> None:
    layer.function = lambda x, W: x.square() @ W


def hooked(layer: Scaled) -> None:
    layer.register_forward_hook(lambda module, args, output: output.sin())


def derivatives_alone(layer: Scaled) -> None:
    layer.cut = True  # the same outputs


OTHERS = [
    *(rebound, nested, written, exchanged, another_function, hooked),
    derivatives_alone,
]


@pytest.mark.parametrize(("change", "loader"), in_turn(OTHERS, [False, True]))
def test_what_else_has_changed_of_the_model(
    change: Callable[[Scaled], None], loader: bool
) -> None:
    """It is seen, and the model validated anew; modes are those of before."""
    layer = Scaled()
    net = make(layer, nn.Dropout(0.5), nn.BatchNorm1d(4))
    data: Any = (X, Y)
    if loader:
        data = DataLoader(TensorDataset(X, Y), batch_size=5)
    risk = vl.EmpiricalRisk(net, LOSS, data)
    vl.GGN(risk).eigvalsh()
    theta, before = risk.flatten(risk.params), risk.gradient()
    train(net)
    change(layer)
    now, fresh = risk.at(), vl.EmpiricalRisk(net.eval(), LOSS, (X, Y))
    check_same(now, fresh)
    net.train()
    check_same(now.at(), fresh)
    # The function of then, at parameters that are given.
    assert torch.equal(risk.at(theta).gradient(), before)


def test_without_a_change_nothing_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2))
    net = nn.Sequential(net[0], net[1], net[2], net[4]).double().eval()
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    train(net)
    monkeypatch.setattr(first_pass, "independent_samples", None)
    monkeypatch.setattr(FunctionalModel, "anew", None)
    risk.at().at()


@pytest.mark.parametrize("kind", ["closure", "object", "predict"])
def test_functions_that_lead_to_what_has_changed(kind: str) -> None:
    layer, outer = Scaled().double(), 1.0

    class Model:
        power = 1.0

        def __call__(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
            return params["a"] * layer(x).sin() ** self.power

    def closure(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return outer * params["a"] * layer(x).sin()

    called = Model()

    def build() -> vl.EmpiricalRisk:
        if kind == "predict":
            net, data = nn.Linear(4, 4, bias=False).double(), (x, y)
            torch.nn.init.eye_(net.weight)
            risk = vl.EmpiricalRisk(net, LOSS, data, predict=called_with_module)
            kept.append(net)
            return risk
        model = closure if kind == "closure" else called
        return vl.EmpiricalRisk(model, LOSS, (x, y), params)

    def called_with_module(module: nn.Module, x: Tensor) -> Tensor:
        return outer * layer(module(x))

    kept: list[nn.Module] = []
    x, y = X[:, :4], Y
    params = {"a": torch.ones(4, dtype=torch.float64)}
    risk = build()
    torch.testing.assert_close(risk.at().value(), risk.value())
    layer.factor, outer, called.power = 0.5, 7.0, 3.0
    assert not torch.isclose(risk.at().value(), risk.value(), rtol=1e-3)
    check_same(risk.at(), build())


def test_changes_that_make_no_risk_are_refused() -> None:
    layer = Scaled()
    net = make(layer)
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    layer.act = nn.PReLU().double()
    with pytest.raises(ValueError, match=r"parameters: the model has '1\.act\.weight'"):
        risk.at()
    layer.act = nn.Tanh()
    layer.function = lambda x, W: x - x.mean(0)  # mixes samples
    with pytest.raises(ValueError, match="a sample depend on the other"):
        risk.at()
    layer.function, inputs = F.linear, X.clone()
    risk = vl.EmpiricalRisk(net, LOSS, (inputs, Y))
    layer.factor = 3.0
    inputs[3] += 1.0
    with pytest.raises(ValueError, match="data: batch 0 is not what it was"):
        risk.at()


# What is refused ----------------------------------------------------------------------


def changed(X: Tensor, kind: str) -> None:
    if kind == "noise":
        X += 0.1 * torch.rand_like(X)
    elif kind == "flip":
        X.copy_(X.flip(1))
    else:
        X.copy_(X.roll(1, 0))


@pytest.mark.parametrize("kind", ["noise", "flip", "roll"])
@pytest.mark.parametrize("integers", [False, True])
def test_changed_inputs(kind: str, integers: bool) -> None:
    own = (100 * X).long() if integers else X.clone()
    net = make()
    if integers:
        torch.manual_seed(0)
        mean = nn.Flatten()
        net = nn.Sequential(nn.Embedding(120, 2), mean, nn.Linear(10, 3)).double()
    risk = vl.EmpiricalRisk(net, LOSS, (own, Y))
    risk.at()
    if integers and kind == "noise":
        own[3, 1] += 1
    else:
        changed(own, kind)
    with pytest.raises(ValueError, match="data: batch 0 is not what it was"):
        risk.at()


def test_changed_targets_and_counts() -> None:
    net, y, batches = make(), Y.clone(), [(X, Y)]
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    y[4] += 1 - 2 * (y[4] == 2).long()
    with pytest.raises(ValueError, match="data: batch 0 is not what it was"):
        risk.at()
    risk = vl.EmpiricalRisk(net, LOSS, batches)
    batches.append((X, Y))
    with pytest.raises(ValueError, match="data: there"):
        risk.at()
    del batches[:]
    with pytest.raises(ValueError, match="data: there are 0 batches"):
        risk.at()


def test_bad_parameters() -> None:
    net = make(nn.ReLU())
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    D = risk.num_params
    for given, message in [
        (torch.zeros(D - 1), "parameters: needs"),
        (torch.zeros(D, 2), "parameters: one vector"),
        ([torch.zeros(2)], "parameters: needs one for each"),
        ({"a": torch.zeros(2)}, "parameters: names are"),
        (torch.full((D,), torch.nan), "parameters: '0.weight' holds NaN"),
        (torch.full((D,), 1e200, dtype=torch.float64), "parameters: "),
    ]:
        with pytest.raises(ValueError, match=message):
            risk.at(given)
    for argument, function in (("parameters", risk.at), ("tensors", risk.flatten)):
        with pytest.raises(TypeError, match=rf"torch.from_numpy\({argument}\)"):
            function(np.zeros(D))
    net[0] = nn.Linear(5, 6)
    with pytest.raises(ValueError, match=r"'0.weight' .* was \[4, 5\]"):
        risk.at()
    del net, given
    with pytest.raises(ValueError, match="is gone"):
        risk.at()


def test_bad_steps() -> None:
    net = make()
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    before = copy.deepcopy(net.state_dict())
    g = risk.gradient()
    with pytest.raises(ValueError, match="step: one vector"):
        risk.add_to_(net, g.unsqueeze(1))
    with pytest.raises(ValueError, match="step: needs"):
        risk.add_to_(net, g[1:])
    with pytest.raises(ValueError, match=r"model: needs '2\.weight' .* has none"):
        risk.add_to_(net[:1], g)
    with pytest.raises(ValueError, match=r"model: needs '0\.weight' .* it has"):
        risk.add_to_(
            {name: p.mT if p.ndim > 1 else p for name, p in net.named_parameters()}, g
        )
    last = "2.bias"
    for found, what in [
        (before[last].long(), "int64"),
        (before[last].numpy(), "ndarray"),
        (before[last].to("meta"), "without values"),
    ]:
        with pytest.raises((TypeError, ValueError), match=rf"model: '{last}' .*{what}"):
            risk.add_to_({**dict(net.named_parameters()), last: found}, g)
    with pytest.raises(ValueError, match="step: a vector is on device 'meta'"):
        risk.add_to_(net, g.to("meta"))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    risk.add_to_(net, g)
    assert torch.equal(net[0].weight, before["0.weight"] + risk.unflatten(g)[0])
    assert net[0].weight.grad is None and net[0].weight.is_leaf


# Sparse state ------------------------------------------------------------------------


class Graph(nn.Module):
    """Mixes features by a sparse matrix, which is kept in one of three ways."""

    def __init__(self, matrix: Tensor, kept: str) -> None:
        super().__init__()
        self.layer = make()
        if kept == "buffer":
            self.register_buffer("matrix", matrix)
        else:
            frozen = nn.Parameter(matrix, requires_grad=False)
            self.matrix = frozen if kept == "parameter" else matrix

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer((self.matrix @ x.T).T)
        return out


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda matrix: matrix.to_sparse_coo(),
    "csr": lambda matrix: matrix.to_sparse_csr(),
    "csc": lambda matrix: matrix.to_sparse_csc(),
    "bsr": lambda matrix: matrix.to_sparse_bsr((1, 1)),
}


@pytest.mark.parametrize(
    ("layout", "kept"),
    [
        ("coo", "buffer"),
        ("coo", "attribute"),
        ("csr", "buffer"),
        ("csr", "parameter"),
        ("csc", "attribute"),
        ("bsr", "parameter"),
    ],
)
def test_sparse_matrices_in_a_net(layout: str, kept: str) -> None:
    A = torch.diag(torch.linspace(0.5, 1.5, 5, dtype=torch.float64))
    A[0, 3] = -1.0
    net = Graph(LAYOUTS[layout](A), kept)
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    x = torch.arange(risk.num_params, dtype=torch.float64).cos()
    once, twice = (vl.GGN(net.layer, LOSS, (c * X @ A.T, Y)) @ x for c in (1.0, 2.0))
    torch.testing.assert_close(vl.GGN(risk) @ x, once)
    assert risk.is_current()
    values = net.matrix._values() if layout == "coo" else net.matrix.values()
    values.mul_(2.0)
    torch.testing.assert_close(vl.GGN(risk.on((X, Y))) @ x, once)  # it has a copy
    assert not risk.is_current()
    torch.testing.assert_close(vl.GGN(risk.at()) @ x, twice)


@pytest.mark.parametrize("change", [0.0, 1.0])  # of values, or of entries too
def test_sparse_buffers_that_a_pass_writes_into(change: float) -> None:
    net = Graph(torch.eye(5, dtype=torch.float64).to_sparse_coo(), "buffer")
    new = change * torch.ones(5, 5, dtype=torch.float64)
    more = (new + 0.1 * torch.eye(5)).to_sparse_coo()

    def add(net: Graph, args: Any, out: Tensor) -> None:
        net.matrix.add_(more)

    net.register_forward_hook(add)
    with pytest.raises(ValueError, match="model: its forward pass changes the buf"):
        vl.EmpiricalRisk(net, LOSS, (X, Y))
