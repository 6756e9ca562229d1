"""Nets that read memory which the risk has no copy of, and others write into."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vivit_linop as vl
from tests.sample_truth import close

BEFORE, AFTER = np.linspace(0.5, 1.5, 5), np.array([2.0, 0.3, -1.0, 0.7, 1.9])
REFUSED = r"^model: its forward pass reads an array or a tensor \[.*\] of .*64 behind"
HELD = SimpleNamespace()


class Scaled(torch.autograd.Function):
    """h ⊙ array, with a backward pass that looks the array up again."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * torch.from_numpy(HELD.array)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.from_numpy(HELD.array)


def _array(h: Tensor) -> Tensor:
    return h * torch.from_numpy(HELD.array)


# How a net reads h ⊙ array of what others hold.
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "array": _array,
    "as_tensor": lambda h: h * torch.as_tensor(HELD.array),
    "tensor": lambda h: h * HELD.tensor,
    "detached view": lambda h: h * HELD.tensor.detach()[None],
    "matrix": lambda h: h @ torch.diag(HELD.tensor),
    "frozen layer": lambda h: HELD.layer(h),
    "sparse": lambda h: torch.sparse.mm(HELD.sparse, h.T).T,
    "compressed": lambda h: (HELD.compressed @ h.T).T,
    "in the dtype of others": lambda h: h * torch.from_numpy(HELD.array).to(h),
    "as it is": lambda h: h * torch.as_tensor(HELD.tensor).contiguous(),
    "broadcast": lambda h: h * torch.broadcast_tensors(HELD.tensor, h[0])[0],
    "row of a table": lambda h: h * HELD.table[1],
    "places": lambda h: (h * HELD.scale)[:, torch.from_numpy(HELD.order)],
    "looked up": lambda h: h * HELD.table[[1]],
    "checkpoint": lambda h: checkpoint(_array, h, use_reentrant=False),
    "reentrant checkpoint": lambda h: checkpoint(_array, h, use_reentrant=True),
    "function of its own": Scaled.apply,
}


def _hold(values: np.ndarray) -> None:
    """Let the memory be what it was at first."""
    tensor = torch.from_numpy(values.copy())
    HELD.array, HELD.tensor = values.copy(), tensor
    HELD.table = torch.stack([tensor + 1.0, tensor])
    HELD.order, HELD.scale = np.arange(5), tensor.clone()
    HELD.sparse = torch.diag(tensor).to_sparse_coo().coalesce()
    HELD.compressed = torch.diag(tensor).to_sparse_csr()
    HELD.layer = nn.Linear(5, 5, bias=False).double().requires_grad_(False)
    HELD.layer.weight.copy_(torch.diag(tensor))


def _change() -> None:
    """Write into it, where no version tells."""
    values = torch.from_numpy(AFTER)
    HELD.array[:] = AFTER
    HELD.order[:] = [0, 1, 2, 4, 3]
    HELD.tensor.data.copy_(values)
    HELD.table.data[1] = values
    HELD.sparse._values().data.copy_(values)
    HELD.compressed.values().data.copy_(values)
    HELD.layer.weight.data.copy_(torch.diag(values))


class Net(nn.Module):
    """A net that reads; ``blind`` if its outputs do not show what."""

    def __init__(self, read: Callable[[Tensor], Tensor], blind: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.read = nn.Linear(4, 5), nn.Linear(5, 3), read
        self.double()
        if blind:
            nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.read(torch.tanh(self.first(x))).sin())


def _ggn(
    net: Net, X: Tensor, y: Tensor, values: np.ndarray, order: Any = slice(None)
) -> Tensor:
    """The dense GGN of such a net."""

    def outputs(*p: Tensor) -> Tensor:
        h = torch.tanh(X @ p[0].T + p[1]) * torch.from_numpy(values)
        h = h[:, order]
        return h.sin() @ p[2].T + p[3]

    theta = tuple(p.detach() for p in net.parameters())
    parts = torch.autograd.functional.jacobian(outputs, theta)
    J = torch.cat([part.reshape(3 * len(X), -1) for part in parts], dim=1)
    p = outputs(*theta).softmax(dim=1)
    blocks = [(q.diag() - q.outer(q)) / len(X) for q in p]
    return J.T @ torch.block_diag(*blocks) @ J


def _problem(read: str, blind: bool = False) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    _hold(BEFORE)
    X, y = torch.rand(6, 4, dtype=torch.float64) - 0.5, torch.randint(3, (6,))
    return Net(READS[read], blind), X, y


ASKED: dict[str, Callable[[vl.EmpiricalRisk, Any, Tensor], Any]] = {
    "G x": lambda risk, G, x: G @ x,
    "G X": lambda risk, G, x: G @ torch.stack([x, 2 * x], dim=1),
    "Jt u": lambda risk, G, x: G.factor.jacobian.T @ torch.ones(18).double(),
    "spectrum": lambda risk, G, x: G.eigh(k=2),
    "gradient": lambda risk, G, x: risk.gradient(),
    "at": lambda risk, G, x: risk.at(x),
}


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("read", READS)
def test_what_comes_after_a_change_is_refused(read: str, blind: bool) -> None:
    """It would be half of the one net and half of the other."""
    net, X, y = _problem(read, blind)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    G, x = vl.GGN(risk), torch.rand(43, dtype=torch.float64)
    dense, H = _ggn(net, X, y, BEFORE), vl.Hessian(risk)
    assert close(G @ x, dense @ x)
    H @ x  # on a graph that is kept
    _change()
    with pytest.raises(ValueError, match=REFUSED):
        H @ x
    for ask in ASKED.values():
        with pytest.raises(ValueError, match=REFUSED):
            ask(risk, G, x)
    # As it is now it is another risk.
    after = (BEFORE, HELD.order) if read == "places" else (AFTER,)
    assert close(vl.GGN(risk.at()) @ x, _ggn(net, X, y, *after) @ x)


def test_columns_of_inputs_that_others_hold() -> None:
    held, y = torch.rand(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    inputs, X = held.clone(), torch.zeros(6, 1, dtype=torch.float64)
    net = Net(lambda h: h)
    net.register_forward_pre_hook(lambda net, args: (held,))
    G = vl.GGN(net, nn.CrossEntropyLoss(), (X, y), check=False)
    G.factor.keep_columns()
    held.data.mul_(3.0)
    x = torch.rand(43, dtype=torch.float64)
    assert close(G @ x, _ggn(net, inputs, y, np.ones(5)) @ x)


def test_memory_that_is_cut_off_is_not_read() -> None:
    _, X, y = _problem("array")
    held = torch.ones(2**20, 5, dtype=torch.float64)
    net = Net(lambda h: h * held[:3].mean() * held.sum(0).sign())
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    held.untyped_storage().resize_(64)
    with pytest.raises(ValueError, match=REFUSED):
        risk.gradient()


def _scratch(h: Tensor) -> Tensor:
    HELD.tensor.copy_(torch.from_numpy(BEFORE)).mul_(1.0)
    return h * HELD.tensor.clone()


def _counting(h: Tensor) -> Tensor:
    HELD.table[0] += 1.0
    HELD.array[:] = BEFORE * (h.detach().numpy()[0, 0] != 0.0)
    return h * torch.from_numpy(HELD.array.copy())


@pytest.mark.parametrize("read", [_scratch, _counting])
def test_what_a_net_writes_itself_is_its_own(read: Callable[[Tensor], Tensor]) -> None:
    _, X, y = _problem("array")
    net = Net(read)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    G, x = vl.GGN(risk), torch.rand(43, dtype=torch.float64)
    _change()
    for ask in (*ASKED.values(), ASKED["G x"]):
        ask(risk, G, x)
    assert close(G @ x, _ggn(net, X, y, BEFORE) @ x)


def test_not_a_number_and_tables_without_rows_are_what_they_were() -> None:
    _, X, y = _problem("array")
    held = torch.tensor([float("nan")] * 3 + [1.0] * 5, dtype=torch.float64)
    empty = torch.zeros(0, 5, dtype=torch.float64)

    def read(h: Tensor) -> Tensor:
        return h * held.nan_to_num(0.0)[3:] + empty[torch.zeros(0, dtype=int)].sum()

    risk = vl.EmpiricalRisk(Net(read), nn.CrossEntropyLoss(), (X, y))
    vl.GGN(risk) @ torch.rand(43, dtype=torch.float64)
    held[0] = 0.0
    with pytest.raises(ValueError, match=REFUSED):
        risk.gradient()


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda G: pickle.loads(pickle.dumps(G))]
)
def test_operators_that_travel_leave_memory_behind(way: Callable[[Any], Any]) -> None:
    net, X, y = _problem("array")
    net.read = _array
    G, x = vl.GGN(net, nn.CrossEntropyLoss(), (X, y)), torch.rand(43).double()
    dense = _ggn(net, X, y, BEFORE)
    G @ x
    assert close(way(G) @ x, dense @ x)


def test_nets_that_read_nothing_of_others_are_not_asked_again() -> None:
    _, X, y = _problem("array")
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.net = attention, net
            self.scale = torch.arange(1.0, 5.0).double()

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(1, 1, dtype=torch.float64)
            tokens = (x * self.scale)[:, None] + torch.tensor([0.5]).double()
            tokens, _ = self.attention(tokens, tokens, tokens, attn_mask=mask)
            return self.net(tokens.squeeze(1))

    risk = vl.EmpiricalRisk(Attends().double(), nn.CrossEntropyLoss(), (X, y))
    assert not risk.model.foreign.parts
