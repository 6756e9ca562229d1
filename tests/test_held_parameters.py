"""Parameters that objects hold which are no modules: derivatives see these, too."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vivit_linop as vl
from tests.comparing import jacobian

LOSS = nn.CrossEntropyLoss()
REGISTRY: dict[str, Tensor] = {}


class Slots:
    __slots__ = ("w",)

    def __init__(self, w: Tensor) -> None:
        self.w = w


@dataclasses.dataclass(frozen=True)
class Config:
    w: Tensor


class Owner:
    def __init__(self, w: Tensor) -> None:
        self._w = w

    def weight(self) -> Tensor:
        return self._w


def registered(w: Tensor) -> str:
    REGISTRY["w"] = w
    return "w"


# What holds a weight, and how a forward pass gets at it.
HOLDERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Tensor]]] = {
    "slots": (Slots, lambda holder: holder.w),
    "dataclass": (Config, lambda holder: holder.w),
    "namespace": (lambda w: types.SimpleNamespace(w=w), lambda holder: holder.w),
    "method": (lambda w: Owner(w).weight, lambda holder: holder()),
    "map": (lambda w: collections.ChainMap({"w": w}), lambda holder: holder["w"]),
    "weak": (
        lambda w: weakref.WeakValueDictionary(w=w),
        lambda holder: holder["w"],
    ),
    "global": (registered, lambda holder: REGISTRY[holder]),
    "module": (
        lambda w: types.SimpleNamespace(part=w),
        lambda holder: holder.part.weight,
    ),
}


class Net(nn.Module):
    """A layer whose weight is taken from elsewhere."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
        make, self.get = HOLDERS[name]
        self.holder = make(self.first if name == "module" else self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.get(self.holder).T + self.first.bias)
        return self.last(hidden)


def data() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 15).double().reshape(5, 3), torch.arange(5) % 3


def check(risk: vl.EmpiricalRisk, J: Tensor) -> None:
    H = vl.LossHessian(risk).to_dense()
    G, dense = vl.GGN(risk), J.T @ H @ J
    x = torch.linspace(-1, 1, risk.num_params, dtype=torch.float64)
    for found, expected in (
        (vl.Jacobian(risk) @ x, J @ x),
        (G @ x, dense @ x),
        (G.to_dense(), dense),
        (G.eigvalsh()[-3:], torch.linalg.eigvalsh(dense)[-3:]),
        (vl.Hessian(risk).diagonal() - G.diagonal(), curvature(risk)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def curvature(risk: vl.EmpiricalRisk) -> Tensor:
    """The diagonal of H − G, of the same net without a holder."""
    net, (X, y) = Plain(), data()
    net.load_state_dict({n: p.detach() for n, p in risk.params.items()})
    plain = vl.EmpiricalRisk(net, LOSS, (X, y))
    return vl.Hessian(plain).diagonal() - vl.GGN(plain).diagonal()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", HOLDERS)
def test_derivatives(name: str) -> None:
    net, (X, y) = Net(name), data()
    J = jacobian(net(X), net.parameters())
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    before = [(id(p), p.detach().clone()) for p in net.parameters()]
    check(risk, J)
    assert [id(p) for p in net.parameters()] == [key for key, _ in before]
    with torch.no_grad():  # training goes on
        for p in net.parameters():
            p.mul_(1.5)
    check(risk, J)
    check(risk.at(), jacobian(net(X), net.parameters()))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", ["slots", "dataclass", "namespace"])
def test_copies_and_other_parameters(name: str) -> None:
    net, (X, y) = Net(name), data()
    J = jacobian(net(X), net.parameters())
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    check(copy.deepcopy(risk), J)
    given = {n: 0.5 * p.detach() for n, p in net.named_parameters()}
    other = vl.EmpiricalRisk(net, LOSS, (X, y), given)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    check(other, jacobian(net(X), net.parameters()))
    part = vl.EmpiricalRisk(net, LOSS, (X, y), [net.first.weight])
    assert torch.allclose(
        vl.Jacobian(part).to_dense(), jacobian(net(X), net.parameters())[:, :12]
    )


def test_pickled() -> None:
    net, (X, y) = Net("slots"), data()
    net.get = weight_of
    J = jacobian(net(X), net.parameters())
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    check(pickle.loads(pickle.dumps(risk)), J)


def weight_of(holder: Any) -> Tensor:
    return holder.w


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_backward_pass_computes_again_is_refused(reentrant: bool) -> None:
    """The parameter is the user's own there."""

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            def hidden(x: Tensor) -> Tensor:
                return torch.tanh(x @ self.get(self.holder).T + self.first.bias)

            x = x if x.requires_grad else x.detach().requires_grad_()
            return self.last(checkpoint(hidden, x, use_reentrant=reentrant))

    net, batch = Checkpointed("slots"), data()
    with pytest.raises(ValueError, match=r"model: its forward pass reaches first\.wei"):
        vl.EmpiricalRisk(net, LOSS, batch)


@pytest.mark.parametrize("name", ["slots", "namespace", "map", "global"])
def test_what_was_computed_before_is_refused(name: str) -> None:
    net, batch = Net(name), data()
    make, net.get = HOLDERS[name]
    net.holder = make(2 * net.first.weight)
    with pytest.raises(ValueError, match=r"reaches first\.weight .* computed from it"):
        vl.EmpiricalRisk(net, LOSS, batch)
    net.holder = make((2 * net.first.weight).detach())  # a constant
    assert vl.EmpiricalRisk(net, LOSS, batch).num_samples == 5


def test_reached_on_a_later_batch() -> None:
    class Sometimes(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() < 0:
                return super().forward(x)
            return self.last(torch.tanh(self.first(x)))

    net, (X, y) = Sometimes("slots"), data()
    batches = [(X[3:], y[3:]), (X[:2], y[:2])]
    with pytest.raises(ValueError, match=r"reaches first\.weight of your own module"):
        vl.EmpiricalRisk(net, LOSS, batches)


OUTSIDE = nn.Linear(4, 4).double()


class Constants(Net):
    """Constants of its derivatives beside a parameter that is held, or is global."""

    def __init__(self, how: str, name: str) -> None:
        super().__init__("slots" if name == "outside" else name)
        self.how, self.outside = how, name == "outside"
        self.last = OUTSIDE if self.outside else self.last

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.get(self.holder).T + self.first.bias)
        if self.how == "detached":
            h = h + (torch.round(3 * h) - h).detach()
        elif self.how == "no_grad":
            with torch.no_grad():
                size = self.get(self.holder).norm() + h.norm(dim=1, keepdim=True)
            h = h / size
        else:
            with torch.inference_mode():
                size = h.norm(dim=1, keepdim=True)
            h = h / size.clone()
        return OUTSIDE(h) if self.outside else self.last(h)


@pytest.mark.parametrize("name", ["slots", "module", "outside"])
@pytest.mark.parametrize("how", ["detached", "no_grad", "inference"])
def test_constants(how: str, name: str) -> None:
    net, (X, y) = Constants(how, name), data()
    J = jacobian(net(X), net.parameters())
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    torch.testing.assert_close(vl.Jacobian(risk).to_dense(), J)
    x = torch.linspace(-1, 1, risk.num_params, dtype=torch.float64)
    torch.testing.assert_close(vl.Jacobian(risk) @ x, J @ x)


def test_frozen_ones_travel() -> None:
    net, (X, y) = Net("slots"), data()
    net.get = weight_of
    net.first.weight.requires_grad_(False)
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    there = pickle.loads(pickle.dumps(risk))
    torch.testing.assert_close(there.gradient(), risk.gradient())


@pytest.mark.parametrize("name", ["slots", "module", "global"])
def test_in_another_precision(name: str) -> None:
    """What is held is in the precision of the parameters, and not in the risk's."""
    net, (X, y) = Net(name).float(), data()
    double = Net(name)
    double.load_state_dict(net.state_dict())
    J = jacobian(double(X.float().double()), double.parameters())
    if name == "global":
        registered(net.first.weight)
    risk = vl.EmpiricalRisk(net, LOSS, (X.float(), y), dtype=torch.float64)
    torch.testing.assert_close(vl.Jacobian(risk).to_dense(), J)
    x = torch.linspace(-1, 1, risk.num_params)
    single = vl.EmpiricalRisk(net, LOSS, (X.float(), y))
    H = vl.Hessian(single) @ x
    expected = vl.Hessian(risk) @ x.double()
    torch.testing.assert_close(H, expected.float(), rtol=1e-4, atol=1e-5)


def test_rows_for_padding_have_no_derivatives() -> None:
    class Tokens(Net):
        def __init__(self) -> None:
            super().__init__("slots")
            self.table = nn.Embedding(4, 3, padding_idx=2).double()
            torch.nn.init.ones_(self.table.weight)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.table(x).mean(1))

    net, y = Tokens(), torch.arange(5) % 3
    X = torch.tensor([[0, 2], [2, 2], [1, 3], [2, 0], [3, 3]])
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    torch.testing.assert_close(
        vl.Jacobian(risk).to_dense(), jacobian(net(X), net.parameters())
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_beside_a_checkpoint(reentrant: bool) -> None:
    class Beside(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(x @ self.get(self.holder).T + self.first.bias)
            return checkpoint(self.last, h, use_reentrant=reentrant)

    net, (X, y) = Beside("slots"), data()
    plain = Net("slots")
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    J = jacobian(plain(X), plain.parameters())
    torch.testing.assert_close(vl.Jacobian(risk).to_dense(), J)
