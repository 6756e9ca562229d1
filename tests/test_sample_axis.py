"""Samples that are not along the first axis of everything."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.cases import Lambda
from tests.sample_truth import check, check_products, close, truth_of

CE = nn.CrossEntropyLoss()
N, T, C = 6, 5, 3
GENERATOR = torch.Generator().manual_seed(0)
y = torch.randint(C, (N,), generator=GENERATOR)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


class State(nn.Module):
    """A state [layers, N, H] beside inputs [N, T, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.h, self.o = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        h = self.i(x).mean(1)
        for layer in state:
            h = torch.tanh(self.h(layer) + h)
        out: Tensor = self.o(h)
        return out


class Cell(nn.Module):
    """States of an LSTM, a pair in a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(3, 4), nn.Linear(4, C)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = self.o(self.r(x, state)[0][-1])
        return out


class SeqFirst(nn.Module):
    """Sequences [T, N, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.MultiheadAttention(4, 2), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.a(x, x, x, need_weights=False)[0].mean(0))
        return out


class Masked(nn.Module):
    """A mask [N * heads, T, T], or one [T, T] for all."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(4, 2, batch_first=True)
        self.o = nn.Linear(4, C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.a(x, x, x, attn_mask=mask, need_weights=False)[0]
        out: Tensor = self.o(h.mean(1))
        return out


class Bag(nn.Module):
    def __init__(self, closed: bool = False) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(11, 4, mode="sum", include_last_offset=closed)
        self.o = nn.Linear(4, C)

    def forward(self, text: Tensor, offsets: Tensor, weights: Any = None) -> Tensor:
        out: Tensor = self.o(torch.tanh(self.e(text, offsets, weights)))
        return out


class GCN(nn.Module):
    """Graphs with a feature of each edge, and one of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, C), nn.Linear(1, C)

    def forward(
        self, x: Tensor, edges: Tensor, batch: Tensor, of_edges: Tensor, bias: Tensor
    ) -> Tensor:
        h = self.a(x)
        messages = self.b(of_edges) * h[edges[0]]
        h = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], messages))
        return bias + torch.zeros(len(bias), C).to(h).index_add(0, batch, h)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def masks(heads: int) -> Tensor:
    result = torch.rand(N, T, T, generator=GENERATOR) < 0.3
    result[:, range(T), range(T)] = False
    return result.repeat_interleave(heads, 0)


SIZES = torch.tensor([3, 2, 4, 1, 2, 3])
STARTS = [0, *SIZES.cumsum(0).tolist()]
OWNER = torch.arange(N).repeat_interleave(SIZES)


def graphs() -> tuple[Tensor, ...]:
    """Rings, two edges a node."""
    edges = []
    for start, size in zip(STARTS, SIZES.tolist(), strict=False):
        ring = torch.arange(size)
        for step in (1, 2):
            edges.append(torch.stack([ring, (ring + step) % size]) + start)
    joined = torch.cat(edges, dim=1)
    return randn(len(OWNER), 3), joined, OWNER, randn(joined.shape[1], 1), randn(N, C)


def one_graph(X: Sequence[Tensor], i: int) -> tuple[Tensor, ...]:
    nodes, edges, _, of_edges, bias = X
    start, stop = STARTS[i], STARTS[i + 1]
    mine = (edges[0] >= start) & (edges[0] < stop)
    batch = torch.zeros(stop - start, dtype=torch.int64)
    own = edges[:, mine] - start
    return nodes[start:stop], own, batch, of_edges[mine], bias[i : i + 1]


Case = tuple[nn.Module, Any, Callable[[Any, int], Any]]


def case(name: str) -> Case:
    """A model, its inputs, and those of one sample."""
    torch.manual_seed(1)
    if name == "state":
        X = randn(N, T, 3), randn(2, N, 4)
        return State(), X, lambda X, i: (X[0][i : i + 1], X[1][:, i : i + 1])
    if name == "as many layers as samples":
        X = randn(N, T, 3), randn(N, N, 4)
        return State(), X, lambda X, i: (X[0][i : i + 1], X[1][:, i : i + 1])
    if name == "states in a pair":
        X = randn(T, N, 3), (randn(1, N, 4), randn(1, N, 4))
        return Cell(), X, lambda X, i: (X[0][:, [i]], tuple(s[:, [i]] for s in X[1]))
    if name == "sequence first":
        return SeqFirst(), randn(T, N, 4), lambda X, i: (X[:, i : i + 1],)
    if name == "sequence first, as long as the batch":
        return SeqFirst(), randn(N, N, 4), lambda X, i: (X[:, i : i + 1],)
    if name == "mask for each head":
        X = randn(N, T, 4), masks(2)
        return Masked(), X, lambda X, i: (X[0][[i]], X[1][2 * i : 2 * i + 2])
    if name == "mask for all":
        return Masked(), (randn(N, T, 4), causal(T)), lambda X, i: (X[0][[i]], X[1])
    if name == "mask for all, as long as the batch":
        return Masked(), (randn(N, N, 4), causal(N)), lambda X, i: (X[0][[i]], X[1])
    if name.startswith("bags"):
        starts = torch.tensor([0, 3, 4, 4, 10, 15, 17])  # one of them is empty
        closed = name == "bags with an end"
        offsets = starts if closed else starts[:-1]
        text = torch.randint(11, (17,), generator=GENERATOR)
        X = (text, offsets, randn(17)) if name == "bags, weighted" else (text, offsets)

        def one(X: Any, i: int) -> Any:
            text, _, *weights = (t[starts[i] : starts[i + 1]] for t in X)
            ends = torch.tensor([0, len(text)] if closed else [0])
            return (text, ends, *weights)

        return Bag(closed), X, one
    assert name == "graphs"
    return GCN(), graphs(), one_graph


FOUND = [
    "state",
    "as many layers as samples",
    "states in a pair",
    "sequence first",
    "sequence first, as long as the batch",
    "mask for each head",
    "mask for all",
    "mask for all, as long as the batch",
    "bags",
    "bags with an end",
    "bags, weighted",
    "graphs",
]


def truth_for(model: nn.Module, X: Any, one: Any, chosen: Sequence[int]) -> Any:
    samples = [
        (
            lambda m, i=i: m(*one(X, i))[0],
            lambda f, i=i: F.cross_entropy(f, y[i]),
        )
        for i in chosen
    ]
    return truth_of(model, samples, 1 / len(chosen))


@pytest.mark.parametrize("name", FOUND)
def test_samples_are_found(name: str) -> None:
    model, X, one = case(name)
    model = model.double()
    risk = vl.EmpiricalRisk(model, CE, (X, y))
    thorough = check if name in ("state", "graphs") else check_products
    thorough(risk, truth_for(model, X, one, range(N)))
    chosen = [4, 1, 2]
    check_products(risk.subset(chosen), truth_for(model, X, one, chosen))


AXES: dict[str, Any] = {
    "state": (0, 1),
    "as many layers as samples": (0, 1),
    "states in a pair": 1,
    "sequence first": 1,
    "sequence first, as long as the batch": -2,
    "mask for all": (0, None),
    "mask for all, as long as the batch": (0, None),
}


@pytest.mark.parametrize("check_model", [True, False])
@pytest.mark.parametrize("name", AXES)
def test_samples_are_where_the_user_says(name: str, check_model: bool) -> None:
    model, X, one = case(name)
    model = model.double()
    risk = vl.EmpiricalRisk(
        model, CE, (X, y), sample_axis=AXES[name], check=check_model
    )
    check_products(risk, truth_for(model, X, one, range(N)))
    digest = risk.fingerprint()["samples"]
    assert digest == risk.subset(range(N)).fingerprint()["samples"]


def take_sets(X: Any, index: Tensor) -> Any:
    points, sizes = X["points"], X["sizes"]
    parts = points.split(sizes)
    return {
        "points": torch.cat([parts[i] for i in index.tolist()]),
        "sizes": [sizes[i] for i in index.tolist()],
    }


def test_take_and_count_of_the_user() -> None:
    """For what nobody could find: sets of points, whose sizes are no tensor."""

    def forward(m: Any, X: Any) -> Tensor:
        sums = [part.mean(0) for part in torch.tanh(m.f(X["points"])).split(X["sizes"])]
        return torch.stack(sums)

    torch.manual_seed(1)
    model = Lambda(forward, f=nn.Linear(3, C)).double()
    X = {"points": randn(len(OWNER), 3), "sizes": SIZES.tolist()}
    with pytest.raises(ValueError, match="sample_axis="):
        vl.EmpiricalRisk(model, CE, (X, y))
    risk = vl.EmpiricalRisk(
        model, CE, (X, y), take=take_sets, count=lambda X: len(X["sizes"])
    )

    def one(X: Any, i: int) -> Any:
        return (X["points"][STARTS[i] : STARTS[i + 1]],)

    alone = Lambda(lambda m, x: torch.tanh(m.f(x)).mean(0, True), f=model.f)
    check_products(risk, truth_for(alone, X, one, range(N)))
    check_products(risk.subset([5, 0]), truth_for(alone, X, one, [5, 0]))


def test_images_in_a_list() -> None:
    """Of several sizes, and one output each."""
    images = [
        randn(1, h, w) for h, w in ((4, 4), (6, 5), (3, 7), (4, 4), (5, 5), (3, 3))
    ]

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(1, C, 3, padding=1)

        def forward(self, images: list[Tensor]) -> Tensor:
            return torch.stack([torch.tanh(self.c(i)).mean((1, 2)) for i in images])

    model = Pooled().double()
    risk = vl.EmpiricalRisk(model, CE, (images, y))
    truth = truth_for(model, images, lambda X, i: ([X[i]],), range(N))
    check_products(risk, truth)
    check_products(
        risk.subset([3, 0]),
        truth_for(model, images, lambda X, i: ([X[i]],), [3, 0]),
    )


def test_a_count_of_neither_samples_nor_items() -> None:
    model, X = nn.Linear(3, C).double(), randn(N, 3)
    options: Any = {"take": lambda X, i: X[i], "count": lambda X: N - 2}
    with pytest.raises(ValueError, match=r"^count: finds 4 samples in batch 0, whose"):
        vl.EmpiricalRisk(model, CE, (X, y), **options)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    sets = [randn(k, 3) for k in (2, 3, 1, 2, 4, 2)]
    X = torch.nested.nested_tensor(sets, layout=layout)

    def forward(m: Any, X: Any) -> Tensor:
        parts = X.unbind() if isinstance(X, Tensor) else X
        return torch.stack([torch.tanh(m.f(part)).mean(0) for part in parts])

    torch.manual_seed(1)
    model = Lambda(forward, f=nn.Linear(3, C)).double()
    risk = vl.EmpiricalRisk(model, CE, (X, y))
    check_products(risk, truth_for(model, sets, lambda X, i: ([X[i]],), range(N)))
    some = truth_for(model, sets, lambda X, i: ([X[i]],), [4, 1])
    check_products(risk.subset([4, 1]), some)


def means(h: Tensor) -> Tensor:
    return torch.stack([part.mean(0) for part in h.unbind()])


@pytest.mark.parametrize(
    ("forward", "f", "layout"),
    [
        (lambda m, X: means(m.f(X).relu()), nn.Linear(3, C), torch.strided),
        (lambda m, X: means(m.f(X).relu()), nn.Linear(3, C), torch.jagged),
        (lambda m, X: means(m.f(X) + X), nn.LayerNorm(3), torch.jagged),
        (lambda m, X: means(m.f(X * X)), nn.RMSNorm(3), torch.jagged),
        (
            lambda m, X: means(m.f(X).sin()),
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)),
            torch.jagged,
        ),
    ],
)
def test_layers_of_nested_tensors(forward: Any, f: Any, layout: torch.layout) -> None:
    """Parameters meet all samples at once, without an axis of samples."""
    sets = [randn(k, 3) for k in (2, 3, 1, 2, 4, 2)]
    torch.manual_seed(1)
    for p in f.parameters():
        nn.init.normal_(p)
    model = Lambda(forward, f=f).double()
    X = torch.nested.nested_tensor(sets, layout=layout)
    risk = vl.EmpiricalRisk(model, CE, (X, y))

    def one(X: list[Tensor], i: int) -> tuple[Tensor]:
        return (torch.nested.nested_tensor([X[i]], layout=layout),)

    check_products(risk, truth_for(model, sets, one, range(N)))
    check_products(risk.subset([4, 1]), truth_for(model, sets, one, [4, 1]))


@pytest.mark.parametrize(
    "layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc]
)
def test_sparse_inputs(layout: torch.layout) -> None:
    dense = randn(N, 4) * (torch.rand(N, 4, generator=GENERATOR) < 0.5)
    torch.manual_seed(1)
    model = Lambda(lambda m, x: x @ m.f.weight.T + m.f.bias, f=nn.Linear(4, C)).double()
    risk = vl.EmpiricalRisk(model, CE, (dense.to_sparse(layout=layout), y))

    def one(X: Tensor, i: int) -> tuple[Tensor]:
        return (X[[i]],)

    check_products(risk, truth_for(model, dense, one, range(N)))
    check_products(risk.subset([4, 1]), truth_for(model, dense, one, [4, 1]))


def test_two_nested_tensors() -> None:
    lists = [[randn(k, 3) for k in (2, 3, 1, 2, 4, 2)] for _ in range(2)]
    X = tuple(map(torch.nested.nested_tensor, lists))

    def forward(m: Any, *inputs: Any) -> Tensor:
        a, b = (X.unbind() if isinstance(X, Tensor) else X for X in inputs)
        pairs = zip(a, b, strict=True)
        return torch.stack([m.f(a).tanh().mean(0) - m.g(b).mean(0) for a, b in pairs])

    torch.manual_seed(1)
    model = Lambda(forward, f=nn.Linear(3, C), g=nn.Linear(3, C)).double()
    risk = vl.EmpiricalRisk(model, CE, (X, y))

    def one(X: Any, i: int) -> tuple[Any, ...]:
        return [X[0][i]], [X[1][i]]

    check_products(risk, truth_for(model, lists, one, range(N)))


def test_bags_whatever_the_default_device_is() -> None:
    torch.manual_seed(1)
    tokens, offsets = torch.randint(11, (20,)), torch.tensor([0, 3, 5, 9, 12, 15])
    model, loss = Bag().double(), nn.CrossEntropyLoss()
    with torch.device("meta"):
        risk = vl.EmpiricalRisk(model, loss, ((tokens, offsets), y))
        part = risk.subset([4, 1])
    own = torch.cat([tokens[12:15], tokens[3:5]]), torch.tensor([0, 3])
    expected = loss(model(*own), y[[4, 1]])
    torch.testing.assert_close(part.value(), expected.detach())


class Dictionary(dict):
    """Tensors with common axes, which it checks, as a ``TensorDict``."""

    def __init__(self, items: dict[str, Tensor], batch_size: torch.Size) -> None:
        super().__init__()
        self.batch_size = batch_size
        for key, value in items.items():
            self[key] = value

    def __setitem__(self, key: str, value: Tensor) -> None:
        assert value.shape[:1] == self.batch_size
        super().__setitem__(key, value)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        parts = {name: value[key] for name, value in self.items()}
        return Dictionary(parts, torch.Size([len(key)]))


def test_dictionaries_that_check_their_sizes() -> None:
    X = Dictionary({"x": randn(N, 4), "s": randn(N, 1)}, torch.Size([N]))

    def forward(m: Any, X: Any) -> Tensor:
        assert type(X) is Dictionary
        return m.f(X["x"]) * X["s"]

    torch.manual_seed(1)
    model = Lambda(forward, f=nn.Linear(4, C)).double()
    risk = vl.EmpiricalRisk(model, CE, (X, y), predict=lambda m, X: m(X))
    alone = Lambda(lambda m, x, s: m.f(x) * s, f=model.f)
    truth = truth_for(alone, X, lambda X, i: (X["x"][[i]], X["s"][[i]]), range(N))
    check_products(risk, truth)


def test_batches_show_what_one_does_not() -> None:
    """A state with as many layers as the first batch has samples."""
    model = State().double()
    x, h = randn(N, T, 3), randn(2, N, 4)
    cut = [
        ((x[:2], h[:, :2]), y[:2]),
        ((x[2:], h[:, 2:]), y[2:]),
    ]
    whole = vl.EmpiricalRisk(model, CE, ((x, h), y))
    for check_model in (True, False):
        risk = vl.EmpiricalRisk(model, CE, cut, check=check_model)
        torch.testing.assert_close(vl.GGN(risk).eigvalsh(), vl.GGN(whole).eigvalsh())
        assert risk.fingerprint()["samples"] == whole.fingerprint()["samples"]


# What is refused ----------------------------------------------------------------------


def test_a_model_that_mixes_samples_is_found_out_in_all_ways() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        return h - h.mean(0)

    model = Lambda(forward, f=nn.Linear(N, C)).double()
    with pytest.raises(ValueError, match="depend on the other samples"):
        vl.EmpiricalRisk(model, CE, (randn(N, N), y))


def test_an_error_of_the_model_is_shown() -> None:
    """Of a state without an axis of samples, which it does not take of another size."""

    def forward(m: Any, x: Tensor, state: Tensor) -> Tensor:
        if state.shape[0] != len(x) * 2 or not torch.equal(x, inputs):
            raise KeyError("this state is of other samples")
        return m.f(x)

    inputs = randn(N, 4)
    model = Lambda(forward, f=nn.Linear(4, C)).double()
    with pytest.raises(ValueError, match="this state is of other samples") as caught:
        vl.EmpiricalRisk(model, CE, ((inputs, randn(2 * N, 3)), y))
    assert "depend on" not in str(caught.value)
    assert "sample_axis=" in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"sample_axis": 3}, ValueError, "sample_axis: is 3 for X"),
        ({"sample_axis": (0, 0, 1)}, ValueError, "sample_axis: has the parts"),
        ({"sample_axis": (0, "1")}, TypeError, "sample_axis: an integer, None"),
        ({"sample_axis": (0, 0)}, ValueError, "sample_axis: batch 0 has not 6"),
        ({"sample_axis": None, "take": take_sets}, TypeError, "give both"),
        ({"take": take_sets, "count": 3}, TypeError, "count: a function"),
        ({"take": take_sets, "count": lambda X: 0}, ValueError, "count: finds 0"),
        (
            {"take": take_sets, "count": len, "sample_axis": 0},
            TypeError,
            "sample_axis: with take",
        ),
        ({"target": "labels"}, TypeError, "target: a function"),
    ],
)
def test_what_is_said_wrongly(
    keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, X, _ = case("state")
    with pytest.raises(error, match=message):
        vl.EmpiricalRisk(model.double(), CE, (X, y), **keywords)


def test_jacobians_without_targets_count_samples_themselves() -> None:
    for name in ("graphs", "bags", "sequence first"):
        model, X, one = case(name)
        model = model.double()
        axis = {"sample_axis": 1} if name == "sequence first" else {}
        J = vl.Jacobian(model, X, **axis)
        assert J.risk.num_samples == N
        expected = truth_for(model, X, one, range(N)).J
        assert close(J.to_dense(), torch.cat(expected))


WORDS = ["one", "three", "seventeen", "", "of", "samples"]


class OfTexts(nn.Module):
    """Counts letters of texts; with numbers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(5, C)

    def forward(self, X: Any) -> Tensor:
        texts, numbers = (X["texts"], X["x"]) if isinstance(X, dict) else (X, 0.0)
        counts = [[text.count(letter) for letter in "aeios"] for text in texts]
        return torch.tanh(self.f(torch.tensor(counts).double())) + numbers


@pytest.mark.parametrize("form", ["texts", "array", "texts and numbers", "said"])
def test_texts_are_samples(form: str) -> None:
    torch.manual_seed(1)
    model, numbers = OfTexts().double(), randn(C, N)
    X: Any = np.array(WORDS) if form == "array" else list(WORDS)
    keywords = {}
    if form in ("texts and numbers", "said"):
        X = {"texts": X, "x": numbers.T, "sizes": (1, 2)}
    if form == "said":
        keywords = {"sample_axis": {"texts": 0, "x": 0, "sizes": None}}

    def one(X: Any, i: int) -> Any:
        texts = X["texts"] if isinstance(X, dict) else X
        part = [str(texts[i])]
        return ({"texts": part, "x": X["x"][[i]]} if isinstance(X, dict) else part,)

    risk = vl.EmpiricalRisk(model, CE, (X, y), predict=lambda m, X: m(X), **keywords)
    check_products(risk, truth_for(model, X, one, range(N)))
    check_products(risk.subset([4, 1]), truth_for(model, X, one, [4, 1]))
    digest = risk.fingerprint()["samples"]
    assert digest == risk.subset(range(N)).fingerprint()["samples"]
    assert digest != risk.subset([1, 0, 2, 3, 4, 5]).fingerprint()["samples"]


def test_objects_that_refer_to_each_other_are_entered_once() -> None:
    class Node:
        pass

    nodes = [Node() for _ in range(12)]
    for node in nodes:
        node.others = nodes
    X = {"x": randn(N, 4), "nodes": nodes[0]}
    model = Lambda(lambda m, X: m.f(X["x"]), f=nn.Linear(4, C)).double()
    risk = vl.EmpiricalRisk(model, CE, (X, y))
    assert risk.num_samples == N
