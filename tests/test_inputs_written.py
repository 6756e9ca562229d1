"""Nets that write into their input, losses into theirs; parameters without entries.

The user's data never change, nor does whether they require grad, and everything is that
of the same net on a copy.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.cases import Lambda, parameter
from tests.comparing import jacobian
from vivit_linop.net.certified import find_structure

N = 5


def adds(m: nn.Module, x: Tensor) -> Tensor:
    x += 1.0
    return m.a(x).tanh()


def rectifies(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x.relu_()).tanh() + m.a(x)


def assigns(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    x[:, 0] = x[:, 1] * 2.0
    x[mask] = 0.0
    return m.a(x).sin()


def unseen(m: nn.Module, x: Tensor) -> Tensor:
    x.data.mul_(2.0)
    return m.a(x).sin()


def now_and_then(m: nn.Module, x: Tensor) -> Tensor:
    x[x > 1.5] = 0.5
    return m.a(x).sin()


def of_parameters(m: nn.Module, x: Tensor) -> Tensor:
    x[:, 1] = x[:, 0].clone() * m.s
    return m.a(x).sin()


def differentiates(m: nn.Module, x: Tensor) -> Tensor:
    energy = m.a(x.requires_grad_()).sin().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return force[:, :2] + m.a(x)


NETS: list[Callable[..., Tensor]] = [
    adds,
    rectifies,
    assigns,
    unseen,
    now_and_then,
    of_parameters,
    differentiates,
]


def inputs(forward: Callable[..., Tensor], n: int) -> Any:
    X = torch.randn(n, 3, dtype=torch.float64)
    if forward is now_and_then:
        X = X.clamp(max=1.4)
        X[-1, 0] = 2.0
    if forward is assigns:
        return {"x": X, "mask": X > 1.0}
    return X


def cloned(X: Any) -> Any:
    return {k: v.clone() for k, v in X.items()} if isinstance(X, dict) else X.clone()


def pure(net: Any) -> Callable[..., Tensor]:
    def outputs(X: Any) -> Tensor:
        own = cloned(X)
        return net(**own) if isinstance(own, dict) else net(own)

    return outputs


def compare(
    model: Any, params: list[Tensor], outputs: Any, data: Any, given: Any = None
) -> None:
    """Compare with autograd on copies of the input."""
    batches = [data] if isinstance(data, tuple) else data
    before = [cloned(X) for X, _ in batches]
    f = torch.cat([outputs(X) for X, _ in batches])
    y = torch.cat([y for _, y in batches])
    total = (f - y).square().mean()
    slopes = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
    gradient = torch.cat([g.flatten() for g in slopes])
    H, J = jacobian(gradient, params), jacobian(f, params)
    G = 2 / f.numel() * J.T @ J

    risk = vl.EmpiricalRisk(model, nn.MSELoss(), data, given)
    close = {"rtol": 0.0, "atol": 1e-9}
    torch.testing.assert_close(risk.gradient(), gradient.detach(), **close)
    torch.testing.assert_close((vl.GGN(risk) @ torch.eye(len(G)).double()), G, **close)
    V = vl.GGNFactor(risk).to_dense()
    torch.testing.assert_close(V @ V.T, G, **close)
    torch.testing.assert_close(vl.GGN(risk).diagonal(), G.diagonal(), **close)
    U = vl.PerSampleGradients(risk).to_dense()
    torch.testing.assert_close(U.mean(1), gradient.detach(), **close)
    torch.testing.assert_close(vl.Hessian(risk).to_dense(), H, **close)
    torch.testing.assert_close(vl.Hessian(risk).diagonal(), H.diagonal(), **close)
    samples = vl.Hessian(risk).sample_diagonals().mean(0)
    torch.testing.assert_close(samples, H.diagonal(), **close)
    assert vl.KFAC(risk).shape == G.shape
    half = risk.subset([0, 2])
    assert half.num_samples == 2
    for (X, _), old in zip(batches, before, strict=True):
        for new, same in zip(
            X.values() if isinstance(X, dict) else [X],
            old.values() if isinstance(old, dict) else [old],
            strict=True,
        ):
            assert torch.equal(new, same)
            assert not new.requires_grad


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("forward", NETS)
def test_modules(forward: Callable[..., Tensor], cut: bool) -> None:
    net = Lambda(forward, a=nn.Linear(3, 2))
    if forward is of_parameters:
        net.s = parameter()
    net = net.double()
    sizes = [2, 3] if cut else [N]
    data: Any = [
        (inputs(forward, n), torch.randn(n, 2, dtype=torch.float64)) for n in sizes
    ]
    compare(net, list(net.parameters()), pure(net), data if cut else data[0])


def test_a_function() -> None:
    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        x.sub_(0.5)
        return (x @ params["w"]).tanh()

    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    X, y = torch.randn(N, 3).double(), torch.randn(N, 2).double()
    compare(model, [w], lambda X: model({"w": w}, X.clone()), (X, y), {"w": w})


def test_backpack() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4), nn.Tanh())
    net = nn.Sequential(*net, nn.Linear(4, 2)).double()
    X, y = torch.randn(N, 3).double(), torch.randn(N, 2).double()
    before = X.clone()
    other = nn.Sequential(nn.ReLU(), *net[1:])
    for kind in (
        lambda r: vl.Hessian(r).diagonal(),
        lambda r: vl.Hessian(r).sample_diagonals(),
        lambda r: vl.PositiveCurvatureHessian(r).to_dense(),
        lambda r: vl.PositiveCurvatureHessian(r, blocks="module").to_dense(),
        lambda r: vl.KFRA(r).to_dense(),
    ):
        found, expected = (
            kind(vl.EmpiricalRisk(model, nn.MSELoss(), (X.clone(), y)))
            for model in (net, other)
        )
        torch.testing.assert_close(found, expected)
        kind(vl.EmpiricalRisk(net, nn.MSELoss(), (X, y)))
        assert torch.equal(X, before)


# Losses -------------------------------------------------------------------------------


def one_based(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f.sub_(1.0), y.sub_(1))


def two_targets(f: Tensor, y: dict[str, Any]) -> Tensor:
    y["class"] -= 1
    y["scale"].exp_()
    return (y.pop("scale") * F.cross_entropy(f, y["class"], reduction="none")).mean()


def by_functions(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y.sub_(1), reduction="none")


def slopes(f: Tensor, y: Tensor) -> Tensor:
    return f.softmax(1).sub_(F.one_hot(y.sub_(1), 3))


class OneBased(nn.Module):
    reduction = "mean"
    forward = staticmethod(one_based)


@vl.losses.register(OneBased)
def pure_total(loss: OneBased) -> vl.losses.OutputLoss:
    class Total(vl.losses.OutputLoss):
        def total(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target - 1, reduction="sum")

    return Total()


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (one_based, {"reduction": "mean"}),
        (two_targets, {"reduction": "mean"}),
        (vl.Loss(by_functions, gradient=slopes), {}),
        (OneBased(), {}),
        (vl.losses.Weighted(one_based, "mean"), {}),
    ],
)
def test_losses(loss: Any, options: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    X, y = torch.randn(6, 3).double(), torch.arange(6) % 3 + 1
    scale = torch.zeros(6).double()
    target: Any = {"class": y, "scale": scale} if loss is two_targets else y
    if isinstance(loss, vl.losses.Weighted):
        target = y, scale + 1.0
    params, before = list(net.parameters()), y.clone()
    value = F.cross_entropy(net(X), y - 1)
    gradient = torch.autograd.grad(value, params, create_graph=True)
    H = jacobian(torch.cat([g.flatten() for g in gradient]), params)
    risk = vl.EmpiricalRisk(net, loss, (X, target), **options)
    for _ in range(2):
        torch.testing.assert_close(risk.value(), value)
        torch.testing.assert_close(vl.Hessian(risk).to_dense(), H)
    assert torch.equal(y, before)
    assert not scale.any()


# Parameters without entries -----------------------------------------------------------


def looks_nothing_up(m: nn.Module, x: Tensor) -> Tensor:
    h = m.table(torch.zeros(len(x), 0, dtype=torch.long)).sum(1)
    return m.a(h + x).tanh()


def of_no_features(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x).tanh() + m.out(m.norm(m.none(x)).sin())


def empty_weight(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x).tanh() * (1.0 + F.linear(x[:, :0].cos(), m.w.sin()))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (looks_nothing_up, {"table": lambda: nn.Embedding(0, 3)}),
        (
            of_no_features,
            {
                "none": lambda: nn.Linear(3, 0),
                "norm": lambda: nn.LayerNorm(0),
                "out": lambda: nn.Linear(0, 2),
            },
        ),
        (empty_weight, {"w": lambda: parameter(2, 0)}),
    ],
)
def test_parameters_without_entries(forward: Any, parts: Any, cut: bool) -> None:
    made = {name: make() for name, make in parts.items()}
    net = Lambda(forward, a=nn.Linear(3, 2), **made).double()
    data: Any = [
        (torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in (2, 3)
    ]
    X, y = (torch.cat(part) for part in zip(*data, strict=True))
    params = [p for p in net.parameters() if p.numel()]
    compare(net, params, net, data if cut else (X, y))


def test_columns_are_vectorised() -> None:
    net = Lambda(
        lambda m, x: m.a(x.add_(1.0) * m.w.cumsum(0)).tanh(), a=nn.Linear(3, 2)
    )
    net.w = parameter(3)
    data = torch.randn(N, 3).double(), torch.randn(N, 2).double()
    risk = vl.EmpiricalRisk(net.double(), nn.MSELoss(), data)
    assert "w" in find_structure(risk).opaque
    vl.PerSampleGradients(risk).to_dense()
    assert not find_structure(risk).singly
