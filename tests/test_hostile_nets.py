"""Nets that few would write: right by autograd of the user's own, or refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.cases import Lambda
from tests.comparing import jacobian

N, C = 7, 3
LOSS = nn.CrossEntropyLoss()


class WrongVmap(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> Any:
        return x.cos(), dims[0]


class WrongTangent(WrongVmap):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent

    vmap = None  # type: ignore[assignment]


class Child(nn.Module):
    """Its weight is its parent's."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, X: Tensor) -> Tensor:
        return F.linear(X, self.parent().w)  # type: ignore[union-attr]


def by_a_proxy() -> nn.Module:
    """Twice: torch takes a proxy of a module for a module, unless it is told not to."""
    net = Lambda(lambda m, X: m.c(m.child(X).tanh()), c=L(4, C), w=parameter(4, 5))
    net.child = Lambda(lambda m, X: F.linear(X, m.parents[0].w) + m.parent.w.sum())
    net.child.__dict__["parent"] = weakref.proxy(net)
    net.child.__dict__["parents"] = [weakref.proxy(net)]
    return net


def logging(net: Any, X: Tensor) -> Tensor:
    """Numbers that no output depends on."""
    net.seen = [(net.t * X.sum()).detach(), (X.mean() - net.s).detach()]
    return net.c((net.t * net.a(X) + net.s).atan())


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def stacked(net: Any, X: Tensor) -> Tensor:
    """Two members, vectorised by the user."""
    weights = torch.stack([net.a.weight, net.b.weight])
    return torch.func.vmap(F.linear, (None, 0))(X, weights).tanh().sum(0)


def written(net: Any, X: Tensor) -> Tensor:
    h, out = net.a(X), torch.zeros(len(X), 4, dtype=X.dtype)
    out[:, :2] = h[:, :2].sin()
    out[:, 2:] = h[:, 2:]
    out[:, 0] *= h[:, 3]
    return net.c(out)


def unique(net: Any, X: Tensor) -> Tensor:
    rows, places = X.round().unique(dim=0, return_inverse=True)
    return net.a(rows)[places]


def by_capacity(net: Any, X: Tensor) -> Tensor:
    """Each expert takes two samples of the batch, the first ones."""
    chosen = net.a(X).argmax(1)
    rank = (F.one_hot(chosen, 3).cumsum(0).gather(1, chosen[:, None]) - 1).squeeze(1)
    return net.b(X) * (rank < 2)[:, None]


def in_pairs(net: Any, X: Tensor) -> Tensor:
    h = net.a(X)
    return h + 0.1 * h.roll(1, 0) * (torch.arange(len(X)) % 2)[:, None]


def without_gradients(net: Any, X: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    h = net.a(X).tanh()
    torch.set_grad_enabled(True)
    return net.c(h + net.b(X))


def threaded(net: Any, X: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return net.c(pool.submit(lambda: net.a(X).tanh()).result())


def distances(net: Any, X: Tensor) -> Tensor:
    """Torch's own rule for batches of their derivatives is wrong."""
    h = net.a(X)
    return net.c(h + torch.cdist(h[None], net.w[None])[0].mean(1, keepdim=True))


def keeping(net: Any, X: Tensor) -> Tensor:
    h = net.a(X).tanh()
    if h.requires_grad:
        h.retain_grad()
    return net.c(h)


def parented() -> nn.Module:
    net = Lambda(lambda net, X: net.child(X), w=parameter(C, 5))
    net.child = Child(net)
    return net


L = nn.Linear
NETS: dict[str, Callable[[], nn.Module]] = {
    "vectorised inside": lambda: Lambda(
        lambda net, X: torch.func.vmap(lambda x: net.c(net.a(x).tanh()))(X),
        a=L(5, 4),
        c=L(4, C),
    ),
    "an ensemble": lambda: Lambda(stacked, a=L(5, C, False), b=L(5, C, False)),
    "derivatives inside": lambda: Lambda(
        lambda net, X: (
            torch.func.vmap(torch.func.jacrev(lambda x: net.a(x).tanh().sum()))(X)
            @ net.w
        ),
        a=L(5, 4),
        w=parameter(5, C),
    ),
    "overlapping slices": lambda: Lambda(
        lambda net, X: (
            F.linear(X, net.w[:C]) + F.linear(X, net.w[1 : C + 1]) * (X @ net.w[-C:].T)
        ),
        w=parameter(6, 5),
    ),
    "strides of its own": lambda: Lambda(
        lambda net, X: F.linear(X, torch.as_strided(net.w, (C, 5), (2, 1))),
        w=parameter(20),
    ),
    "windows of a vector": lambda: Lambda(
        lambda net, X: F.linear(X, net.w.unfold(0, 5, 2)[:C]), w=parameter(20)
    ),
    "weights from samples": lambda: Lambda(
        lambda net, X: net.c(
            F.conv1d(X[None], net.a(X)[:, None], groups=len(X)).squeeze(0)
        ),
        a=L(5, 3),
        c=L(3, C),
    ),
    "a wrong rule for vmap": lambda: Lambda(
        lambda net, X: net.c(WrongVmap.apply(net.a(X) * net.w.cumsum(0))),
        a=L(5, 4),
        c=L(4, C),
        w=parameter(4),
    ),
    "wrong tangents": lambda: Lambda(
        lambda net, X: net.c(WrongTangent.apply(net.a(X[:, None])).flatten(1)),
        a=nn.Conv1d(1, 2, 3),
        c=L(6, C),
    ),
    "written by parts": lambda: Lambda(written, a=L(5, 4), c=L(4, C)),
    "rows that are the same": lambda: Lambda(unique, a=L(5, C)),
    "gradients off and on": lambda: Lambda(
        without_gradients, a=L(5, 4), b=L(5, 4), c=L(4, C)
    ),
    "another thread": lambda: Lambda(threaded, a=L(5, 4), c=L(4, C)),
    "a weight of the parent's": parented,
    "through a proxy": by_a_proxy,
    "numbers that are logged": lambda: Lambda(
        logging, a=L(5, 4), c=L(4, C), t=parameter(), s=parameter()
    ),
    "distances": lambda: Lambda(distances, a=L(5, 4), c=L(4, C), w=parameter(4, 4)),
    "gradients of layers are kept": lambda: Lambda(keeping, a=L(5, 4), c=L(4, C)),
    "outputs that are a parameter": lambda: Lambda(
        lambda net, X: net.w.expand(len(X), C), w=parameter(C)
    ),
    "outputs that are inputs": lambda: Lambda(
        lambda net, X: X[:, :C].add_(net.w), w=parameter(C)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_what_autograd_says(name: str) -> None:
    net, X, y = NETS[name]().double(), torch.randn(N, 5).double(), torch.arange(N) % C
    output = net(X.clone())
    J = jacobian(output, net.parameters())
    p = output.detach().softmax(1)
    blocks = (p.diag_embed() - p[:, :, None] * p[:, None]) / N
    G = J.T @ torch.block_diag(*blocks) @ J
    slopes = (p - F.one_hot(y, C)) / N
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    x = torch.arange(risk.num_params).double().cos()
    of = vl.GGN(risk)
    for got, expected in [
        (risk.value(), LOSS(output, y).detach()),
        (risk.gradient(), slopes.reshape(-1) @ J),
        (vl.Jacobian(risk) @ x, J @ x),
        (vl.Jacobian(risk).T.to_dense(), J.T),
        (vl.Jacobian(risk.subset(range(N)).at()).T.to_dense(), J.T),
        (vl.GGN(risk) @ x[:, None].expand(-1, 3), (G @ x)[:, None].expand(-1, 3)),
        (of @ x, G @ x),
        (of.diagonal(), G.diagonal()),
        (vl.GGN(net, LOSS, (X, y)).diagonal(), G.diagonal()),
        (of.gram.to_dense().norm(), G.norm()),
        (vl.PerSampleGradients(risk).to_dense().mean(1), slopes.reshape(-1) @ J),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert risk.is_current()


@pytest.mark.parametrize("is_part", [False, True])
def test_diagonals_of_nets_with_proxies(is_part: bool) -> None:
    """Parts lead to each other without end where torch takes one for a part."""
    net, X, y = by_a_proxy().double(), torch.randn(N, 5).double(), torch.arange(N) % C
    if is_part:
        net.child.parent = weakref.proxy(net)
    params = dict(net.named_parameters())

    def value(*tensors: Tensor) -> Tensor:
        replaced = dict(zip(params, tensors, strict=True))
        h = F.linear(X, replaced["w"]) + replaced["w"].sum()
        return LOSS(F.linear(h.tanh(), replaced["c.weight"], replaced["c.bias"]), y)

    blocks: Any = torch.autograd.functional.hessian(value, tuple(params.values()))
    sizes = [p.numel() for p in params.values()]
    truth = [
        blocks[i][i].reshape(size, size).diagonal() for i, size in enumerate(sizes)
    ]
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    torch.testing.assert_close(vl.Hessian(risk).diagonal(), torch.cat(truth))
    with pytest.raises(ValueError, match="BackPACK cannot compute"):
        vl.Hessian(risk).diagonal(route="backpack")
    given: Any = weakref.proxy(net)
    torch.testing.assert_close(
        vl.GGN(given, LOSS, (X, y)).trace(), vl.GGN(risk).trace()
    )


@pytest.mark.parametrize("forward", [by_capacity, in_pairs])
def test_samples_that_depend_on_others(forward: Callable[..., Tensor]) -> None:
    net = Lambda(forward, a=L(5, C), b=L(5, C)).double()
    data = torch.randn(N, 5).double(), torch.arange(N) % C
    with pytest.raises(ValueError, match="depend on the other samples"):
        vl.EmpiricalRisk(net, LOSS, data)


def in_one_precision(h: Tensor) -> Tensor:
    return h @ torch.eye(C)


def by_a_table(h: Tensor) -> Tensor:
    return h @ torch.from_numpy(np.eye(C, dtype=np.float32))


def says_which(h: Tensor) -> Tensor:
    assert h.dtype is torch.float32
    return h


@pytest.mark.parametrize("only", [in_one_precision, by_a_table, says_which])
def test_mixing_behind_zeros_of_nets_without_float64(only: Any) -> None:
    """Outputs elsewhere differ in float32, and derivatives there decide."""
    torch.manual_seed(0)
    members = {"f": nn.Linear(4, C), "head": nn.Linear(C, C)}
    nn.init.zeros_(members["head"].weight)
    X, y = torch.rand(N, 4), torch.arange(N) % C

    def forward(m: Any, X: Tensor, middle: float) -> Tensor:
        h = m.f(X)
        out: Tensor = m.head(only(h - middle * h.mean(0)).tanh())
        return out

    mixing = Lambda(lambda m, X: forward(m, X, 1.0), **members)
    with pytest.raises(ValueError, match=r"where 'head.weight' is not zero"):
        vl.EmpiricalRisk(mixing, LOSS, (X, y))
    alone = Lambda(lambda m, X: forward(m, X, 0.0), **members)
    assert vl.EmpiricalRisk(alone, LOSS, (X, y)).gradient().any()


class Tanh(torch.autograd.Function):
    """Leaves its slope for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1.0 - x.tanh().square()
        return x.tanh()


class Overwritten(Tanh):
    """Its backward pass writes into what the forward pass has left for it."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.slope.mul_(g).clone()


class OverwrittenData(torch.autograd.Function):
    """Past the counter of versions, by which torch sees such things."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(1.0 - x.tanh().square())
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        slope.data.mul_(g)
        return slope


class Freed(Tanh):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        result = g * ctx.slope
        del ctx.slope
        return result


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("function", [Overwritten, OverwrittenData, Freed])
def test_graphs_that_one_backward_pass_uses_up(function: Any, last: bool) -> None:
    """Zeros and unit vectors, which change no result of their own, spoil the next."""

    def forward(m: Any, x: Tensor, tanh: Any = function.apply) -> Tensor:
        out: Tensor = tanh(m.b(m.a(x))) if last else m.b(tanh(m.a(x)))
        return out

    torch.manual_seed(0)
    net = Lambda(forward, a=L(5, 4), b=L(4, C)).double()
    X, y = torch.randn(N, 5).double(), torch.arange(N) % C
    plain = forward(net, X, torch.tanh)
    expected = torch.autograd.grad(LOSS(plain, y), list(net.parameters()))
    unit = torch.eye(N * C, dtype=torch.float64)[0]
    for first in (0.0 * unit, unit, torch.ones_like(unit)):
        risk = vl.EmpiricalRisk(net, LOSS, (X, y))
        J, U = vl.Jacobian(risk), vl.PerSampleGradients(risk)
        for _ in range(2):
            with pytest.raises(ValueError, match="second backward pass"):
                J.T @ first
            with pytest.raises(ValueError, match="second backward pass"):
                U @ first[:N]
            with pytest.raises(ValueError, match="second backward pass"):
                vl.GGN(risk) @ torch.ones(risk.num_params, dtype=torch.float64)
        torch.testing.assert_close(risk.gradient(), risk.flatten(expected))


class Writing(Tanh):
    """Its backward pass writes into the gradient that it is given."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g.mul_(ctx.slope)


def doubling(x: Tensor) -> Tensor:
    """The same by a hook."""
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda g: g.mul_(2.0))
    return y


@pytest.mark.parametrize("memory", [0, None])
@pytest.mark.parametrize(
    ("last", "slope"),
    [
        (Writing.apply, lambda z: 1.0 - z.tanh().square()),
        (doubling, lambda z: 2.0 * z.cos()),
    ],
)
def test_backward_passes_that_write_into_what_they_are_given(
    last: Any, slope: Any, memory: int | None
) -> None:
    """The user's vectors stay as they are, one or several."""
    net = Lambda(lambda m, x: last(m.a(x)), a=L(5, C)).double()
    X, y = torch.randn(N, 5).double(), torch.arange(N) % C
    J = vl.Jacobian(vl.EmpiricalRisk(net, LOSS, (X, y), memory=memory))
    at = slope(net.a(X).detach())
    for shape in ((N * C,), (N * C, 1), (N * C, 3)):
        U = torch.randn(shape, dtype=torch.float64)
        before = U.clone()
        signals = U.reshape(N, C, -1) * at[:, :, None]
        expected = torch.cat(
            [torch.einsum("nck,nd->cdk", signals, X).flatten(0, 1), signals.sum(0)]
        )
        for _ in range(2):
            torch.testing.assert_close(J.T @ U, expected.reshape(-1, *shape[1:]))
            assert torch.equal(U, before)
