"""Objects that are called, as models, losses, ``predict``: what they hold is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl

X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)
Y = torch.arange(6) % 3


class Model:
    """Features of parameters, under a head of its own; keeps what it computed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.parts = {"head": nn.Linear(4, 3).double()}

    def __call__(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        self.features = torch.tanh(x @ params["w"])
        return self.parts["head"](self.features)

    def outputs(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return self(params, x)


class Scaled:
    """A loss with a temperature, and a way to call a net, that are no modules."""

    reduction = "mean"

    def __init__(self) -> None:
        self.scale = torch.ones((), dtype=torch.float64)
        self.head = nn.Linear(3, 3).double()

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * output, y)

    def predict(self, net: nn.Module, x: Tensor) -> Tensor:
        return self.scale * self.head(net(x))


def of_a_model(how: Callable[[Model], Any]) -> tuple[vl.EmpiricalRisk, Any, Tensor]:
    model, w = Model(), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    risk = vl.EmpiricalRisk(how(model), nn.CrossEntropyLoss(), (X, Y), {"w": w})
    return risk, model, model.parts["head"].weight


def of_a_loss(predict: bool) -> tuple[vl.EmpiricalRisk, Any, Tensor]:
    torch.manual_seed(1)
    net, scaled = nn.Linear(3, 3).double(), Scaled()
    if predict:
        way = scaled.predict
        risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, Y), predict=way)
        return risk, scaled, scaled.head.weight
    return vl.EmpiricalRisk(net, scaled, (X, Y)), scaled, scaled.scale


CASES: dict[str, Callable[[], tuple[vl.EmpiricalRisk, Any, Tensor]]] = {
    "an object": lambda: of_a_model(lambda model: model),
    "a method": lambda: of_a_model(lambda model: model.outputs),
    "a loss": lambda: of_a_loss(predict=False),
    "predict": lambda: of_a_loss(predict=True),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_called_object_holds_is_the_risks(name: str) -> None:
    risk, owner, inside = CASES[name]()
    G = vl.GGN(risk).to_dense()
    with torch.no_grad():
        inside.add_(0.5)  # training goes on
    again = vl.GGN(risk)
    x = torch.linspace(0, 1, len(G), dtype=torch.float64)
    torch.testing.assert_close(again @ x, G @ x, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(again.to_dense(), G, rtol=1e-12, atol=1e-15)
    assert not hasattr(owner, "features")
