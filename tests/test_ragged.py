"""Samples with different numbers of outputs: padded batches, images, nodes."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils.data import DataLoader

import vivit_linop as vl
from tests.sample_truth import Sample, check, check_products, close, truth_of

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


# Batches with samples of several shapes -----------------------------------------------


class Listed(nn.Module):
    """Images of several sizes, a list in and a list out."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.c, self.nested = nn.Conv2d(1, C, 3, padding=1), nested

    def forward(self, images: Any) -> Any:
        outputs = [self.c(image[None])[0] for image in images]
        return torch.nested.nested_tensor(outputs) if self.nested else outputs


SHAPES = (2, 2), (2, 3), (2, 3), (1, 2)


@pytest.mark.parametrize("form", ["list", "tuple", "batches", "loader"])
def test_lists_of_images(form: str) -> None:
    net = built(Listed)
    X = [randn(1, *shape) for shape in SHAPES]
    y = [randint(C, *shape) for shape in SHAPES]
    pairs = list(zip(X, y, strict=True))
    data = {
        "list": (X, y),
        "tuple": (tuple(X), tuple(y)),
        "batches": [(X[:1], y[:1]), (X[1:], y[1:])],
        "loader": DataLoader(
            pairs, 3, collate_fn=lambda b: tuple(zip(*b, strict=True))
        ),
    }[form]
    risk = vl.EmpiricalRisk(net, CE, data)
    samples = [
        (
            lambda m, x=x: m([x])[0],
            lambda f, t=t: F.cross_entropy(f[None], t[None], reduction="sum"),
        )
        for x, t in zip(X, y, strict=True)
    ]
    thorough = check if form == "list" else check_products
    thorough(risk, truth_of(net, samples, 1 / 18))
    assert risk.batch_sizes == [1, 2, 1]
    some = truth_of(net, [samples[i] for i in (3, 2, 1)], 1 / 14)
    check_products(risk.subset([3, 2, 1]), some)
    whole = vl.EmpiricalRisk(net, CE, (X, y))
    assert risk.fingerprint()["samples"] == whole.fingerprint()["samples"]
    assert close(risk.at().gradient(), risk.gradient())


def test_lists_of_equal_outputs_are_one_tensor() -> None:
    net, X = built(Listed), [randn(1, 2, 3) for _ in range(4)]
    y = randint(C, 4, 2, 3)
    risk = vl.EmpiricalRisk(net, CE, (X, y))
    plain = vl.EmpiricalRisk(net.c, CE, (torch.stack(X), y))
    assert close(vl.GGN(risk).eigvalsh(), vl.GGN(plain).eigvalsh())
    assert risk.num_outputs == C * 6


SIZES = [3, 2, 2, 1]


class NodeNet(nn.Module):
    """Classes of nodes, one graph after the other."""

    def __init__(self, outputs: int = C) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor, edges: Tensor, owner: Tensor) -> Tensor:
        h = self.a(x)
        h = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        return self.b(h)


def graphs(sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rings; a node alone has no edge."""
    edges, start = [], 0
    for size in sizes:
        ring = torch.arange(size if size > 1 else 0)
        edges.append(torch.stack([ring, (ring + 1) % size]) + start)
        start += size
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return randn(sum(sizes), 3), torch.cat(edges, dim=1), owner


def of_graphs(sizes: Sequence[int], X: Any, y: Tensor, loss: Any) -> list[Sample]:
    samples: list[Sample] = []
    start = 0
    for size in sizes:
        own = slice(start, start + size)
        _, edges, owner = graphs([size])
        samples.append(
            (
                lambda m, own=own, e=edges, o=owner: m(X[0][own], e, o),
                lambda f, own=own: loss(f, y[own]),
            )
        )
        start += size
    return samples


NODES: dict[str, tuple[Any, Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]]
NODES = {
    "classes": (CE, lambda: randint(C, 8), SUMS[nn.CrossEntropyLoss]),
    "ignored classes": (
        nn.CrossEntropyLoss(torch.rand(C).double(), ignore_index=1),
        lambda: torch.tensor([0, 1, 2, 0, 1, 1, 2, 0]),
        lambda f, y: nn.CrossEntropyLoss(
            NODES["ignored classes"][0].weight, ignore_index=1, reduction="sum"
        )(f, y),
    ),
    "soft classes": (
        CE,
        lambda: randn(8, C).softmax(1),
        SUMS[nn.CrossEntropyLoss],
    ),
    "values": (nn.MSELoss(), lambda: randn(8, C), SUMS[nn.MSELoss]),
    "labels": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()),
        lambda: randint(2, 8, C).double(),
        lambda f, y: F.binary_cross_entropy_with_logits(
            f,
            y,
            pos_weight=torch.tensor([1.0, 2.0, 3.0]).double(),
            reduction="sum",
        ),
    ),
}


def divisor(name: str, loss: Any, y: Tensor) -> float:
    if name == "ignored classes":
        return float(loss.weight[y[y != 1]].sum())
    return len(y) * (1 if isinstance(loss, nn.CrossEntropyLoss) else C)


@pytest.mark.parametrize("name", NODES)
def test_nodes_of_graphs(name: str) -> None:
    loss, targets, total = NODES[name]
    net, X, y = built(NodeNet), graphs(SIZES), targets()
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    samples = of_graphs(SIZES, X, y, total)
    thorough = check if name in ("classes", "labels") else check_products
    thorough(risk, truth_of(net, samples, 1 / divisor(name, loss, y)))
    # The matrices of all samples together are those of the flat outputs.
    flat = torch.autograd.functional.jacobian(
        lambda b: X[0].new_zeros(8, C) + b, net.b.bias.detach()
    )
    assert close(vl.Jacobian(risk).to_dense()[:, -C:], flat.reshape(-1, C))


def test_subsets_and_cuts_of_graphs() -> None:
    net, X, y = built(NodeNet), graphs(SIZES), randint(C, 8)
    samples = of_graphs(SIZES, X, y, SUMS[nn.CrossEntropyLoss])
    risk = vl.EmpiricalRisk(net, CE, (X, y))
    chosen = [3, 1, 2]
    some = truth_of(net, [samples[i] for i in chosen], 1 / 5)
    check_products(risk.subset(chosen), some)
    check_products(risk.subset([3]), truth_of(net, [samples[3]], 1.0))
    assert close(risk.at().value(), risk.value())
    copied = pickle.loads(pickle.dumps(risk))
    assert close(vl.GGN(copied).eigvalsh(), vl.GGN(risk).eigvalsh())
    sum_of = nn.CrossEntropyLoss(reduction="sum")
    total = vl.EmpiricalRisk(net, sum_of, (X, y))
    check_products(total, truth_of(net, samples, 1.0, r=1.0))


def test_a_batch_with_as_many_nodes_as_graphs_comes_first() -> None:
    """What outputs are then is seen at the second batch only."""
    net, y = built(NodeNet), randint(C, 8)
    X, ones = graphs([3, 2]), graphs([1, 1, 1])
    data = [(ones, y[:3]), (X, y[3:])]
    risk = vl.EmpiricalRisk(
        net,
        CE,
        data,
        take=lambda X, index: _taken(X, index),
        count=lambda X: int(X[2].max()) + 1,
    )
    samples = [
        *of_graphs([1, 1, 1], ones, y[:3], SUMS[nn.CrossEntropyLoss]),
        *of_graphs([3, 2], X, y[3:], SUMS[nn.CrossEntropyLoss]),
    ]
    check_products(risk, truth_of(net, samples, 1 / 8))


def _taken(X: Any, index: Tensor) -> Any:
    """Whole graphs, by their sizes: they are rings."""
    x, _, owner = X
    sizes = [int((owner == i).sum()) for i in index]
    _, edges, own = graphs(sizes)
    return torch.cat([x[owner == i] for i in index]), edges, own


def test_a_loss_of_ones_own_of_items() -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).cosh().sum(1).mean()

    net, X, y = built(NodeNet), graphs(SIZES), randn(8, C)
    samples = of_graphs(SIZES, X, y, lambda f, y: (f - y).cosh().sum())
    risk = vl.EmpiricalRisk(net, loss, (X, y), reduction="mean")
    check_products(risk, truth_of(net, samples, 1 / 8))
    H = torch.block_diag(*truth_of(net, samples, 1 / 8).H)
    assert close(vl.LossHessian(risk).to_dense(), H)


@pytest.mark.parametrize("weighted", [False, True])
def test_outputs_of_items_that_a_loss_couples(weighted: bool) -> None:
    """That a loss couples none of an item's outputs is not believed."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).sum(1).cosh()

    net, X, y = built(NodeNet), graphs(SIZES), randn(8, C)
    for coupled in ("none", "all"):
        of: Any = vl.Loss(loss, coupled=coupled, reduction="sum")
        target: Any = y
        if weighted:
            of, target = vl.losses.Weighted(of), (y, torch.ones(8).double())
        risk = vl.EmpiricalRisk(net, of, (X, target))
        if coupled == "none":
            with pytest.raises(ValueError, match="couples outputs"):
                vl.LossHessian(risk)
            continue
        samples = of_graphs(SIZES, X, y, lambda f, y: loss(f, y).sum())
        truth = torch.block_diag(*truth_of(net, samples, 1.0).H)
        H = vl.LossHessian(risk)
        assert close(H.to_dense(), truth)
        S = H.sqrt().to_dense()
        assert close(S @ S.T, truth)


@pytest.mark.parametrize("outputs", [C, 1])
def test_drawn_factors_of_items(outputs: int) -> None:
    loss: Any = CE if outputs > 1 else nn.BCEWithLogitsLoss()
    net, X = built(NodeNet, outputs), graphs(SIZES)
    y = randint(C, 8) if outputs > 1 else randint(2, 8, 1).double()
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    generator = torch.Generator().manual_seed(0)
    H = vl.LossHessian(risk).to_dense()
    S = vl.LossHessian(risk).sqrt(mc_samples=20_000, generator=generator)
    assert S.shape[1] == 4 * 20_000
    dense = S.to_dense()
    assert (dense @ dense.T - H).norm() <= 0.05 * H.norm()


def test_weights_of_items() -> None:
    net, X, y, w = built(NodeNet), graphs(SIZES), randint(C, 8), randn(8).exp()
    loss = vl.losses.Weighted(nn.CrossEntropyLoss(reduction="sum"))
    risk = vl.EmpiricalRisk(net, loss, (X, (y, w)))
    outputs = net(*X)
    total = (w * F.cross_entropy(outputs, y, reduction="none")).sum()
    assert close(risk.value(), total.detach())
    gradient = torch.autograd.grad(total, list(net.parameters()))
    assert close(risk.gradient(), risk.flatten(gradient))


def test_nodes_that_see_other_graphs_are_found_out() -> None:
    class Mixing(NodeNet):
        def forward(self, x: Tensor, edges: Tensor, owner: Tensor) -> Tensor:
            h = super().forward(x, edges, owner)
            return h - h.mean(0)

    with pytest.raises(ValueError, match="depend on the other samples"):
        vl.EmpiricalRisk(built(Mixing), CE, (graphs(SIZES), randint(C, 8)))


class TokenNet(nn.Module):
    """Classes of the tokens of a packed sequence, in its order."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.r, self.o, self.form = nn.RNN(3, 2), nn.Linear(2, C), form

    def forward(self, packed: rnn.PackedSequence) -> Any:
        h = self.r(packed)[0]
        f = self.o(h.data)
        return f if self.form == "tensor" else h._replace(data=f)


@pytest.mark.parametrize("form", ["tensor", "packed"])
def test_tokens_of_packed_sequences(form: str) -> None:
    lengths = (2, 1, 3, 2)
    net = built(TokenNet, form)
    sequences = [randn(k, 3) for k in lengths]
    classes = [randint(C, k) for k in lengths]
    X, y = (rnn.pack_sequence(s, enforce_sorted=False) for s in (sequences, classes))
    risk = vl.EmpiricalRisk(net, CE, (X, y if form == "packed" else y.data))
    alone = built(TokenNet, "tensor")
    samples = [
        (
            lambda m, s=s: m(rnn.pack_sequence([s])),
            lambda f, t=t: F.cross_entropy(f, t, reduction="sum"),
        )
        for s, t in zip(sequences, classes, strict=True)
    ]
    check_products(risk, truth_of(alone, samples, 1 / 8))
    some = truth_of(alone, [samples[i] for i in (2, 0)], 1 / 5)
    check_products(risk.subset([2, 0]), some)


def test_kronecker_factors_of_tokens_do_not_depend_on_samples() -> None:
    """Each token is a sample of its own to the layers: KFAC-expand."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o = nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            f = self.o(x)
            return f.transpose(1, 2) if x.ndim == 3 else f

    net = built(Linear)
    batches = [(randn(n, T, 4), randint(C, n, T)) for n, T in ((3, 5), (2, 7), (1, 1))]
    flat = [(X.flatten(0, 1), y.flatten()) for X, y in batches]
    found, expected = (
        vl.KFAC(net, CE, data, variant="exact").to_dense() for data in (batches, flat)
    )
    assert close(found, expected)


def test_outputs_that_the_model_pads_are_refused_with_advice() -> None:
    class Padding(Listed):
        def forward(self, images: Any) -> Any:
            rows = [f.flatten(1).T for f in super().forward(images)]
            return rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)

    X, y = [randn(1, *shape) for shape in SHAPES], randint(C, 4, 6)
    with pytest.raises(ValueError, match="return a list with those of each sample"):
        vl.EmpiricalRisk(built(Padding), CE, (X, y))


# Inputs without entries ---------------------------------------------------------------


def of_sets(sizes: Sequence[int]) -> list[Tensor]:
    return [randn(size, 3) for size in sizes]


class Sets(nn.Module):
    """Sums over the points of each set, of which there may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, sets: list[Tensor]) -> Tensor:
        h = torch.tanh(self.a(torch.cat(sets)))
        return self.b(torch.stack([part.sum(0) for part in h.split([*map(len, sets)])]))


class Bag(nn.Module):
    """Sums over the tokens of each bag."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.EmbeddingBag(5, 4, mode="sum"), nn.Linear(4, C)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(tokens, offsets)))


class Edges(NodeNet):
    """Messages along edges that have features."""

    def forward(self, x: Tensor, edges: Tensor, owner: Tensor, along: Tensor) -> Tensor:
        h = self.a(x)
        messages = h[edges[0]] * along
        h = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], messages))
        return self.b(h.new_zeros(int(owner[-1]) + 1, 4).index_add(0, owner, h))


def empty_ones(name: str) -> tuple[nn.Module, list[Any]]:
    """A net, and its inputs of three samples each, one of which has no entries."""
    if name == "sets":
        return built(Sets), [[part] for part in of_sets([2, 0, 3])]
    if name == "bags":
        tokens = [randint(5, size) for size in (2, 0, 3)]
        return built(Bag), [(part, torch.tensor([0])) for part in tokens]
    parts = [graphs([size]) for size in (2, 1, 3)]  # a node alone has no edge
    return built(Edges), [(*part, randn(part[1].shape[1], 4)) for part in parts]


@pytest.mark.parametrize("name", ["sets", "bags", "edges"])
def test_samples_without_entries(name: str) -> None:
    net, inputs = empty_ones(name)
    y = randint(C, 3)

    def output(m: nn.Module, X: Any) -> Tensor:
        found: Tensor = m(X) if name == "sets" else m(*X)
        return found

    batches = [(X, y[i : i + 1]) for i, X in enumerate(inputs)]
    risk = vl.EmpiricalRisk(net, CE, batches, memory=0)
    samples = [
        (lambda m, X=X: output(m, X)[0], lambda f, t=t: F.cross_entropy(f[None], t))
        for X, t in batches
    ]
    check_products(risk, truth_of(net, samples, 1 / 3))
