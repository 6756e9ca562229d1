"""Columns are right however they were made, or refused.

Nets whose columns a shortcut gets wrong: rules of vmap, layouts that a few samples
show, batches of one size. The truth is plain autograd, row by row of the Jacobian of
the whole batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.utils import rnn

import vivit_linop as vl
from tests import comparing
from tests.cases import Lambda, call, parameter
from tests.comparing import jacobian
from tests.pairs import pairwise
from vivit_linop.modes import as_guest
from vivit_linop.net.capture import Capture
from vivit_linop.net.certificate import Certificate
from vivit_linop.net.certified import find_structure
from vivit_linop.net.columns.base import DenseColumns, LayerColumns, merged
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns

close = functools.partial(comparing.close, rtol=1e-9)

N = 6


def matrices(net: nn.Module, X: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """J, the per-sample gradients U and G of the mean cross-entropy or squares."""
    outputs = call(net, {}, X)
    J = jacobian(outputs, net.parameters())
    flat = outputs.detach().flatten().requires_grad_()
    if y.is_floating_point():
        losses = (flat.view_as(outputs) - y).square().flatten(1).mean(1)
    else:
        losses = F.cross_entropy(flat.view_as(outputs), y, reduction="none")
    slopes = [torch.autograd.grad(loss, flat, create_graph=True)[0] for loss in losses]
    H = torch.stack(
        [torch.autograd.grad(s, flat, retain_graph=True)[0] for s in sum(slopes)]
    )
    U = J.T @ torch.stack(slopes, 1).detach()
    return J, U, J.T @ H @ J / len(y)


def check(
    net: nn.Module, X: Any, y: Tensor, cut: Callable[..., Any] | None = None
) -> None:
    """Compare all that is made of columns."""
    net = net.double()
    J, U, G = matrices(net, X, y)
    loss = nn.MSELoss() if y.is_floating_point() else nn.CrossEntropyLoss()
    risk = vl.EmpiricalRisk(net, loss, cut(X, y) if cut else (X, y))
    V, samples = vl.GGNFactor(risk), vl.PerSampleGradients(risk)
    dense = V.to_dense()
    assert close(dense @ dense.T, G)
    assert close((V.T @ V).to_dense(), dense.T @ dense)
    assert close((samples.T @ V).to_dense(), U.T @ dense)
    assert close(samples.to_dense(), U) and close(
        samples.squared_norms(), U.square().sum(0)
    )
    assert close(vl.GGN(risk).diagonal(), G.diagonal())
    assert close(vl.EmpiricalFisher(risk).diagonal(), U.square().mean(1))
    NTK = vl.Jacobian(risk) @ vl.Jacobian(risk).T
    assert close(NTK.to_dense(), J @ J.T)
    blocks = vl.GGN(risk).block_diagonal("parameter").blocks
    sizes = [p.numel() for p in net.parameters()]
    for block, part in zip(blocks, torch.arange(len(G)).split(sizes), strict=True):
        assert (block.to_dense() - G[part][:, part]).norm() <= 1e-9 * G.norm()
    x = torch.randn(len(G), dtype=torch.float64)
    assert close(vl.GGN(risk) @ x, G @ x)


# Rules of vmap ------------------------------------------------------------------------


class WrongVmap(torch.autograd.Function):
    """A product whose rule for vmap forgets one sample's share."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor) -> Any:
        return (x * w) * torch.arange(len(x)).view(-1, 1, 1), 0


def _square(m: Any) -> Tensor:
    return m.a + 3 * torch.eye(3).to(m.a)


def _by_lu(m: Any, x: Tensor) -> Tensor:
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(_square(m)), x.T).T


VMAP: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "solve": lambda m, x: torch.linalg.solve(_square(m), x.T).T,
    "solve, each sample": lambda m, x: torch.linalg.solve(
        _square(m).expand(len(x), 3, 3), x.unsqueeze(2)
    ).squeeze(2),
    "lu_solve": _by_lu,
    "slogdet": lambda m, x: (
        x + torch.linalg.slogdet(_square(m) + torch.diag_embed(x))[1].unsqueeze(1)
    ),
    "inv": lambda m, x: x @ torch.linalg.inv(_square(m)),
    "cholesky": lambda m, x: (
        torch.cholesky_solve(x.T, torch.linalg.cholesky(_square(m) @ _square(m).mT)).T
    ),
    "cdist": lambda m, x: torch.cdist(x, m.a),
    "matrix_exp": lambda m, x: x @ torch.linalg.matrix_exp(m.a),
    "custom function": lambda m, x: WrongVmap.apply(x, m.a[0]),
    "prelu": lambda m, x: F.prelu(x, m.a[0, :1]),
    "prelu of channels": lambda m, x: F.prelu(x, m.a[0]),
}


@pytest.mark.parametrize("outputs", [1, 3, N])
@pytest.mark.parametrize("name", VMAP)
def test_what_vmap_gets_wrong(name: str, outputs: int) -> None:
    net = Lambda(
        lambda m, x: m.last(VMAP[name](m, m.first(x))),
        first=nn.Linear(4, 3),
        a=parameter(3, 3),
        last=nn.Linear(3, outputs),
    )
    X = torch.randn(N, 4).double()
    y = torch.randint(3, (N,)) if outputs == 3 else torch.randn(N, outputs).double()
    check(net, X, y)


def test_what_is_wrong_once_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Lambda(
        lambda m, x: m.last(F.prelu(m.first(x), m.a.exp())),
        first=nn.Linear(3, 3),
        a=parameter(1),
        last=nn.Linear(3, 1),
    ).double()
    data = torch.randn(N, 3).double(), torch.randn(N, 1).double()
    risk = vl.EmpiricalRisk(net, nn.MSELoss(), data)
    first = vl.PerSampleGradients(risk).to_dense()
    assert find_structure(risk).singly == {"a"}

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("vivit_linop.net.certified.vectorised", never)
    assert torch.equal(vl.PerSampleGradients(risk).to_dense(), first)


# Samples in another order -------------------------------------------------------------


def _sorts(m: Any, x: Tensor, key: Tensor) -> Tensor:
    order = torch.argsort(key, descending=True, stable=True)
    return m.o(torch.tanh(m.a(x[order])))[torch.argsort(order)]


def _sorts_by_values(m: Any, x: Tensor, key: Tensor) -> Tensor:
    _, order = (x[:, 0] * key).sort(stable=True)
    h = m.o(torch.tanh(m.a(x.gather(0, order.unsqueeze(1).expand_as(x)))))
    return torch.zeros_like(h).scatter(0, order.unsqueeze(1).expand_as(h), h)


def _swaps(m: Any, x: Tensor, key: Tensor) -> Tensor:
    """Pairs of samples with equal keys are exchanged."""
    others = torch.arange(len(x))
    for i in range(0, len(x) - 1, 2):
        if key[i] == key[i + 1]:
            others[i], others[i + 1] = i + 1, i
    return m.o(torch.tanh(m.a(x[others])))[others]


def _heads(m: Any, x: Tensor, key: Tensor) -> Tensor:
    z = torch.tanh(m.a(x))
    out = z.new_zeros(len(x), 3)
    for k, head in enumerate((m.o, m.p)):
        index = (key % 2 == k).nonzero().squeeze(1)
        out = out.index_add(0, index, head(z[index]))
    return out


def _routes(m: Any, x: Tensor, key: Tensor) -> Tensor:
    """Samples of large keys twice through a layer, those of small ones not at all."""
    many = key.repeat_interleave(key // 4)
    index = torch.arange(len(x)).repeat_interleave(key // 4)
    h = torch.tanh(m.a(x[index])) * many.unsqueeze(1)
    return m.o(torch.zeros(len(x), 4).to(x).index_add(0, index, h)) + x


def _packs(m: Any, x: Tensor, key: Tensor) -> Tensor:
    steps = torch.stack([x, x.sin(), x.cos()], 1)
    packed = rnn.pack_padded_sequence(
        steps, key.clamp(max=3).cpu(), batch_first=True, enforce_sorted=False
    )
    packed = packed._replace(data=m.o(torch.tanh(m.a(packed.data))))
    return rnn.pad_packed_sequence(packed, batch_first=True, total_length=3)[0].sum(1)


ORDERS = [_sorts, _sorts_by_values, _swaps, _heads, _routes, _packs]
# The first four are in place, or of one kind.
KEYS = [(9, 8, 7, 6, 3, 5, 9, 2), (4, 4, 4, 4, 1, 3, 2, 2)]


def _batches(*sizes: int) -> Callable[..., Any]:
    def cut(X: Any, y: Tensor) -> list[Any]:
        parts = [x.split(sizes) for x in X]
        return list(zip(zip(*parts, strict=True), y.split(sizes), strict=True))

    return cut


@pytest.mark.parametrize(
    ("forward", "sizes", "key"), pairwise(ORDERS, [None, (5, 3), (1, 7)], KEYS)
)
def test_samples_in_another_order(
    forward: Any, sizes: tuple[int, ...] | None, key: tuple[int, ...]
) -> None:
    layers = {"a": nn.Linear(3, 4), "o": nn.Linear(4, 3), "p": nn.Linear(4, 3)}
    if forward is not _heads:
        del layers["p"]
    net = Lambda(forward, **layers)
    X = torch.rand(8, 3).double() + 0.1, torch.tensor(key)
    check(net, X, torch.randint(3, (8,)), sizes and _batches(*sizes))


@pytest.mark.parametrize("forward", [_sorts, _packs, _heads])
def test_order_in_small_pieces(forward: Any) -> None:
    net = Lambda(
        forward, a=nn.Linear(3, 4), o=nn.Linear(4, 3), p=nn.Linear(4, 3)
    ).double()
    X, y = (torch.rand(8, 3).double(), torch.tensor(KEYS[0])), torch.randint(3, (8,))
    _, U, G = matrices(net, X, y)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y), memory=0)
    assert close(vl.PerSampleGradients(risk).to_dense(), U)
    assert close(vl.GGN(risk).eigvalsh()[-3:], torch.linalg.eigvalsh(G)[-3:])


# Batches of one size ------------------------------------------------------------------


def _state(m: Any, x: Tensor) -> Tensor:
    return m.o(m.r(x.unsqueeze(1).expand(-1, 3, -1), m.state)[0][:, -1])


FIXED: dict[str, Callable[[], nn.Module]] = {
    "a view": lambda: Lambda(
        lambda m, x: m.o(torch.tanh(m.a(x).view(N, 5))),
        a=nn.Linear(4, 5),
        o=nn.Linear(5, 3),
    ),
    "an initial state": lambda: Lambda(
        _state,
        r=nn.GRU(4, 5, batch_first=True),
        o=nn.Linear(5, 3),
        state=torch.zeros(1, N, 5).double(),
    ),
    "a product over the batch": lambda: Lambda(
        lambda m, x: m.o(torch.tanh(torch.eye(N).to(x) @ m.a(x))),
        a=nn.Linear(4, 5),
        o=nn.Linear(5, 3),
    ),
    "unbound": lambda: Lambda(
        lambda m, x: torch.stack([m.o(torch.tanh(m.a(x[i]))) for i in range(N)]),
        a=nn.Linear(4, 5),
        o=nn.Linear(5, 3),
    ),
    "an opaque weight": lambda: Lambda(
        lambda m, x: torch.einsum("ni,io->no", torch.tanh(m.a(x)).view(N, 5), m.w),
        a=nn.Linear(4, 5),
        w=parameter(5, 3),
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_batches_of_one_size(name: str) -> None:
    check(FIXED[name](), torch.randn(N, 4).double(), torch.randint(3, (N,)))


def test_an_exported_net() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = torch.randn(N, 4).double(), torch.randint(3, (N,))
    exported = torch.export.export(net, (X,)).module()
    _, U, G = matrices(net, X, y)
    risk = vl.EmpiricalRisk(exported, nn.CrossEntropyLoss(), (X, y), memory=0)
    assert close(vl.PerSampleGradients(risk).to_dense(), U)
    assert close(vl.GGN(risk).trace(), G.trace())


# Derivatives inside -------------------------------------------------------------------


def _slope(m: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = m.last(torch.tanh(m.first(x)))
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return slope + u


def _force(m: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    energy = F.softplus(m.first(x)).square().sum()
    return -torch.autograd.grad(energy, x, create_graph=True)[0] @ m.last.weight.T


@pytest.mark.parametrize("forward", [_slope, _force])
def test_derivatives_inside(forward: Any) -> None:
    net = Lambda(forward, first=nn.Linear(2, 4), last=nn.Linear(4, 2))
    if forward is _force:
        net.last = nn.Linear(2, 2, bias=False)
    check(net, torch.randn(N, 2).double(), torch.randn(N, 2).double())


# Embeddings ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_scale_gradients(kind: Any) -> None:
    # What torch scales by how often a row is looked up in a batch is no derivative.
    def net(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return Lambda(
            lambda m, x: m.o(torch.tanh(m.e(x)).reshape(len(x), -1, 3).mean(1)),
            e=kind(5, 3, **options),
            o=nn.Linear(3, 3),
        ).double()

    scaled = net(scale_grad_by_freq=True)
    X, y = torch.randint(2, (N, 4)), torch.randint(3, (N,))
    _, U, G = matrices(net(), X, y)
    risk = vl.EmpiricalRisk(scaled, nn.CrossEntropyLoss(), (X, y))
    x = torch.randn(len(G), dtype=torch.float64)
    assert close(vl.PerSampleGradients(risk).to_dense(), U)
    assert close(vl.GGN(risk) @ x, G @ x) and close(
        vl.GGN(risk).diagonal(), G.diagonal()
    )
    assert close(risk.gradient(), U.mean(1))
    assert scaled.e.scale_grad_by_freq


def test_a_call_that_scales_gradients() -> None:
    net = Lambda(
        lambda m, x: F.embedding(x, m.w, scale_grad_by_freq=True).sum(1),
        w=parameter(5, 3),
    )
    risk = vl.EmpiricalRisk(
        net, nn.CrossEntropyLoss(), (torch.randint(5, (N, 4)), torch.randint(3, (N,)))
    )
    with pytest.raises(ValueError, match=r"^model: .*scale_grad_by_freq"):
        vl.GGN(risk).diagonal()


@pytest.mark.parametrize("length", [N, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_of_one_feature(length: int, dtype: torch.dtype) -> None:
    # It is constant, and what its backward pass leaves is rounding times 1/√eps.
    net = Lambda(
        lambda m, x: m.o(m.n(m.a(x)).squeeze(2)),
        a=nn.Linear(1, 1),
        n=nn.LayerNorm(1),
        o=nn.Linear(length, 3),
    ).to(dtype)
    nn.init.normal_(net.n.bias)
    X, y = torch.randn(N, length, 1, dtype=dtype), torch.randint(3, (N,))
    _, U, G = matrices(net, X, y)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    tolerance = 100 * torch.finfo(dtype).eps ** 0.75
    assert close(vl.PerSampleGradients(risk).to_dense(), U, rtol=tolerance)
    assert close(vl.GGN(risk).diagonal(), G.diagonal(), rtol=tolerance)
    assert close(vl.GGN(risk).to_dense(), G, rtol=tolerance)


# Layers that share cotangents, or do not ----------------------------------------------


def test_columns_are_merged_by_what_they_share() -> None:
    # Inside of vmap a tensor has no address.
    def keys(b: Tensor) -> Tensor:
        parts = [KhatriRaoColumns(b.new_ones(2, 1, 3, 1), b + i) for i in (0, 1)]
        bias = KhatriRaoColumns(b.new_ones(2, 1, 1, 1), parts[0].cotangents)
        assert len({part.cotangents_key for part in (*parts, bias)}) == 3
        parts[0].share_cotangents(bias)
        assert len({part.cotangents_key for part in (*parts, bias)}) == 2
        assert len(merged([(part, part) for part in (*parts, bias)])) == 2
        return b

    vmap(keys)(torch.randn(4, 2, 2, 1, 3, 1))


def test_weight_and_bias_share_and_two_layers_do_not() -> None:
    net = Lambda(
        lambda m, x: m.a(x) + m.b(x.sin()), a=nn.Linear(3, 3), b=nn.Linear(3, 3)
    ).double()
    X, y = torch.randn(N, 3).double(), torch.randint(3, (N,))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    (variant,) = find_structure(risk).variants
    cotangents = torch.randn(N, 3, 2).double()
    with as_guest(risk.device):
        columns = Capture(risk, X, N).columns(cotangents, variant, set(risk.params))
    keys = {name: part.cotangents_key for name, part in columns.items()}
    assert keys["a.weight"] is keys["a.bias"] and keys["b.weight"] is keys["b.bias"]
    assert keys["a.weight"] is not keys["b.weight"]
    check(net, X, y)


# What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h.mean(0),
        lambda h: h + 0.1 * h.flip(0),
        lambda h: h * torch.softmax(h, 0),
    ],
)
def test_samples_that_are_mixed(mix: Callable[[Tensor], Tensor]) -> None:
    net = Lambda(lambda m, x: m.o(mix(m.a(x))), a=nn.Linear(3, 4), o=nn.Linear(4, 3))
    data = torch.randn(N, 3), torch.randint(3, (N,))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data, check=False)
    with pytest.raises(
        ValueError, match=r"^model: .*'a\.(bias|weight)'.*other samples"
    ):
        vl.PerSampleGradients(risk).to_dense()
    with pytest.raises(ValueError, match="other samples"):
        vl.GGN(risk).diagonal()


# One wrong column among many ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize(("n", "a", "b"), [(4000, 7, 3), (500, 30, 40)])
def test_one_wrong_column(
    n: int, a: int, b: int, dtype: torch.dtype, scale: float
) -> None:
    R = 5
    inputs, B = torch.randn(n, 1, a, 1, dtype=dtype), torch.randn(n, b, R, dtype=dtype)
    B[17] *= scale

    def error(made: LayerColumns) -> float:
        columns = {"w": made}
        certificate = Certificate(columns, B)
        truth = certificate.cotangent.T @ inputs.view(n, a)
        return certificate.errors({"w": truth})["w"]

    cotangents = B.mT.reshape(n, R, 1, b, 1)
    assert error(KhatriRaoColumns(inputs, cotangents)) < 0.1
    wrong = cotangents.clone()
    wrong[17, 2] *= 1.1
    assert error(KhatriRaoColumns(inputs, wrong)) > 1.0
    for first, second in [(17, 18), (0, n - 1), (100, 101)]:
        order = torch.arange(n)
        order[[first, second]] = order[[second, first]]
        rows = KhatriRaoColumns(inputs, cotangents).rows().view(n, R, -1)
        assert error(DenseColumns(rows)) < 0.1
        assert error(DenseColumns(rows[order])) > 1.0


# Sums of factors ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [vl.KFAC, vl.EKFAC])
@pytest.mark.parametrize("forward", [_sorts, _swaps, _sorts_by_values])
def test_factors_of_layers_that_a_batch_hides(forward: Any, kind: Any) -> None:
    # The order of the second batch shows that samples are not where they seemed.
    net = Lambda(forward, a=nn.Linear(3, 4), o=nn.Linear(4, 3)).double()
    X, y = (torch.rand(8, 3).double(), torch.tensor(KEYS[0])), torch.randint(3, (8,))
    expected = kind(
        net, nn.CrossEntropyLoss(), _batches(*[1] * 8)(X, y), variant="exact"
    )
    for sizes in [(4, 4), (2, 6), (8,)]:
        found = kind(
            net, nn.CrossEntropyLoss(), _batches(*sizes)(X, y), variant="exact"
        )
        assert close(found.to_dense(), expected.to_dense())
        assert {type(block) for block in found.blocks} == {
            type(block) for block in expected.blocks
        }
