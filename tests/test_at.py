"""The risk at other parameters against a risk that is made anew there."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl

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
    with pytest.raises(ValueError, match=r"^parameters: .*Make a new risk"):
        risk.at()
    # What the risk is of has stayed, and a new one is of the model as it is now.
    assert torch.equal(risk.gradient(), before)
    if name == "a hook on gradients":
        return
    new = vl.EmpiricalRisk(net, LOSS, (X, Y))
    torch.testing.assert_close(new.value(), LOSS(net(X), Y).detach())
    assert torch.equal(new.at().gradient(), new.gradient())


def test_hooks_that_were_there_stay() -> None:
    net = make()
    handle = net[1].register_forward_hook(lambda m, args, out: 2 * out)
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    train(net)
    check_same(risk.at(), vl.EmpiricalRisk(net, LOSS, (X, Y)))
    handle.remove()
    with pytest.raises(ValueError, match=r"^parameters: 1 has other hooks"):
        risk.at()


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


def test_it_is_one_evaluation_and_knows_the_structure() -> None:
    net, calls = make(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    risk = vl.EmpiricalRisk(net, LOSS, (X, Y))
    calls.clear()
    vl.GGN(risk).eigvalsh()
    first = len(calls)
    calls.clear()
    now = risk.at()
    assert len(calls) == 1
    calls.clear()
    vl.GGN(now).eigvalsh()
    assert first <= len(calls) == 1  # that of construction serves the first


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
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    risk.add_to_(net, g)
    assert torch.equal(net[0].weight, before["0.weight"] + risk.unflatten(g)[0])
    assert net[0].weight.grad is None and net[0].weight.is_leaf
