"""Which parameters are the last layer's: those that outputs meet first, going back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import vivit_linop as vl

D64 = torch.float64
N, C = 9, 2


class Net(nn.Module):
    """A function of an input and of what it is made with."""

    def __init__(
        self,
        function: Callable[[Net, Tensor], Tensor],
        parts: dict[str, nn.Module | nn.Parameter],
    ) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=D64))


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh())


def pruned() -> nn.Module:
    layer = nn.Linear(4, C)
    prune.l1_unstructured(layer, "weight", amount=0.4)
    return layer


def low_rank(net: Net, x: Tensor) -> Tensor:
    h = net.body(x)
    return F.linear(h, net.W) + F.linear(F.linear(h, net.A), net.B)


def heads(net: Net, x: Tensor) -> Tensor:
    h = net.body(x)
    return torch.cat([net.one(h), net.other(h)], dim=1)


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a layer": (
        lambda: nn.Sequential(body(), nn.Linear(4, C)),
        ["1.weight", "1.bias"],
    ),
    "without bias, before a function": (
        lambda: nn.Sequential(
            nn.Linear(3, 4, bias=False),
            nn.Tanh(),
            nn.Linear(4, C, bias=False),
            nn.LogSoftmax(1),
        ),
        ["2.weight"],
    ),
    "a matrix and a bias": (
        lambda: Net(
            lambda net, x: net.body(x) @ net.W + net.b,
            {"body": body(), "W": matrix(4, C), "b": matrix(C)},
        ),
        ["W", "b"],
    ),
    "an einsum": (
        lambda: Net(
            lambda net, x: torch.einsum("ni,oi->no", net.body(x), net.W),
            {"body": body(), "W": matrix(C, 4)},
        ),
        ["W"],
    ),
    "two heads": (
        lambda: Net(
            heads, {"body": body(), "one": nn.Linear(4, 1), "other": nn.Linear(4, 1)}
        ),
        ["one.weight", "one.bias", "other.weight", "other.bias"],
    ),
    "a branch around the body": (
        lambda: Net(
            lambda net, x: net.head(net.body(x)) + net.around(x),
            {"body": body(), "head": nn.Linear(4, C), "around": nn.Linear(3, C)},
        ),
        ["head.weight", "head.bias", "around.weight", "around.bias"],
    ),
    "masked weights": (
        lambda: nn.Sequential(body(), pruned()),
        ["1.bias", "1.weight_orig"],
    ),
    "a low-rank change": (
        lambda: Net(
            low_rank,
            {"body": body(), "W": matrix(C, 4), "A": matrix(1, 4), "B": matrix(C, 1)},
        ),
        ["W", "B"],
    ),
    "a low-rank change of a frozen layer": (
        lambda: Net(
            low_rank,
            {
                "body": body(),
                "W": matrix(C, 4).requires_grad_(False),
                "A": matrix(1, 4),
                "B": matrix(C, 1),
            },
        ),
        ["B"],
    ),
    "a scaled input": (
        lambda: Net(
            lambda net, x: net.head(torch.relu(x * net.scale)),
            {"scale": matrix(3), "head": nn.Linear(3, C)},
        ),
        ["head.weight", "head.bias"],
    ),
    "a norm": (
        lambda: nn.Sequential(body(), nn.Linear(4, C), nn.LayerNorm(C)),
        ["2.weight", "2.bias"],
    ),
    "a recurrent layer": (
        lambda: Net(
            lambda net, x: net.rnn(x.unsqueeze(2))[0][:, -1],
            {"rnn": nn.GRU(1, C, batch_first=True)},
        ),
        ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"],
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_its_posterior_is_that_of_dense_matrices(name: str) -> None:
    build, expected = NETS[name]
    torch.manual_seed(0)
    net, X = build().double(), torch.randn(N, 3, dtype=D64)
    loss = nn.MSELoss(reduction="sum")
    y = torch.randn(N, C, dtype=D64)
    la = vl.Laplace(vl.EmpiricalRisk(net, loss, (X, y)), 0.5, "last_layer")
    assert set(la.risk.params) == set(expected)

    params = {n: p.detach() for n, p in net.named_parameters()}
    own = {n: params[n] for n in la.risk.params}

    def outputs(own: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, {**params, **own}, (X,))

    columns = [
        torch.autograd.functional.jacobian(lambda p, n=n: outputs({**own, n: p}), q)
        for n, q in own.items()
    ]
    J = torch.cat([column.flatten(2) for column in columns], dim=2)
    G = 2 * torch.einsum("ncd,nce->de", J, J)
    covariance = torch.linalg.inv(G + 0.5 * torch.eye(len(G), dtype=D64))
    torch.testing.assert_close(la.covariance.to_dense(), covariance)
    found = la.predictive(X)
    torch.testing.assert_close(found.covariance, J @ covariance @ J.mT)


@pytest.mark.parametrize(
    "last",
    [
        lambda: parametrizations.weight_norm(nn.Linear(4, C)),
        lambda: parametrizations.orthogonal(nn.Linear(4, C)),
        lambda: Net(
            lambda net, h: (net.keys(h).view(-1, C, 4) @ h.unsqueeze(2)).squeeze(2),
            {"keys": nn.Linear(4, 4 * C)},
        ),
    ],
)
def test_computed_weights_are_to_be_named(last: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(body(), last()).double()
    X, y = torch.randn(N, 3, dtype=D64), torch.randn(N, C, dtype=D64)
    risk = vl.EmpiricalRisk(net, nn.MSELoss(), (X, y))
    with pytest.raises(ValueError, match=r"structure: which layer .*risk.over\(names"):
        vl.Laplace(risk, structure="last_layer")
    names = [name for name in risk.params if name.startswith("1.")]
    assert vl.Laplace(risk.over(names)).predictive(X).mean.shape == (N, C)
