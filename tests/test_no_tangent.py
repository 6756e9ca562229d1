"""Nets with operations that torch differentiates once only: products run on columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.sparse.linalg import cg, eigsh, lsmr
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import vivit_linop as vl
from tests.cases import Lambda
from tests.comparing import close, jacobian
from tests.pairs import in_turn
from vivit_linop.net.linearized import linearizations

N, C = 6, 3
# Each has a tenth of the error of the one before.
ITERATIONS = 14


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class _Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.from_numpy(x.detach().numpy() ** 3)
        ctx.save_for_backward(x.detach())
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.numpy() ** 2 * g.detach().numpy())


def _equilibrium(hidden: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """z = hidden(z), with the implicit derivative by a backward hook."""
    with torch.no_grad():
        z = torch.zeros_like(like)
        for _ in range(ITERATIONS):
            z = hidden(z)
    z = hidden(z)
    start = z.clone().detach().requires_grad_()
    step = hidden(start)

    def implicit(gradient: Tensor) -> Tensor:
        g = gradient
        for _ in range(ITERATIONS):
            g = torch.autograd.grad(step, start, g, retain_graph=True)[0] + gradient
        return g

    if z.requires_grad:
        z.register_hook(implicit)
    return z


def _unrolled(hidden: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    z = torch.zeros_like(like)
    for _ in range(ITERATIONS):
        z = hidden(z)
    return z


def _deep_equilibrium(solve: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        given = m.first(x)
        return m.last(solve(lambda z: torch.tanh(0.1 * m.inner(z) + given), given))

    return forward


def _parts(first: nn.Module | None = None, **parts: nn.Module) -> dict[str, nn.Module]:
    first = first or nn.Linear(3, 4)
    return {"first": first, "last": nn.Linear(4, C), **parts}


def _cdist(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).square().sum(-1).sqrt()


class _Bag(nn.Module):
    """An embedding bag from operations that can be differentiated twice."""

    def __init__(self, weight: Tensor, mode: str) -> None:
        super().__init__()
        self.weight, self.mode = nn.Parameter(weight.clone()), mode

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.one_hot(x, len(self.weight)).to(self.weight) @ self.weight
        return rows.mean(1) if self.mode == "mean" else rows.sum(1)


def _bag(mode: str) -> tuple[nn.Module, nn.Module, Tensor]:
    bag = nn.EmbeddingBag(11, 4, mode=mode)
    forward = lambda m, x: m.last(torch.tanh(m.first(x)))  # noqa: E731
    net = Lambda(forward, **_parts(bag))
    plain = Lambda(forward, **_parts(_Bag(bag.weight.detach(), mode)))
    return net, plain, torch.randint(11, (N, 5))


def _pair(
    once: Callable[[Any, Tensor], Tensor],
    plain: Callable[[Any, Tensor], Tensor],
    **parts: nn.Module,
) -> tuple[nn.Module, nn.Module, Tensor]:
    made = _parts(**parts)
    return Lambda(once, **made), Lambda(plain, **made), torch.randn(N, 3).double()


def _inner(**keywords: Any) -> dict[str, nn.Module]:
    return {"inner": nn.Linear(4, 4, **keywords)}


def _net(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The net, an equal one from operations that torch differentiates twice, inputs."""
    if kind.startswith("bag"):
        return _bag(kind.partition(" ")[2])
    hidden = lambda m, x: torch.tanh(m.first(x))  # noqa: E731
    if kind == "once differentiable":
        return _pair(
            lambda m, x: m.last(_Once.apply(hidden(m, x), m.inner.weight).tanh()),
            lambda m, x: m.last((hidden(m, x) @ m.inner.weight.T).tanh()),
            **_inner(bias=False),
        )
    if kind == "once differentiable, last":
        return _pair(
            lambda m, x: _Once.apply(hidden(m, x), m.last.weight) + m.last.bias,
            lambda m, x: m.last(hidden(m, x)),
        )
    if kind == "through numpy":
        return _pair(
            lambda m, x: m.last(_Numpy.apply(m.first(x))),
            lambda m, x: m.last(m.first(x) ** 3),
        )
    if kind == "cdist":
        return _pair(
            lambda m, x: m.last(torch.exp(-torch.cdist(hidden(m, x), m.inner.weight))),
            lambda m, x: m.last(torch.exp(-_cdist(hidden(m, x), m.inner.weight))),
            **_inner(bias=False),
        )
    if kind == "hardsigmoid":
        # The slope of torch's own is 1/6 in float32.
        same = lambda m, x: m.last(nn.functional.hardsigmoid(m.first(x)))  # noqa: E731
        return _pair(same, same)
    assert kind == "deep equilibrium"
    return _pair(
        _deep_equilibrium(_equilibrium), _deep_equilibrium(_unrolled), **_inner()
    )


KINDS = [
    "bag mean",
    "bag sum",
    "once differentiable",
    "once differentiable, last",
    "through numpy",
    "cdist",
    "hardsigmoid",
    "deep equilibrium",
]


def _wavy(output: Tensor, target: Tensor) -> Tensor:
    """Not convex: without a root of its Hessian."""
    return (torch.sin(2 * output) * target).sum(1).mean()


class _Problem:
    def __init__(self, kind: str, loss: str = "ce", memory: int | None = None) -> None:
        torch.manual_seed(0)
        net, plain, X = _net(kind)
        net, plain = net.double(), plain.double()
        plain.load_state_dict({k.lower(): v for k, v in net.state_dict().items()})
        if loss == "ce":
            function: Any = nn.CrossEntropyLoss()
            y = torch.randint(C, (N,))
        else:
            function, y = _wavy, torch.randn(N, C).double()
        keywords = {} if loss == "ce" else {"reduction": "mean"}
        data = [(X[:4], y[:4]), (X[4:], y[4:])]
        self.risk = vl.EmpiricalRisk(net, function, data, memory=memory, **keywords)
        named = dict(plain.named_parameters())
        params = [named[name] for name, _ in net.named_parameters()]
        f = plain(X).reshape(-1)
        self.J = jacobian(f, params)
        f = f.detach()
        loss_of = lambda f: function(f.reshape(N, C), y)  # noqa: E731
        self.H = torch.autograd.functional.hessian(loss_of, f)
        self.G = self.J.T @ self.H @ self.J
        gradients = torch.func.grad(loss_of)(f).reshape(N, C) * N
        self.U = torch.einsum("ncd,nc->dn", self.J.view(N, C, -1), gradients)
        self.D = self.J.shape[1]
        self.X = torch.randn(self.D, 3).double()


@pytest.mark.parametrize(("kind", "memory"), in_turn(KINDS, [0, None]))
def test_products(kind: str, memory: int | None) -> None:
    """Also where nothing may be kept."""
    p = _Problem(kind, memory=memory)
    J, G, U = vl.Jacobian(p.risk), vl.GGN(p.risk), vl.PerSampleGradients(p.risk)
    V, F = vl.GGNFactor(p.risk), vl.EmpiricalFisher(p.risk)
    unit, rows = torch.eye(p.D).double(), torch.eye(N * C).double()
    for X in (p.X, p.X[:, 0]):
        assert close(J @ X, p.J @ X)
        assert close(G @ X, p.G @ X)
        assert close(U.T @ X, p.U.T @ X)
        assert close(F @ X, p.U @ (p.U.T @ X) / N)
        assert close(V @ (V.T @ X), p.G @ X)
        assert close((J.T @ vl.LossHessian(p.risk)).T @ X, p.H @ p.J @ X)
    assert close(J.T @ rows, p.J.T)
    assert close((J @ J.T) @ rows, p.J @ p.J.T)
    assert close(vl.GGN(p.risk) @ unit, p.G)


@pytest.mark.parametrize(
    ("kind", "memory"),
    [*((kind, None) for kind in KINDS), ("bag mean", 0), ("deep equilibrium", 0)],
)
def test_what_is_built_on_products(kind: str, memory: int | None) -> None:
    p = _Problem(kind, memory=memory)
    G, b, delta = vl.GGN(p.risk), p.X[:, 0], 0.3
    damped = p.G + delta * torch.eye(p.D).double()
    solution = torch.linalg.solve(damped, b)
    A = G + delta * vl.Identity(p.D)
    assert close(A.inv() @ b, solution)
    assert close(cg(A, b.numpy(), rtol=1e-12)[0], solution)
    evals = torch.linalg.eigvalsh(p.G)
    assert close(eigsh(vl.GGN(p.risk), k=2, which="LA")[0], evals[-2:])
    assert close(G.eigvalsh()[-4:], evals[-4:])
    pairs = vl.GGN(p.risk).eigh(k=2)
    assert close(pairs.eigenvalues, evals[-2:])
    assert close(p.G @ pairs.eigenvectors, pairs.eigenvalues * pairs.eigenvectors)
    V = vl.GGNFactor(p.risk)
    least = lsmr(V, b.numpy(), damp=delta**0.5, atol=1e-14, btol=1e-14)[0]
    assert close(V @ torch.from_numpy(least), p.G @ solution, 1e-8)


@pytest.mark.parametrize(("kind", "memory"), in_turn(KINDS, [None, 0]))
def test_loss_without_a_root(kind: str, memory: int | None) -> None:
    p = _Problem(kind, "wavy", memory)
    assert torch.linalg.eigvalsh(p.H)[0] < -0.01
    assert close(vl.GGN(p.risk) @ p.X, p.G @ p.X)
    assert close(vl.GGN(p.risk) @ p.X[:, 1], p.G @ p.X[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_sampled(kind: str) -> None:
    p = _Problem(kind)
    G = vl.GGN(p.risk, mc_samples=2, generator=torch.Generator().manual_seed(0))
    V = p.J.T @ G.factor.output.to_dense()
    assert close(G @ p.X, V @ (V.T @ p.X))
    assert close(G.factor.T @ p.X, V.T @ p.X)


def test_decided_once() -> None:
    """The columns are made once, for all operators of the risk."""
    p = _Problem("cdist")
    evaluations: list[int] = []
    vl.GGN(p.risk) @ p.X
    assert not p.risk.has_tangents
    model = p.risk.model

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, *arguments: Any) -> Tensor:
            evaluations.append(1)
            return model(*arguments)

    p.risk.model = Counting()  # type: ignore[assignment]
    vl.GGN(p.risk) @ p.X
    vl.GGNFactor(p.risk).T @ p.X
    assert not evaluations


def test_columns_that_do_not_fit_are_streamed() -> None:
    p = _Problem("once differentiable", memory=0)
    V = vl.GGNFactor(p.risk)
    for _ in range(2):
        assert close(V @ (V.T @ p.X), p.G @ p.X)
    assert V.stored is None


def test_streamed_batches_are_checked() -> None:
    """A second derivative that is silently zero must be seen there as well."""
    p = _Problem("once differentiable", memory=0)
    for linearization in linearizations(p.risk):
        with pytest.raises(ValueError, match="second derivative"):
            linearization.jvp(p.X)


@pytest.mark.parametrize("inner", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_inside_is_refused(inner: torch.dtype) -> None:
    """No column could stand in: also a backward pass is rounded."""
    net = Lambda(
        lambda m, x: m.last(torch.tanh(m.first(x)).to(inner).sin().double()),
        first=nn.Linear(3, 4),
        last=nn.Linear(4, C),
    ).double()
    data = torch.randn(N, 3).double(), torch.randint(C, (N,))
    J = vl.Jacobian(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data))
    for _ in range(2):
        with pytest.raises(ValueError, match="lower precision"):
            J @ torch.ones(J.shape[1]).double()


@pytest.mark.parametrize("seed", range(2))
def test_wrong_tangents_of_a_coarse_iteration_are_seen(seed: int) -> None:
    """In float32 one random number cannot tell them: they are right by a half."""
    torch.manual_seed(seed)

    def solve(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        for _ in range(200):
            last, z = z, f(z)
            if (z - last).norm() <= 1e-3 * z.norm():
                break
        return z

    def forward(m: Any, x: Tensor) -> Tensor:
        given = m.first(x)
        hidden = lambda z: torch.tanh(0.5 * m.inner(z) + given)  # noqa: E731
        with torch.no_grad():
            z = solve(hidden, torch.zeros_like(given))
        z = hidden(z)
        start = z.detach().clone().requires_grad_()
        step = hidden(start)

        def back(g: Tensor) -> Tensor:
            return torch.autograd.grad(step, start, g, retain_graph=True)[0]

        if z.requires_grad:
            z.register_hook(lambda g: solve(lambda y: back(y) + g, g))
        return m.last(z)

    net = Lambda(forward, **_parts(), **_inner())
    X, y = torch.randn(N, 3), torch.randint(C, (N,))
    exact = jacobian(net(X), net.parameters())
    J = vl.Jacobian(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y)))
    x = torch.randn(J.shape[1])
    try:
        found = J @ x
    except ValueError as error:
        assert "stops early" in str(error)
    else:
        assert close(found, exact @ x, 1e-3)
