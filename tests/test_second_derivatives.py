"""Which entries of the parameters are constants to torch, and which only look so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.utils.checkpoint import checkpoint

import vivit_linop as vl
from tests.cases import Lambda

CE = nn.CrossEntropyLoss()


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, dtype=dtype), torch.randint(3, (3,))


def exact(net: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """The Hessian in the order of the parameters, by forward over reverse mode."""
    own = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    names, leaves = zip(*own, strict=True)
    sizes = [p.numel() for p in leaves]

    def risk(theta: Tensor) -> Tensor:
        parts = zip(theta.split(sizes), leaves, strict=True)
        params = dict(zip(names, (t.view_as(p) for t, p in parts), strict=True))
        return CE(functional_call(net, params, (X,)), y)

    theta = torch.cat([p.detach().flatten() for p in leaves])
    return torch.func.hessian(risk)(theta)  # type: ignore[no-any-return]


def hessians(net: nn.Module, X: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """All that rests on second derivatives, as matrices or their diagonals."""
    H = lambda: vl.Hessian(net, CE, (X, y))  # noqa: E731
    unit = torch.eye(H().shape[0], dtype=H().torch_dtype)
    return {
        "products": lambda: H() @ unit,
        "vectors": lambda: torch.stack([H() @ x for x in unit[:3]]),
        "diagonal": lambda: H().diagonal(),
        "sample_diagonals": lambda: H().sample_diagonals().mean(0),
    }


class Squared(torch.autograd.Function):
    """w², with a backward pass that is not differentiable."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.kept = w.detach()
        return w * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2.0 * ctx.kept * g


class SineCosine(Squared):
    """1 - cos w, likewise."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.kept = w.detach()
        return 1.0 - w.cos()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.kept.sin() * g


class Gated(nn.Module):
    """Some of a parameter starts at zero, where its gradient is zero too."""

    def __init__(self, gate: Callable[[Tensor], Tensor], zeros: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.gate = nn.Linear(3, 3), gate
        self.w = nn.Parameter(torch.tensor([0.0] * zeros + [0.7] * (3 - zeros)))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh() * (1.0 + self.gate(self.w))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("gate", "dtype"),
    [
        (Squared, torch.float64),
        (Squared, torch.float32),
        (SineCosine, torch.float64),
    ],
)
def test_a_gradient_of_zero_is_no_constant(gate: Any, dtype: torch.dtype) -> None:
    X, y = data(dtype)
    net = Gated(gate.apply, zeros=3).to(dtype)
    for of in hessians(net, X, y).values():
        with pytest.raises(ValueError, match=f"Function {gate.__name__}"):
            of()


@pytest.mark.parametrize(("gate", "zeros"), [(torch.square, 3), (torch.erf, 1)])
def test_zeros_of_operations_of_torch(gate: Any, zeros: int) -> None:
    net, (X, y) = Gated(gate, zeros).double(), data()
    wanted, found = exact(net, X, y), hessians(net, X, y)
    torch.testing.assert_close(found["products"](), wanted)
    torch.testing.assert_close(found["vectors"](), wanted[:3])
    torch.testing.assert_close(found["diagonal"](), wanted.diagonal())
    torch.testing.assert_close(found["sample_diagonals"](), wanted.diagonal())


class Sign(nn.Module):
    """What a norm leaves of one number, written with torch's operations."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v / v.square().sum().sqrt()

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w.norm().reshape(1, 1), w


def plain(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", Sign())
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
def test_a_norm_of_one_number(norm: Any, learnt: bool) -> None:
    """Its gradient is zero but for rounding; torch's slope of that is not."""

    def build(norm: Any) -> nn.Module:
        torch.manual_seed(0)
        layer = norm(nn.Linear(1, 1))
        for p in list(layer.parameters())[1:2]:
            p.requires_grad_(learnt)
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(1, 3)).double()

    X, y = data()
    net, same = build(norm), build(plain)
    wanted, found = exact(same, X[:, :1], y), hessians(net, X[:, :1], y)
    torch.testing.assert_close(wanted, wanted.T)
    for name, of in found.items():
        exactly = {"products": wanted, "vectors": wanted[:3]}
        torch.testing.assert_close(of(), exactly.get(name, wanted.diagonal()))


# Functions without second derivatives -------------------------------------------------


class Written(nn.Module):
    """A net whose forward pass is a function of it."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)
        self.n = parametrizations.weight_norm(nn.Linear(3, 4))
        self.p, self.g = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.rand(4, 1))
        self.hidden = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.hidden(self, x).tanh()[:, :4])  # type: ignore[no-any-return]


def normed(v: Tensor, g: Tensor) -> Tensor:
    return g * v / v.square().sum(1, keepdim=True).sqrt()


def distances(m: Any, x: Tensor) -> Tensor:
    return m.a(x)[:, None] - m.p


def tokens_of(x: Tensor) -> Tensor:
    return (7 * x).long().abs() % 5


def added(m: Any, x: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("nt,ntd->nd", weights, m.p[tokens_of(x)])


def bags(m: Any, x: Tensor, **options: Any) -> Tensor:
    tokens, starts = tokens_of(x).flatten(), 3 * torch.arange(len(x) + 1)
    last = options.get("include_last_offset", False)
    return F.embedding_bag(tokens, m.p, starts[: None if last else -1], **options)


def counted(x: Tensor, padding: int) -> Tensor:
    used = (tokens_of(x) != padding).double()
    return used / used.sum(1, keepdim=True).clamp(min=1.0)


# Each with the same written out.
PAIRS: dict[str, tuple[Callable[[Any, Tensor], Tensor], ...]] = {
    "hardsigmoid": (
        lambda m, x: F.hardsigmoid(2 * m.a(x)),
        lambda m, x: (2 * m.a(x) + 3).clamp(0, 6) / 6,
    ),
    "hardsigmoid in place": (
        lambda m, x: F.hardsigmoid(m.a(x).sin() * 4, inplace=True),
        lambda m, x: (m.a(x).sin() * 4 + 3).clamp(0, 6) / 6,
    ),
    "weight norm": (
        lambda m, x: F.linear(x, torch._weight_norm(m.a.weight, m.g, 0)),
        lambda m, x: F.linear(x, normed(m.a.weight, m.g)),
    ),
    "parametrised weight norm": (
        lambda m, x: m.n(x),
        lambda m, x: F.linear(
            x,
            normed(
                m.n.parametrizations.weight.original1,
                m.n.parametrizations.weight.original0,
            ),
            m.n.bias,
        ),
    ),
    "cdist": (
        lambda m, x: torch.cdist(m.a(x), m.p),
        lambda m, x: distances(m, x).square().sum(2).sqrt(),
    ),
    "cdist, p = 1": (
        lambda m, x: torch.cdist(m.a(x), m.p, p=1.0),
        lambda m, x: distances(m, x).abs().sum(2),
    ),
    "cdist of many": (
        lambda m, x: torch.cdist(m.a(x)[:, None], m.p, 3.0)[:, 0],
        lambda m, x: distances(m, x).abs().pow(3).sum(2).pow(1 / 3),
    ),
    "means of bags": (
        lambda m, x: bags(m, x),
        lambda m, x: added(m, x, torch.full_like(x, 1 / 3)),
    ),
    "sums of bags": (
        lambda m, x: bags(m, x, mode="sum", include_last_offset=True),
        lambda m, x: added(m, x, torch.ones_like(x)),
    ),
    "bags with padding": (
        lambda m, x: bags(m, x, padding_idx=-4),
        lambda m, x: added(m, x, counted(x, 1)),
    ),
    "bags with weights": (
        lambda m, x: F.embedding_bag(
            tokens_of(x), m.p, mode="sum", per_sample_weights=(m.g[:3, 0] * x).exp()
        ),
        lambda m, x: added(m, x, (m.g[:3, 0] * x).exp()),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_functions_without_second_derivatives_are_written_in_others(kind: str) -> None:
    X, y = data()
    net, same = (Written(forward).double() for forward in PAIRS[kind])
    wanted = exact(same, X, y)
    assert wanted.any()
    for name, of in hessians(net, X, y).items():
        exactly = {"products": wanted, "vectors": wanted[:3]}
        torch.testing.assert_close(of(), exactly.get(name, wanted.diagonal()))
    batches = [(X[:2], y[:2]), (X[2:], y[2:])]
    torch.testing.assert_close(vl.Hessian(net, CE, batches).to_dense(), wanted)


class AllButEqual(nn.Module):
    """Outputs whose terms of about 1 cancel but for a small part of each."""

    def __init__(self, small: float, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(3, 1), nn.Linear(3, 3)
        self.small, self.square = small, square

    def forward(self, x: Tensor) -> Tensor:
        own = F.linear(x, self.square(self.own.weight), self.own.bias).tanh()
        # In another order for each output: the sums are rounded apart.
        return (self.shared(x).tanh() + self.small * own).log_softmax(1)


@pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("seed", range(2))
def test_slopes_that_all_but_cancel(small: float, seed: int) -> None:
    """The noise of differences is that of the terms, not of what they leave."""
    X, y = data()
    torch.manual_seed(seed)
    net = AllButEqual(small, torch.square).double()
    expected = exact(net, X, y)
    for name, found in hessians(net, X, y).items():
        truth = {"vectors": expected[:3], "products": expected}.get(name)
        truth = expected.diagonal() if truth is None else truth
        assert (found() - truth).norm() <= 1e-13 + 1e-9 * truth.norm()


@pytest.mark.parametrize("small", [1e-3, 1e-5])
@pytest.mark.parametrize("seed", range(4))
def test_wrong_slopes_that_all_but_cancel(small: float, seed: int) -> None:
    X, y = data()
    torch.manual_seed(seed)
    net = AllButEqual(small, Squared.apply).double()
    for found in hessians(net, X, y).values():
        with pytest.raises(ValueError, match="second derivatives by torch are wrong"):
            found()


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()


def recurrent() -> nn.Module:
    return Lambda(lambda m, x: m.r(x)[1][0], r=nn.GRU(2, 2, batch_first=True)).double()


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (pooled, [(1, 4, 4), (1, 5, 3)]),
        (recurrent, [(3, 2), (4, 2)]),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double(), [(2,), (2,)]),
    ],
)
def test_diagonals_of_batches_of_several_shapes(
    build: Any, shapes: list[tuple[int, ...]]
) -> None:
    """BackPACK takes one batch, which some cannot be put into."""
    torch.manual_seed(0)
    net, loss = build(), nn.MSELoss()
    data = [(torch.rand(3, *s).double(), torch.rand(3, 2).double()) for s in shapes]
    params = list(net.parameters())
    value = sum(loss(net(X), y) for X, y in data) / 2
    slopes = torch.autograd.grad(value, params, create_graph=True)
    flat = torch.cat([slope.reshape(-1) for slope in slopes])
    rows = [
        torch.autograd.grad(s, params, retain_graph=True, materialize_grads=True)
        for s in flat
    ]
    H = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    risk = vl.EmpiricalRisk(net, loss, data)
    torch.testing.assert_close(vl.Hessian(risk).diagonal(), H.diagonal())
    if shapes[0] != shapes[1]:
        with pytest.raises(ValueError, match="BackPACK"):
            vl.KFRA(risk)


def tied(m: Any, x: Tensor) -> Tensor:
    m.b.weight = m.a.weight
    out: Tensor = m.c(m.b(m.a(x).tanh()).tanh())
    return out


def registered(m: Any, x: Tensor) -> Tensor:
    m.register_parameter("own", m.a.weight)
    out: Tensor = m.c((m.a(x) @ m.own).tanh())
    return out


def asked(m: Any, x: Tensor) -> Tensor:
    assert isinstance(m.a.weight, nn.Parameter)
    out: Tensor = m.c(m.a(x).tanh())
    return out


@pytest.mark.parametrize("forward", [tied, registered, asked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nets_that_ask_whether_tensors_are_parameters(
    forward: Any, dtype: torch.dtype
) -> None:
    """Those at which derivatives are compared are some, too."""
    torch.manual_seed(0)
    net = Lambda(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 3))
    X, y = data()
    net.double()(X)
    params = list(net.parameters())
    slopes = torch.autograd.grad(
        CE(net(X), y), params, create_graph=True, materialize_grads=True
    )
    rows = [
        torch.autograd.grad(
            s + 0.0 * params[0].sum(), params, retain_graph=True, materialize_grads=True
        )
        for slope in slopes
        for s in slope.reshape(-1)
    ]
    H = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    net.to(dtype)
    risk = vl.EmpiricalRisk(net, CE, (X.to(dtype), y))
    found = vl.Hessian(risk) @ torch.eye(risk.num_params, dtype=dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    assert (found.double() - H).norm() <= tolerance * H.norm()


class Tokens(nn.Module):
    """Tokens, the table of which is used once more, where no row is a constant."""

    def __init__(self, use: str, written: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.end = nn.Embedding(4, 3, padding_idx=0), nn.Linear(9, 3)
        nn.init.normal_(self.table.weight)
        self.use, self.written = use, written

    def embedded(self, x: Tensor) -> Tensor:
        table = self.table.weight
        if self.written:
            return torch.where((x == 0)[..., None], table[x].detach(), table[x])
        return self.table(x) if self.use == "head" else F.embedding(x, table, -4)

    def hidden(self, x: Tensor) -> Tensor:
        return self.end(self.embedded(x).flatten(1)).tanh()  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        table = self.table.weight
        if self.use == "checkpoint" and not self.written:
            h = checkpoint(self.hidden, x, use_reentrant=False)
        else:
            h = self.hidden(x)
        if self.use == "gate":
            return self.end(h.repeat(1, 3) * table[0].exp().repeat(3))
        return F.linear(h, table[:3])


@pytest.mark.parametrize("use", ["head", "gate", "checkpoint"])
def test_rows_for_padding_that_are_used_elsewhere(use: str) -> None:
    X, y = torch.tensor([[0, 1, 3], [2, 0, 0], [3, 3, 1]]), torch.tensor([0, 2, 1])
    wanted = exact(Tokens(use, written=True).double(), X, y)
    assert wanted[:3, :3].any()
    for name, of in hessians(Tokens(use).double(), X, y).items():
        exactly = {"products": wanted, "vectors": wanted[:3]}
        torch.testing.assert_close(of(), exactly.get(name, wanted.diagonal()))


def with_constants(m: Any, x: Tensor) -> Tensor:
    return m.a(x).tanh() * m.a(x).detach().exp()  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "kind", ["constants", "parametrised weight norm", "cdist", "means of bags"]
)
def test_what_checkpoints_recompute(kind: str, reentrant: bool) -> None:
    """It meets the same constants, and the same functions in the place of others."""
    X, y = data()
    forward, same = PAIRS.get(kind, (with_constants, with_constants))
    net = Written(lambda m, x: checkpoint(forward, m, x, use_reentrant=reentrant))
    wanted = exact(Written(same).double(), X, y)
    for name, of in hessians(net.double(), X, y).items():
        exactly = {"products": wanted, "vectors": wanted[:3]}
        torch.testing.assert_close(of(), exactly.get(name, wanted.diagonal()))
