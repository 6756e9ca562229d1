"""The run of construction serves the first quantity, and nothing that it should not."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import vivit_linop as vl
from tests.capture_cases import close
from tests.cases import Problem, dense_of
from tests.cases.market import Lambda
from vivit_linop.risk import kept

N = 17


def _problem(forward: Callable[[Any, Tensor], Tensor] | None = None) -> Problem:
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)
    net: nn.Module = nn.Sequential(*layers)
    if forward is not None:
        net = Lambda(forward, first=layers[0], last=layers[2])
    X, y = torch.randn(N, 5, dtype=torch.float64), torch.randint(3, (N,))
    return Problem(net.double(), nn.CrossEntropyLoss(), (X, y))


def _risk(problem: Problem, **options: Any) -> vl.EmpiricalRisk:
    return vl.EmpiricalRisk(problem.model, problem.loss, problem.data, **options)


def _column(risk: vl.EmpiricalRisk) -> Tensor:
    return torch.linspace(-1, 1, risk.num_params, dtype=risk.dtype)


QUANTITIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "product": (lambda r: vl.GGN(r) @ _column(r), lambda t, x: t.G @ x),
    "gradient": (lambda r: r.gradient(), lambda t, x: t.U.mean(1)),
    "Gram": (
        lambda r: vl.PerSampleGradients(r).gram.to_dense(),
        lambda t, x: t.U.T @ t.U,
    ),
    "norms": (
        lambda r: vl.PerSampleGradients(r).squared_norms(),
        lambda t, x: t.U.square().sum(0),
    ),
    "diagonal": (lambda r: vl.GGN(r).diagonal(), lambda t, x: t.G.diagonal()),
    "pairs": (
        lambda r: vl.GGN(r).eigh(k=2).eigenvalues,
        lambda t, x: torch.linalg.eigvalsh(t.G)[-2:],
    ),
}


def _all_are_right(risk: vl.EmpiricalRisk, problem: Problem) -> None:
    truth, x = dense_of(problem), _column(risk)
    for quantity, wanted in QUANTITIES.values():
        assert close(quantity(risk), wanted(truth, x))


@pytest.mark.parametrize("name", QUANTITIES)
def test_the_net_runs_for_the_checks_of_construction_only(name: str) -> None:
    problem, sizes = _problem(), list[int]()
    problem.model.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    quantity, wanted = QUANTITIES[name]
    risk = _risk(problem)
    found = quantity(risk)
    assert sizes == [N, N // 8, N // 8]  # the two groups of samples
    assert close(found, wanted(dense_of(problem), _column(risk)))


def test_all_quantities_of_one_risk_are_right() -> None:
    problem = _problem()
    _all_are_right(_risk(problem), problem)


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_change_of_the_data_is_seen(name: str) -> None:
    problem = _problem()
    risk = _risk(problem)
    problem.data[0][3] += 0.1
    with pytest.raises(ValueError, match=r"^data: batch 0 is not what it was"):
        QUANTITIES[name][0](risk)


def test_there_is_one_at_most_and_it_fits_and_does_not_travel() -> None:
    problem = _problem()
    risk = _risk(problem)
    assert risk.kept.run_nbytes > 0
    for twin in (copy.deepcopy(risk), pickle.loads(pickle.dumps(risk))):
        assert twin.kept.run_nbytes == 0
        _all_are_right(twin, problem)
    other = _risk(problem)
    assert risk.kept.run_nbytes == 0 < other.kept.run_nbytes
    X, y = problem.data
    for without in (
        _risk(problem, memory=0),
        _risk(Problem(problem.model, problem.loss, [(X[:9], y[:9]), (X[9:], y[9:])])),
        other.over(["2.weight"]),
        other.at(),
    ):
        assert without.kept.run_nbytes == 0
    vl.GGN(other) @ _column(other)
    assert other.kept.run_nbytes == 0


def _hooked(m: Any, x: Tensor) -> Tensor:
    """A gradient that is doubled the first time only."""
    h = m.first(x).tanh()
    handle = h.register_hook(lambda g: (handle.remove(), 2 * g)[1])
    return m.last(h)


def _hooked_node(m: Any, x: Tensor) -> Tensor:
    """Likewise, at a node of the graph."""
    h = m.first(x).tanh()
    handle = h.grad_fn.register_prehook(lambda g: (handle.remove(), (2 * g[0],))[1])
    return m.last(h)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = 2.0
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        factor, ctx.factor = ctx.factor, 1.0
        return factor * gradient


def _own_function(m: Any, x: Tensor) -> Tensor:
    return m.last(_Once.apply(m.first(x).tanh()))


@pytest.mark.parametrize("forward", [_hooked, _hooked_node, _own_function])
def test_what_a_graph_does_once_is_not_used_up(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    """After a gradient, a product sees that two backward passes differ."""
    risk = _risk(_problem(forward))
    assert risk.kept.run_nbytes > 0
    for _ in range(2):
        QUANTITIES["gradient"][0](risk)
    with pytest.raises(ValueError, match=r"^model: "):
        vl.Jacobian(risk).T @ torch.ones(N * 3, dtype=risk.dtype)


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.last(checkpoint(m.first, x, use_reentrant=False).tanh())


def _offloaded(m: Any, x: Tensor) -> Tensor:
    with save_on_cpu():
        return m.last(m.first(x).tanh())


@pytest.mark.parametrize("forward", [_checkpointed, _offloaded])
def test_graphs_that_hold_something_else_are_let_go(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    risk = _risk(_problem(forward))
    assert risk.kept.run_nbytes == 0
    _all_are_right(risk, _problem(lambda m, x: m.last(m.first(x).tanh())))


@pytest.mark.parametrize("forward", [_checkpointed, _offloaded])
def test_graphs_that_hold_something_else_at_other_parameters(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    def plain(m: Any, x: Tensor) -> Tensor:
        return m.last(m.first(x).tanh())

    def later(m: Any, x: Tensor) -> Tensor:
        return (forward if m.last.bias.sum() > 3 else plain)(m, x)

    risk, at_others = _risk(_problem(later)), _problem(plain)
    QUANTITIES["product"][0](risk)  # so that the next run is wanted
    risk.add_to_(at_others.model, torch.full((risk.num_params,), 2.0).double())
    now = risk.at(risk.flatten(risk.params) + 2.0)
    assert now.kept.run_nbytes == 0
    _all_are_right(now, at_others)


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("kind", ["array", "data", "tensor"])
def test_memory_of_the_users_in_a_graph_is_what_it_was(kind: str, name: str) -> None:
    """Of what an object that is no module holds, copies of the net have the same."""
    held = SimpleNamespace(array=np.linspace(1.0, 2.0, 6))
    held.tensor = torch.from_numpy(held.array.copy())

    def scaled(m: Any, x: Tensor) -> Tensor:
        scale = torch.from_numpy(held.array) if kind == "array" else held.tensor
        return m.last(m.first(x).tanh() * scale)

    problem = _problem(scaled)
    quantity, wanted = QUANTITIES[name]
    risk = _risk(problem)
    assert close(quantity(risk), wanted(dense_of(problem), _column(risk)))
    risk = _risk(problem)
    assert risk.kept.run_nbytes > 0
    if kind == "array":
        held.array *= 2.0
    elif kind == "data":
        held.tensor.data.mul_(2.0)
    else:
        held.tensor.mul_(2.0)
    with pytest.raises(ValueError, match=r"^model: its forward pass reads an array or"):
        quantity(risk)


@pytest.mark.parametrize("name", QUANTITIES)
def test_activations_that_are_taken_out_may_be_written_into(name: str) -> None:
    problem, seen = _problem(), list[Tensor]()
    problem.model[1].register_forward_hook(lambda _, args, out: seen.append(out))
    quantity, wanted = QUANTITIES[name]
    risk = _risk(problem)
    with torch.no_grad():
        for activations in seen:
            activations.div_(activations.norm())
    assert close(quantity(risk), wanted(dense_of(problem), _column(risk)))


def test_risks_without_anybody_who_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the room of risks alone has been imported."""
    monkeypatch.setattr(kept, "_watches", [])
    problem = _problem()
    risk = _risk(problem)
    assert risk.kept.run_nbytes == 0
    _all_are_right(risk, problem)
    _all_are_right(risk.at(risk.flatten(risk.params)), problem)


@pytest.mark.host("a process of its own, on the CPU")
def test_the_room_of_risks_needs_no_other() -> None:
    code = f"""
import sys, types
package = types.ModuleType("vivit_linop")
package.__path__ = [{str(Path(vl.__file__).parent)!r}]
sys.modules["vivit_linop"] = package
import torch
from vivit_linop.risk.empirical import EmpiricalRisk
data = torch.ones(4, 3), torch.zeros(4, 1)
net = torch.nn.Linear(3, 1, bias=False)
torch.nn.init.ones_(net.weight)
print(EmpiricalRisk(net, torch.nn.MSELoss(), data).gradient().tolist())
print(any(name.startswith("vivit_linop.net") for name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[6.0, 6.0, 6.0]", "False"]


@pytest.mark.parametrize("kind", ["precision", "holes"])
def test_inputs_that_are_changed_on_their_way_are_recognised(kind: str) -> None:
    """In another precision than given, or with places that are no numbers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return m.last(m.first(x.nan_to_num(0.5)).tanh())

    sizes: list[int] = []
    problem = _problem(forward)
    X, y = problem.data
    filled = Problem(problem.model, problem.loss, (X.float().double(), y))
    given = X.float()
    if kind == "holes":
        given = X.clone()
        given[3, 1] = torch.nan
        filled = Problem(problem.model, problem.loss, (given.nan_to_num(0.5), y))
    risk = _risk(replace(problem, data=(given, y)), dtype=torch.float64)
    sizes.clear()
    gradient = risk.gradient()
    assert not sizes
    torch.testing.assert_close(gradient, dense_of(filled).U.mean(1))
