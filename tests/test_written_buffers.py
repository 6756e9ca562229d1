"""Models that write into buffers: each evaluation has those of construction."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl

LOSS = nn.CrossEntropyLoss()


def data() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 24).double().reshape(6, 4), torch.arange(6) % 3


class Writing(nn.Module):
    """A net with a buffer, and what its forward pass does with it."""

    def __init__(self, start: Tensor, write: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.write = nn.Linear(4, 3).double(), write
        self.register_buffer("state", start)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).tanh()
        return hidden * self.write(self.state, hidden.detach())


def counted(state: Tensor, hidden: Tensor) -> Tensor:
    state += 1
    return torch.ones(()).to(hidden)


def averaged(state: Tensor, hidden: Tensor) -> Tensor:
    state.mul_(0.9).add_(0.1 * hidden.mean(0))
    return torch.ones(()).to(hidden)


def histogram(state: Tensor, hidden: Tensor) -> Tensor:
    state.data += torch.bincount(hidden.argmax(1), minlength=3)
    return torch.ones(()).to(hidden)


def later(state: Tensor, hidden: Tensor) -> Tensor:
    """Other outputs from the sixth call on."""
    state += 1
    return 1.0 + 0.5 * (state > 5)


# What is written, where it makes no difference to the next evaluation.
KINDS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "calls": (lambda: torch.zeros((), dtype=torch.long), counted),
    "calls, real": (lambda: torch.zeros(()), counted),
    "mean": (lambda: torch.zeros(3).double(), averaged),
    "histogram": (lambda: torch.zeros(3, dtype=torch.long), histogram),
    "later": (lambda: torch.zeros((), dtype=torch.long), later),
}


def net(kind: str) -> Writing:
    start, write = KINDS[kind]
    return Writing(start(), write).eval()


def truth(model: Writing) -> tuple[Tensor, Tensor]:
    """The GGN and the gradient of the net without what is written."""
    plain = nn.Sequential(copy.deepcopy(model.layer), nn.Tanh())
    risk = vl.EmpiricalRisk(plain, LOSS, data())
    return vl.GGN(risk).to_dense(), risk.gradient()


@pytest.mark.parametrize("kind", KINDS)
def test_quantities(kind: str) -> None:
    model = net(kind)
    risk = vl.EmpiricalRisk(model, LOSS, data())
    ggn, gradient = truth(model)
    G, x = vl.GGN(risk), torch.linspace(0, 1, 15).double()
    for _ in range(3):
        torch.testing.assert_close(G @ x, ggn @ x)
        torch.testing.assert_close(risk.gradient(), gradient)
    torch.testing.assert_close(G.to_dense(), ggn)
    assert vl.Hessian(risk).to_dense().isfinite().all()
    assert risk.is_current()
    assert torch.equal(model.state, KINDS[kind][0]())  # a guest
    for other in (copy.deepcopy(risk), risk.at(), risk.over(["layer.weight"])):
        torch.testing.assert_close(other.value(), risk.value())
    if kind == "calls":
        torch.testing.assert_close(pickle.loads(pickle.dumps(G)) @ x, ggn @ x)


@pytest.mark.parametrize("kind", KINDS)
def test_one_risk_is_as_another(kind: str, tmp_path: Path) -> None:
    """What is saved of one that was used more often is loaded for another one."""
    model = net(kind)
    one, other = (vl.EmpiricalRisk(model, LOSS, data()) for _ in range(2))
    pairs = vl.GGN(one).eigh(k=2)
    vl.save(pairs, tmp_path / "pairs.pt", one)
    loaded = vl.load(tmp_path / "pairs.pt", other)
    assert torch.equal(loaded.eigenvalues, pairs.eigenvalues)


def test_other_outputs_are_refused() -> None:
    def scaled(state: Tensor, hidden: Tensor) -> Tensor:
        state += 1
        return state.clone()

    model = Writing(torch.zeros(()).double(), scaled).eval()
    with pytest.raises(ValueError, match=r"changes the buffer 'state'.*other outputs"):
        vl.EmpiricalRisk(model, LOSS, data())
    model = Writing(torch.zeros((), dtype=torch.long), scaled).eval()
    with pytest.raises(ValueError, match=r"changes the buffer 'state'.*other outputs"):
        vl.EmpiricalRisk(model, LOSS, data())


def test_the_counter_of_training_is_no_other_model() -> None:
    """What changes on the user's own is seen as before."""
    model = net("calls")
    risk = vl.EmpiricalRisk(model, LOSS, data())
    model(data()[0])
    assert not risk.is_current()
    assert risk.at().is_current()
