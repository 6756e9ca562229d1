"""Blocks of parameters: what is asked of all of them takes one pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.toys import toy
from vivit_linop.operators import verbs


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def counted(net: nn.Module, runs: list[int]) -> nn.Module:
    """The net, which lists its runs."""
    net.register_forward_hook(lambda *_: runs.append(1))
    return net


CURVATURES: dict[str, Callable[[vl.EmpiricalRisk], Any]] = {
    "GGN": vl.GGN,
    "scaled": lambda risk: 2.0 * vl.GGN(risk),
    "Fisher": vl.EmpiricalFisher,
}


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("quantity", ["diagonal", "trace"])
def test_diagonals_of_all_blocks_take_one_pass(name: str, quantity: str) -> None:
    net, loss, (X, y) = toy()
    runs: list[int] = []
    batches = [(X[:4], y[:4]), (X[4:], y[4:])]
    curvature = CURVATURES[name](vl.EmpiricalRisk(counted(net, runs), loss, batches))
    truth = curvature.to_dense().diagonal()
    curvature.diagonal()  # asks for the structure of the net
    runs.clear()
    curvature.diagonal()
    of_one, _ = len(runs), runs.clear()
    blocks = curvature.block_diagonal("parameter")
    found = getattr(blocks, quantity)()
    close(found, truth if quantity == "diagonal" else truth.sum())
    assert len(runs) == of_one
    close(blocks.blocks[1].diagonal(), truth[20:25])
    assert len(runs) == of_one


@pytest.mark.parametrize("name", CURVATURES)
def test_gram_matrices_of_blocks_with_few_rows(name: str) -> None:
    """Those of larger blocks come together; of one with fewer rows alone, by layers."""
    net, loss, data = toy(9)
    curvature = CURVATURES[name](vl.EmpiricalRisk(net, loss, data))
    V = curvature.factor.to_dense()
    rows = torch.arange(len(V)).split([p.numel() for p in net.parameters()])
    for block, own in zip(
        curvature.block_diagonal("parameter").blocks, rows, strict=True
    ):
        close(block.gram.to_dense(), V[own].T @ V[own])
        close(block.factor.to_dense(), V[own])


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_blocks_with_weights_for_their_rows(name: str, sign: float) -> None:
    """Vᵀ W V of a block, as inverses with a prior by entry take it, by layers."""
    net, loss, data = toy(3)
    runs: list[int] = []
    curvature = CURVATURES[name](vl.EmpiricalRisk(counted(net, runs), loss, data))
    V = curvature.factor.to_dense()[:20]
    p = torch.linspace(0.5, 2.0, 20).double()
    p[3] *= sign
    block = curvature.block_diagonal("parameter").blocks[0]
    curvature.gram.to_dense()
    runs.clear()
    found = verbs.weighted_gram_matrix(block.factor, block.factor, p)
    close(found, V.T @ (p[:, None] * V))
    assert len(runs) <= 2
    if sign > 0:
        x = torch.linspace(-1, 1, 20).double()
        expected = torch.linalg.solve(block.to_dense() + p.diag(), x)
        close((block + vl.Diagonal(p)).inv() @ x, expected)


class Unseen(nn.Module):
    """A large parameter whose use has no structure, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.table = nn.Parameter(torch.randn(50, 50) / 50)

    def forward(self, x: Tensor) -> Tensor:
        total = (self.table.sin() * self.table).sum()
        return self.last((self.first(x) * (1 + x[:, :1] * total)).tanh())


def test_blocks_without_structure_leave_the_others_alone() -> None:
    """Small sides are those of the blocks that need them."""
    _, loss, data = toy()
    net = Unseen().double()
    risk = vl.EmpiricalRisk(net, loss, data)
    K = vl.KFAC(risk, variant="exact")
    (at,) = [n for n, names in enumerate(K.names) if names == ["table"]]
    block = K.blocks[at]
    G, start = vl.GGN(risk).to_dense(), sum(risk.sizes[:at])
    own = slice(start, start + 2500)
    close(block.to_dense(), G[own, own])
    assert block.factor.partition.groups == [["table"]]
    x = torch.linspace(-1, 1, 2500).double()
    damped = block + 0.1 * vl.Identity(2500)
    unit = torch.eye(2500, dtype=torch.float64)
    close(damped.inv() @ x, torch.linalg.solve(G[own, own] + 0.1 * unit, x))


@pytest.mark.parametrize("of_modules", [True, False])
def test_diagonals_of_blocks_of_the_hessian(
    of_modules: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One recursion for all, where BackPACK has one; else products with each block."""
    pytest.importorskip("backpack")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    X, y = torch.rand(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    model: Any = net if of_modules else Squared(net)
    H = vl.Hessian(vl.EmpiricalRisk(model, nn.CrossEntropyLoss(), (X, y)))
    truth, columns = H.to_dense(), list[int]()
    multiply = vl.Hessian.multiply_block

    def listed(self: Any, chosen: Any, X: Tensor) -> Tensor:
        columns.append(X.shape[1])
        return multiply(self, chosen, X)

    monkeypatch.setattr(vl.Hessian, "multiply_block", listed)
    first, second, third, fourth = net.parameters()
    blocks = H.block_diagonal([[second, third], [fourth, first]])
    close(blocks.diagonal(), truth.diagonal())
    close(blocks.trace(), truth.trace())
    assert (sum(columns) < len(truth)) == of_modules


class Squared(nn.Module):
    """A net that no recursion over modules knows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, X: Tensor) -> Tensor:
        out: Tensor = self.net(X)
        return out.square()
