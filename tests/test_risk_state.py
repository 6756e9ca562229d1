"""Risks stay the same function, and models that are none are refused."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import Lambda
from tests.comparing import jacobian
from tests.toys import guest_net, random_vector, toy, use_everything

# Operators are of the parameters at construction --------------------------------------


def _updates(net: nn.Sequential) -> Iterator[tuple[str, Callable[[], None]]]:
    def step() -> None:
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1.0)

    def data() -> None:
        for p in net.parameters():
            p.data.mul_(2.0)

    def replaced() -> None:
        net[0].weight = nn.Parameter(torch.zeros_like(net[0].weight))

    def buffers() -> None:
        net[1].running_mean.add_(1.0)
        net[1].running_var = 3.0 * net[1].running_var

    def frozen() -> None:
        for p in net.parameters():
            p.requires_grad_(False)

    def modes() -> None:
        net.train()

    def attributes() -> None:
        net[1].eps = 10.0

    yield from {
        "step": step,
        "data": data,
        "replaced": replaced,
        "buffers": buffers,
        "frozen": frozen,
        "modes": modes,
        "attributes": attributes,
    }.items()


@pytest.mark.parametrize("chosen", ["all", "last layer"])
@pytest.mark.parametrize("kind", [kind for kind, _ in _updates(guest_net())])
def test_operators_stay_when_the_model_changes(kind: str, chosen: str) -> None:
    """Also parameters that are not chosen, and buffers, are those at construction."""
    _, loss, data = toy()
    net = guest_net()
    net[0].weight.requires_grad_(True)
    params = None if chosen == "all" else list(net[4].parameters())
    expected = use_everything(
        vl.EmpiricalRisk(copy.deepcopy(net), loss, data, _same(net, params))
    )
    risk = vl.EmpiricalRisk(net, loss, data, params)
    dict(_updates(net))[kind]()
    for number, (got, want) in enumerate(
        zip(use_everything(risk), expected, strict=True)
    ):
        torch.testing.assert_close(
            got, want, rtol=1e-9, atol=1e-12, msg=lambda m, n=number: f"{n}: {m}"
        )


def _same(net: nn.Module, params: Any) -> Any:
    if params is None:
        return None
    names = {id(p): n for n, p in net.named_parameters()}
    return {names[id(p)]: p.detach().clone() for p in params}


def test_operators_stay_when_a_dict_of_parameters_changes() -> None:
    values = {"w": random_vector(4, 3)}

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["w"]).tanh()

    _, loss, data = toy()
    risk = vl.EmpiricalRisk(model, loss, data, values)
    expected = use_everything(vl.EmpiricalRisk(model, loss, data, dict(risk.params)))
    values["w"].zero_()
    values["other"] = torch.zeros(3)
    for got, want in zip(use_everything(risk), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_results_are_not_views_of_the_state() -> None:
    risk = vl.EmpiricalRisk(*toy())
    before = use_everything(risk)
    for result in (*use_everything(risk), vl.GGN(risk).eigh().eigenvalues):
        result.add_(1.0)
    G = vl.GGN(risk)
    G.eigvalsh().zero_()
    G.factor.gram.to_dense().zero_()
    G.diagonal().zero_()
    assert G.eigvalsh().max() > 0 and G.factor.gram.to_dense().norm() > 0
    for got, want in zip(use_everything(risk), before, strict=True):
        # Kept graphs may sum in another order than the first pass.
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# What is not one function of each sample ----------------------------------------------


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_of_a_loss_are_copied(name: str) -> None:
    net, _, (X, y) = toy()
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss: nn.Module = nn.CrossEntropyLoss(weight=weight)
    if name == "pos_weight":
        loss, y = (
            nn.BCEWithLogitsLoss(pos_weight=weight),
            torch.rand(len(X), 3).double(),
        )
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    value, gradient, diagonal = risk.value(), risk.gradient(), vl.GGN(risk).diagonal()
    weight.mul_(torch.tensor([5.0, 1.0, 1.0]))
    assert torch.equal(risk.gradient(), gradient)
    assert torch.equal(vl.GGN(risk).diagonal(), diagonal)
    assert torch.equal(risk.value_and_gradient()[0], value)


def test_a_layer_whose_input_is_overwritten() -> None:
    # As without hooks, a backward pass that would use the new values is an error.
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.clone()
        h = m.first(x)
        x.add_(1.0)
        return m.second(h.tanh()) + x[:, :1]

    _, loss, data = toy()
    net = Lambda(forward, first=nn.Linear(4, 3), second=nn.Linear(3, 3)).double()
    for use in (
        lambda r: r.gradient(),
        lambda r: vl.Jacobian(r) @ random_vector(27),
        lambda r: vl.Jacobian(r).T @ random_vector(r.num_samples * 3),
        lambda r: vl.GGN(r) @ random_vector(27),
    ):
        with pytest.raises(RuntimeError, match=r"in ?place"):
            use(vl.EmpiricalRisk(net, loss, data))


@pytest.mark.parametrize("where", ["beside", "inside", "unused"])
def test_a_parameter_that_is_a_buffer_too(where: str) -> None:
    """It is the parameter, by whichever of its names it is used."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.second(m.first(x).tanh())
        return hidden if where == "unused" else hidden @ owner(m).again

    def owner(m: Any) -> Any:
        return m.first if where == "inside" else m

    _, loss, (X, y) = toy()
    torch.manual_seed(0)
    net = Lambda(forward, first=nn.Linear(4, 3), second=nn.Linear(3, 3)).double()
    owner(net).register_buffer("again", net.second.weight)
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    (gradient,) = jacobian(loss(net(X), y), net.parameters())
    J = jacobian(net(X), net.parameters())
    torch.testing.assert_close(risk.gradient(), gradient)
    torch.testing.assert_close(vl.Jacobian(risk).to_dense(), J)
    with torch.no_grad():
        net.second.weight.mul_(2.0)
    torch.testing.assert_close(risk.at().value(), loss(net(X), y).detach())
    assert risk.at().is_current() and not risk.is_current()


@pytest.mark.parametrize("kind", ["all", "some", "over"])
def test_parameters_of_a_model_that_is_gone_are_freed(kind: str) -> None:
    net, loss, data = toy()
    known = [weakref.ref(p) for p in net.parameters()]
    some = [*net[0].parameters()] if kind == "some" else None
    risk = vl.EmpiricalRisk(net, loss, data, some)
    if kind == "over":
        risk = risk.over([next(iter(risk.params))])
    G, x = vl.GGN(risk), random_vector(risk.num_params)
    before = G @ x
    del net, some
    gc.collect()
    assert not any(parameter() is not None for parameter in known)
    torch.testing.assert_close(G @ x, before)
    there = pickle.loads(pickle.dumps(G))
    torch.testing.assert_close(there @ x, before)
