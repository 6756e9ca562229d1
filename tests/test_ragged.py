"""Samples with different numbers of outputs: padded batches, images, nodes."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_truth import Sample, check, check_products, close, truth_of
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl

CE = nn.CrossEntropyLoss()
C = 3
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=GENERATOR)


class Tagger(nn.Module):
    """Classes of tokens, [n, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, C)

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(torch.tanh(self.e(ids))).transpose(1, 2)


def built(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*arguments).double()


# Batches of several shapes ------------------------------------------------------------


def padded() -> list[tuple[Tensor, Tensor]]:
    """Sentences padded to the longest of their batch; no targets for the padding."""
    lengths = [(5, 3, 2), (7, 4), (1,)]
    batches = []
    for of_batch in lengths:
        X = torch.zeros(len(of_batch), max(of_batch), dtype=torch.int64)
        y = torch.full_like(X, -100)
        for row, length in enumerate(of_batch):
            X[row, :length] = 1 + randint(10, length)
            y[row, :length] = randint(C, length)
        batches.append((X, y))
    return batches


def images() -> list[tuple[Tensor, Tensor]]:
    return [(randn(2, 1, h, w), randn(2, C, h, w)) for h, w in ((2, 2), (3, 1), (1, 3))]


SUMS: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.CrossEntropyLoss: lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    nn.MSELoss: lambda f, y: (f - y).square().sum(),
}


def one_by_one(loss: nn.Module, batches: Any) -> list[Sample]:
    total = SUMS[type(loss)]
    return [
        (
            lambda m, x=x: m(x[None])[0],
            lambda f, t=t: total(f[None], t[None]),
        )
        for X, y in batches
        for x, t in zip(X, y, strict=True)
    ]


def weight(loss: nn.Module, batches: Any) -> int:
    if isinstance(loss, nn.CrossEntropyLoss):
        return sum(int((y != -100).sum()) for _, y in batches)
    return sum(y.numel() for _, y in batches)


CASES: dict[str, Callable[[], tuple[nn.Module, nn.Module, Any]]] = {
    "padded sentences": lambda: (built(Tagger), CE, padded()),
    "images": lambda: (built(nn.Conv2d, 1, C, 3, 1, 1), nn.MSELoss(), images()),
}


@pytest.mark.parametrize("name", CASES)
def test_batches_of_several_shapes(name: str) -> None:
    net, loss, batches = CASES[name]()
    risk = vl.EmpiricalRisk(net, loss, batches)
    samples = one_by_one(loss, batches)
    check(risk, truth_of(net, samples, 1 / weight(loss, batches)))
    outputs = [net(X).detach() for X, _ in batches]
    assert risk.num_outputs == sum(f.numel() for f in outputs)
    expected = sum(map(SUMS[type(loss)], outputs, [y for _, y in batches]))
    assert close(risk.value(), expected / weight(loss, batches))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chosen", [[4, 0, 3], [1, 0], [5]])
def test_subsets(name: str, chosen: list[int]) -> None:
    net, loss, batches = CASES[name]()
    risk = vl.EmpiricalRisk(net, loss, batches).subset(chosen)
    samples = one_by_one(loss, batches)
    rows = [(x, t) for X, y in batches for x, t in zip(X, y, strict=True)]
    some = [rows[i] for i in chosen]
    truth = truth_of(net, [samples[i] for i in chosen], 1 / weight(loss, [*_as(some)]))
    check_products(risk, truth)


def _as(rows: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x[None], t[None]) for x, t in rows]


def test_all_else_that_a_risk_does() -> None:
    net, loss, batches = CASES["padded sentences"]()
    risk = vl.EmpiricalRisk(net, loss, batches)
    truth = truth_of(net, one_by_one(loss, batches), 1 / weight(loss, batches))
    x = randn(risk.num_params)
    tight = vl.EmpiricalRisk(net, loss, batches, memory=0)
    assert close(vl.GGN(tight) @ x, truth.G @ x)
    assert close(vl.GGN(tight).eigvalsh(), vl.GGN(risk).eigvalsh())
    copied = pickle.loads(pickle.dumps(risk))
    assert close(vl.GGN(copied) @ x, truth.G @ x)
    assert close(risk.at().gradient(), truth.gradient)
    U, V = vl.PerSampleGradients(risk), vl.GGNFactor(risk)
    assert close((U.T @ V).to_dense(), truth.U.T @ V.to_dense())
    assert close(U.variance(), truth.U.var(1, correction=0))
    step = vl.damped_newton_step(risk, vl.GGN(risk).eigh(k=3), 0.1)
    assert step.shape == (risk.num_params,) and step.isfinite().all()
    for k, route in ((2, "ARPACK on G"), (2, "ARPACK on K"), (2, "dense Gram")):
        found = vl.GGN(risk).eigh(k=k, route=route).eigenvalues
        assert close(found, torch.linalg.eigvalsh(truth.G)[-k:])
    parts = vl.GGN(risk).block_diagonal("parameter")
    start = 0
    for block, p in zip(parts.blocks, net.parameters(), strict=True):
        own = slice(start, start + p.numel())
        assert close(block.to_dense(), truth.G[own, own])
        start += p.numel()
    assert close(vl.Hessian(risk).diagonal(), truth.hessian().diagonal())


def test_drawn_factors(tmp_path: Path) -> None:
    """Their expectation is H, and draws of samples of any length are independent."""
    net, loss, batches = CASES["padded sentences"]()
    risk = vl.EmpiricalRisk(net, loss, batches)
    truth = truth_of(net, one_by_one(loss, batches), 1 / weight(loss, batches))
    H = torch.block_diag(*truth.H)
    generator = torch.Generator().manual_seed(0)
    S = vl.LossHessian(risk).sqrt(mc_samples=20_000, generator=generator)
    dense = S.to_dense()
    assert (dense @ dense.T - H).norm() <= 0.05 * H.norm()
    columns = dense.reshape(len(H), 6, -1).sum(1)  # of each row, those of its sample
    together = columns @ columns.T
    assert (together - H).norm() <= 0.05 * H.norm()
    G = vl.GGN(risk, mc_samples=2, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "ggn.pt"
    evals = G.eigvalsh()
    vl.save(G, path, risk)
    again = vl.load(path, vl.EmpiricalRisk(net, loss, batches))
    x = randn(risk.num_params)
    assert close(again @ x, G @ x) and close(again.eigvalsh(), evals)


def test_a_loss_of_ones_own() -> None:
    """Its mean is one over samples, whatever they have inside."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).cosh().sum() / len(f)

    batches = images()
    net = built(nn.Conv2d, 1, C, 3, 1, 1)
    samples = [
        (lambda m, x=x: m(x[None])[0], lambda f, t=t: (f - t).cosh().sum())
        for X, y in batches
        for x, t in zip(X, y, strict=True)
    ]
    risk = vl.EmpiricalRisk(net, loss, batches, reduction="mean")
    check_products(risk, truth_of(net, samples, 1 / 6))
