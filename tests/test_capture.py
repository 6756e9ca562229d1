"""Uses of parameters: several, some, none; contractions; errors; memory."""

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

import vivit_linop as vl
from tests.capture_cases import (
    FACTORED,
    LAYERS,
    OPAQUE,
    WAYS,
    N,
    Spec,
    check,
    close,
    convolutions,
    drawn,
    one_layer,
    problem_of,
    spec,
    title,
    transposed,
    truth,
)
from tests.cases import Lambda, Problem, call, dense_of, features, parameter, problem
from tests.toys import Snapshot
from vivit_linop.modes import as_guest
from vivit_linop.net import dense as dense_columns
from vivit_linop.net.capture import Capture
from vivit_linop.net.certified import find_structure
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns

# Several uses, some uses, none --------------------------------------------------------


def test_tied_and_reused_weights_in_branches() -> None:
    # One layer three times, on a branch and after itself, with cross terms between the
    # uses; a weight that two layers share; one that is also used transposed.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.encoder(x).sin()
        h = m.shared(m.shared(h).tanh()) + m.shared(h - 1.0)
        return m.twin(h) + F.linear(h.sin(), m.encoder.weight.T)

    encoder, shared, twin = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 3)
    twin.weight = nn.Parameter(torch.randn(3, 2))
    net = Lambda(forward, encoder=encoder, shared=shared, twin=twin)
    uses = {
        # Factors of a matrix and of its transpose do not add up to factors.
        "encoder.weight": "dense: linear + linear",
        "encoder.bias": "dense: linear",
        "shared.weight": "linear + linear + linear",
        "shared.bias": "dense: linear + linear + linear",
        "twin.weight": "linear",
        "twin.bias": "dense: linear",
    }
    check(net, features(N, 3).double(), uses)


def test_tied_convolutions_and_embeddings() -> None:
    # Layers of different kinds and positions share what they have.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.linear(m.table((x[:, 0] > 0).long()), m.table.weight).sum(1)
        y = m.conv(x).sin()
        y = F.conv1d(y, m.conv.weight, m.conv.bias, padding=1, stride=2)
        return (h + y.sum(2) + F.conv_transpose1d(y, m.conv.weight).sum(2)).sin()

    net = Lambda(forward, conv=nn.Conv1d(2, 2, 2), table=nn.Embedding(2, 3))
    net.table.weight.data.normal_()
    uses = {
        "conv.weight": "dense: conv + conv + conv_transpose",
        "conv.bias": "dense: conv + conv",
        "table.weight": "dense: embedding + linear",
    }
    check(net, features(N, 2, 3).double(), uses)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "layer",
    [
        spec("linear", 2, 3)(nn.Linear, 3, 2),
        convolutions(1, kernel_size=2),
        transposed(1, kernel_size=2),
        spec("layer_norm", 3)(nn.LayerNorm, 3),
        spec("group_norm", 4, 2)(nn.GroupNorm, 2, 4),
    ],
    ids=title,
)
def test_frozen_part_of_a_layer(layer: Spec, frozen: str) -> None:
    kind, build, shape = layer
    net, X = one_layer(drawn(build()), *shape)
    getattr(net.layer, frozen).requires_grad_(False)
    if frozen == "bias" and kind in FACTORED:
        check(net, X, {"layer.weight": kind})
    else:
        kept = "bias" if frozen == "weight" else "weight"
        check(net, X, {f"layer.{kept}": f"dense: {kind}"})


def test_one_unknown_use_makes_a_parameter_opaque() -> None:
    # But not its neighbours.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x).sin() + F.linear(x, m.layer.weight.tanh())
        return m.last(h) * m.scale.exp()

    net = Lambda(
        forward, layer=nn.Linear(4, 3), last=nn.Linear(3, 3), scale=parameter(3)
    )
    uses = {
        "scale": OPAQUE,
        "layer.weight": OPAQUE,
        "layer.bias": "dense: linear",
        "last.weight": "linear",
        "last.bias": "dense: linear",
    }
    check(net, features(N, 4).double(), uses)


def test_views_inside_transformations() -> None:
    # What torch.func does inside a net cannot be followed, but is right.
    def forward(m: Any, x: Tensor) -> Tensor:
        slope = vmap(torch.func.grad(lambda row: (row @ m.w.T).sin().sum()))(x)
        return (slope[:, :3] + x[:, :3] * m.b[:3]).sin()

    net = Lambda(forward, w=parameter(2, 4), b=parameter(4))
    check(net, features(N, 4).double(), {"w": OPAQUE, "b": "dense: mul"})


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("padding", [None, 2])
def test_rows_of_a_matrix_are_looked_up_and_combined(
    tokens: int, padding: int | None
) -> None:
    """Tokens, and numbers that stand for one-hot ones, of batches and of two risks."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return (x @ m.w).sin().sum(1) @ m.v
        return F.embedding(x, m.w, padding).sin().sum(1) @ m.v

    net = Lambda(forward, w=parameter(7, 4), v=parameter(4, 3)).double()
    looked_up = torch.randint(7, (5, tokens)), torch.arange(5) % 3
    combined = torch.randn(4, tokens, 7).double(), torch.arange(4) % 3
    loss = nn.CrossEntropyLoss()
    risks = [vl.EmpiricalRisk(net, loss, data) for data in (looked_up, combined)]
    (L, _), (M, _) = (
        truth(risk, net, loss, data)
        for risk, data in zip(risks, (looked_up, combined), strict=True)
    )
    J = torch.cat([L, M])
    of_both = vl.Jacobian(net, loss, [looked_up, combined])
    assert close((of_both @ of_both.T).to_dense(), J @ J.T)
    left, right = map(vl.Jacobian, risks)
    weights = torch.rand(J.shape[1], dtype=torch.float64)
    P = vl.Diagonal(weights)
    for A, B, dense in ((left, right, (L, M)), (right, left, (M, L))):
        assert close((A @ B.T).to_dense(), dense[0] @ dense[1].T)
        assert close((A @ P @ B.T).to_dense(), (dense[0] * weights) @ dense[1].T)


@pytest.mark.parametrize("reached", [0, 29, 63])
@pytest.mark.parametrize("axis", [0, 1])
def test_few_passes_find_the_layer_that_one_sample_reaches(
    reached: int, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.cos()], dim=1 - axis)
        rare = m.rare(tokens).sin().sum(1 - axis)
        return m.head(torch.where(x[:, :1] > 1.0, rare, m.often(x)))

    members = {name: nn.Linear(3, 3) for name in ("rare", "often", "head")}
    net = Lambda(forward, **members).double()
    X = torch.rand(64, 3, dtype=torch.float64)
    X[reached] += 1.0
    loss, data = nn.CrossEntropyLoss(), (X, torch.arange(64) % 3)
    calls, way = [], Capture._backward
    count = lambda *given: calls.append(1) or way(*given)  # noqa: E731
    monkeypatch.setattr(Capture, "_backward", count)
    U = vl.PerSampleGradients(net, loss, data)
    gram = (U.T @ U).to_dense()
    assert len(calls) <= 8
    J, _ = truth(U.risk, net, loss, data)
    errors = net(X).detach().softmax(1) - F.one_hot(data[1], 3)
    columns = torch.einsum("nc,ncd->nd", errors, J.view(64, 3, -1))
    assert close(gram, columns @ columns.T)


@pytest.mark.parametrize("step", [-1, -2])
@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.LayerNorm(3)], ids=repr)
def test_as_many_steps_as_samples_of_which_the_last_reaches_no_layer(
    layer: nn.Module, step: int
) -> None:
    """Where its layout is guessed, the last step looks like the last sample."""
    n = 8

    def forward(m: Any, x: Tensor) -> Tensor:  # [steps, n, 3]
        reaches = (torch.arange(n) < n - 1).to(x).unsqueeze(1)
        out: Tensor = m.b(x[0]) + reaches * m.a(x)[step]
        return out

    net = Lambda(forward, a=copy.deepcopy(layer), b=nn.Linear(3, 3)).double()
    X, y = torch.randn(n, n, 3).double(), torch.arange(n) % 3
    loss = nn.CrossEntropyLoss()
    V = vl.GGN(net, loss, (X, y), sample_axis=1).factor
    _, G = truth(V.risk, net, loss, (X, y))
    found = torch.linalg.eigvalsh((V.T @ V).to_dense())
    expected = torch.linalg.eigvalsh(G)
    few = min(len(found), len(expected))
    torch.testing.assert_close(found[-few:], expected[-few:], rtol=1e-9, atol=1e-12)


# All ways to the same numbers ---------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["cnn", "convolutions", "reused_and_tied", "embedding", "transformer"]
)
def test_each_contraction(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def flops(*_: Any) -> dict[str, float]:
        return {other: float(other != way) for other in WAYS}

    monkeypatch.setattr(KhatriRaoColumns, "gram_flops", flops)
    # Small columns are formed, whatever the cost of their products.
    monkeypatch.setattr(KhatriRaoColumns, "formed_entries", lambda *_: 10**9)
    arguments, _ = problem(name).arguments()
    V = vl.GGNFactor(*arguments)
    assert way in {cost.contraction for cost in V.explain()}
    dense = V.to_dense()
    assert close((V.T @ V).to_dense(), dense.T @ dense)
    U = vl.PerSampleGradients(V.risk)
    cross = (U.T @ V).to_dense()
    assert (cross - U.to_dense().T @ dense).norm() <= 1e-10 * dense.norm() ** 2


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1)])
@pytest.mark.parametrize("memory", [None, 0])
def test_a_batch_of_one_sample_has_more_structure(
    sizes: tuple[int, int], memory: int | None
) -> None:
    # Of one sample, all rows of a matrix product that has samples as columns are its
    # own; of several, the product has no structure.
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x.T.reshape(4, -1).T.reshape(-1, 4).flip(0), m.w).flip(0).sin()

    net = Lambda(forward, w=parameter(3, 4))
    net, loss, (X, y) = problem_of(net, features(4, 4).double())
    whole = vl.EmpiricalRisk(net, loss, (X, y))
    data = list(zip(X.split(list(sizes)), y.split(list(sizes)), strict=True))
    parts = vl.EmpiricalRisk(net, loss, data, memory=memory)
    assert [c.use for c in vl.GGNFactor(whole).explain()] == ["no structure"]
    V = vl.GGNFactor(parts)
    J, G = truth(whole, net, loss, (X, y))
    dense = J.T @ V.output.to_dense()
    assert close((V.T @ V).to_dense(), dense.T @ dense)
    assert close((V @ V.T).diagonal(), G.diagonal())


@pytest.mark.parametrize("memory", [None, 0])
def test_parts_of_parameters_in_pieces(memory: int | None) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.attention(x, x.sin(), x.sin())
        return F.linear(h[:, 0], m.w[:3], m.w[4:, 0])

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net = Lambda(forward, attention=attention, w=parameter(7, 4))
    net, loss, data = problem_of(net, features(N, 3, 4).double())
    risk = vl.EmpiricalRisk(net, loss, data, memory=memory)
    V, U = vl.GGNFactor(risk), vl.PerSampleGradients(risk)
    J, G = truth(risk, net, loss, data)
    dense = J.T @ V.output.to_dense()
    assert close((V.T @ V).to_dense(), dense.T @ dense)
    assert close((U.T @ V).to_dense(), U.to_dense().T @ dense)
    sizes = [p.numel() for p in risk.params.values()]
    for block, start, size in zip(
        vl.GGN(risk).block_diagonal("parameter").blocks,
        itertools.accumulate([0, *sizes]),
        sizes,
        strict=False,
    ):
        part = slice(start, start + size)
        assert close(block.to_dense(), G[part, part])


# A guest ------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("moment", range(6))
def test_nothing_is_left_after_an_error(
    moment: int, error: type[BaseException]
) -> None:
    # In whatever pass, also between the layers of attention, which run as a function
    # of their own.
    calls = itertools.count()

    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.attention(x, x, x, need_weights=False)
        if m.raises and next(calls) >= moment:
            torch.rand(3)
            raise error
        return m.head(h.sum(1))

    net = Lambda(
        forward,
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
        raises=False,
    )
    net, loss, data = problem_of(net, features(N, 3, 4).double())
    net.attention.out_proj.bias.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    risk = vl.EmpiricalRisk(net, loss, data)
    V = vl.GGNFactor(risk)
    expected = (vl.GGNFactor(net, loss, data).T @ V).to_dense()
    before = Snapshot(net, data)
    net.raises = True
    with pytest.raises(error):
        for _ in range(6):
            vl.GGNFactor(net, loss, data).explain()
    before.check()
    assert not has_torch_function((torch.zeros(1),))
    net.raises = False
    assert torch.equal((vl.GGNFactor(net, loss, data).T @ V).to_dense(), expected)


def test_an_error_in_a_torch_function_is_that_of_the_user() -> None:
    # Attention itself raises, in the run that is recorded.
    wrong = {"now": False}

    def forward(m: Any, x: Tensor) -> Tensor:
        queries = x[..., :3] if wrong["now"] else x
        return m.head(m.attention(queries, x, x)[0].sum(1))

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net = Lambda(forward, attention=attention, head=nn.Linear(4, 3))
    net, loss, data = problem_of(net, features(N, 3, 4).double())
    V = vl.GGNFactor(net, loss, data, memory=0)  # the first run is not kept
    wrong["now"] = True
    with pytest.raises(AssertionError, match="embedding dimension"):
        V.explain()
    assert not has_torch_function((torch.zeros(1),))
    wrong["now"] = False
    dense = V.to_dense()
    assert close((V.T @ V).to_dense(), dense.T @ dense)


# Memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if layer[0] in FACTORED], ids=title
)
def test_memory_of_a_layer(layer: Spec) -> None:
    # What is said before is what the columns take, and what it takes to get them.
    _, build, shape = layer
    net, loss, data = problem_of(*one_layer(drawn(build()), *shape))
    risk = vl.EmpiricalRisk(net, loss, data)
    structure, names, R = find_structure(risk), set(risk.params), 4
    with as_guest(risk.device):
        capture = Capture(risk, data[0], N)
        cotangents = torch.randn(*capture.output.shape, R, dtype=torch.float64)
        variant = structure.variants[0]
        columns = capture.columns(cotangents, variant, names, "factors")
    taken = columns["layer.weight"].nbytes
    formed = {name: risk.params[name].numel() for name in structure.opaque}
    said = N * capture.keep_sizes(data[0]).entries(R, formed) * 8  # float64
    assert taken <= said <= 3 * taken


# Samples that take other ways ---------------------------------------------------------


def _by_sample(m: Any, x: Tensor) -> Tensor:
    ways = [(m.second if h.sum() > 0.0 else m.third)(h) for h in m.first(x).unbind()]
    return torch.stack(ways)


def _by_batch(m: Any, x: Tensor) -> Tensor:
    # Each parameter has a known structure on one way, and none on the other.
    v, w = (m.v, m.w) if x.sum() > 0.0 else (m.w, m.v)
    return F.linear(x, v).tanh() + torch.einsum("nd,cd->nc", x, w)


def _gated(m: Any, x: Tensor) -> Tensor:
    # No cotangent of the first samples reaches a layer that has the samples twice.
    left, right = m.layer(torch.cat([x, 2.0 * x])).tanh().chunk(2)
    return m.head(x) + (x[:, :1] < 0.0) * left * right


@pytest.mark.parametrize(
    ("forward", "sizes"),
    [
        *itertools.product([_by_sample, _gated], [(8,), (4, 4), (5, 3)]),
        (_by_batch, (4, 4)),
    ],
)
def test_samples_after_the_first_take_another_way(
    forward: Any, sizes: tuple[int, ...]
) -> None:
    members: dict[Any, dict[str, Any]] = {
        _by_sample: {n: nn.Linear(2, 2) for n in ("first", "second", "third")},
        _by_batch: {"v": parameter(2, 2), "w": parameter(2, 2)},
        _gated: {"layer": nn.Linear(2, 2), "head": nn.Linear(2, 2)},
    }
    net = Lambda(forward, **members[forward]).double()
    if forward is _by_sample:
        with torch.no_grad():
            net.first.weight.copy_(torch.eye(2))
            net.first.bias.zero_()
    first = torch.rand(4, 2, dtype=torch.float64) + 0.1
    X, y = torch.cat([first, -first]), torch.randn(8, 2, dtype=torch.float64)
    cut = Problem(net, nn.MSELoss(), (X, y)).rebatched(*sizes)
    truth = dense_of(cut)
    risk = vl.EmpiricalRisk(net, nn.MSELoss(), cut.data)
    assert close(vl.PerSampleGradients(risk).to_dense(), truth.U)
    V = vl.GGNFactor(risk).to_dense()
    assert close(V @ V.T, truth.G)
    assert close(vl.GGN(risk).diagonal(), truth.G.diagonal())
    assert close(
        (vl.Jacobian(risk) @ vl.Jacobian(risk).T).to_dense(), truth.J @ truth.J.T
    )


class Largest(TorchDispatchMode):
    """Sees the number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // 8)
        return result


def test_memory_of_parts_of_a_parameter() -> None:
    """Sums over the columns of an attention layer's input weight form none of them."""
    E, N = 32, 12
    layer = nn.MultiheadAttention(E, 2, batch_first=True)
    net = Lambda(lambda m, x: m.f(m.a(x, x.flip(1), x.cos())[0].sum(1)), a=layer)
    net.f = nn.Linear(E, 3)
    net, loss, data = problem_of(net, features(N, 3, E).double())
    risk = vl.EmpiricalRisk(net, loss, data)
    J, G = truth(risk, net, loss, data)
    V, U = vl.GGNFactor(risk), vl.PerSampleGradients(risk)
    with Largest() as largest:
        diagonal, norms = (V @ V.T).diagonal(), U.squared_norms()
    assert largest.entries <= 2 * risk.num_params
    assert close(diagonal, G.diagonal())
    errors = call(net, {}, data[0]).detach().softmax(1) - F.one_hot(data[1], 3)
    columns = torch.einsum("nc,ncd->nd", errors, J.view(N, 3, -1))
    assert close(norms, columns.square().sum(1))
    roots = V.output.to_dense().view(N, 3, N, -1).diagonal(dim1=0, dim2=2)
    by_sample = torch.einsum("ncd,ckn->nkd", J.view(N, 3, -1), roots)
    assert close(vl.GGN(risk).sample_diagonals(), N * by_sample.square().sum(1))


@pytest.mark.parametrize("memory", [None, 1])
def test_columns_without_a_structure_are_made_of_some_samples_at_a_time(
    memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the memory has room for signals of; torch's warnings are not heard."""
    chunks, way = list[Any](), dense_columns.vmap

    def noted(function: Any, *args: Any, **options: Any) -> Any:
        chunks.extend(options[key] for key in options.keys() & {"chunk_size"})
        return way(function, *args, **options)

    monkeypatch.setattr(dense_columns, "vmap", noted)
    net = Lambda(lambda m, x: m.f(m.e(x).sin()), e=nn.EmbeddingBag(5, 4, mode="max"))
    net.f = nn.Linear(4, 3)
    net, loss, data = problem_of(net, torch.randint(5, (6, 3)))
    risk = vl.EmpiricalRisk(net, loss, data, memory=memory)
    V = vl.GGNFactor(risk)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram = (V.T @ V).to_dense()
    assert chunks and all((few == 1) == (memory == 1) for few in chunks)
    columns = truth(risk, net, loss, data)[0].T @ V.output.to_dense()
    assert close(gram, columns.T @ columns)


def test_memory_of_a_large_table() -> None:
    # Neither the check of the structure nor a Gram matrix forms columns or one-hot
    # inputs, which have the length of the table for each sample or position.
    V, E, N, T = 20_000, 4, 8, 5
    net = Lambda(lambda m, x: m.f(m.e(x).sin().mean(1)), e=nn.Embedding(V, E))
    net.f = nn.Linear(E, 3)
    X = torch.randint(V, (N, T))
    X[:, 0], X[:, 1] = 7, X[:, 2]
    net, loss, data = problem_of(net, X)
    risk = vl.EmpiricalRisk(net, loss, data)
    root = vl.GGNFactor(risk).to_dense()
    risk = vl.EmpiricalRisk(net, loss, data)
    with Largest() as largest:
        G = vl.GGN(risk)
        assert next(c.use for c in G.factor.explain()) == "embedding"
        evals = G.eigvalsh()
        diagonal, trace = G.diagonal(), G.trace()
        product = G.factor @ (G.factor.T @ diagonal)
    assert largest.entries <= 1.1 * risk.num_params
    assert close(evals, torch.linalg.svdvals(root).square().flip(0))
    assert close(diagonal, root.square().sum(1))
    assert close(trace, root.square().sum())
    assert close(product, root @ (root.T @ diagonal))
    samples = vl.PerSampleGradients(risk)
    assert close((samples.T @ samples).to_dense(), samples.T @ samples.to_dense())
    assert close((samples.T @ G.factor).to_dense(), samples.T @ G.factor.to_dense())
