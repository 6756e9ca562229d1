"""Images come to nets in the order in memory that is the fastest, if they take it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import Lambda

pytestmark = pytest.mark.host("GPUs have orders of their own")

N, C = 9, 3
LOSS = nn.CrossEntropyLoss()


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, 2, 6, 6, dtype=dtype), torch.arange(N) % C


def net(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(1)
    return Lambda(
        forward, conv=nn.Conv2d(2, 4, 3), pool=nn.MaxPool2d(2), out=nn.Linear(16, C)
    )


def plain(m: Any, x: Tensor) -> Tensor:
    return m.out(m.pool(m.conv(x).relu()).flatten(1))


def viewing(m: Any, x: Tensor) -> Tensor:
    return m.out(m.pool(m.conv(x).relu()).view(len(x), 16))


def viewing_the_input(m: Any, x: Tensor) -> Tensor:
    return plain(m, x.view(len(x), -1).sin().view(x.shape))


def by_strides(m: Any, x: Tensor) -> Tensor:
    """Takes for granted how entries lie in memory."""
    return plain(m, torch.as_strided(x, x.shape, (72, 36, 6, 1)).cos())


def by_order(m: Any, x: Tensor) -> Tensor:
    return plain(m, x if x.is_contiguous() else 2 * x)


def viewing_some(m: Any, x: Tensor) -> Tensor:
    """Refuses some samples only."""
    if len(x) == 1:
        x = x.view(1, 72).view(x.shape)
    return plain(m, x)


def writing(m: Any, x: Tensor) -> Tensor:
    return plain(m, x.mul_(0.5))


FORWARDS = [
    *(plain, viewing, viewing_the_input, by_strides),
    *(by_order, viewing_some, writing),
]


# In one batch, and in batches of one sample and more; what refuses single samples also
# in batches without or only with them.
@pytest.mark.parametrize(
    ("forward", "sizes"),
    [
        *itertools.product(FORWARDS, [(N,), (1, 3, 5)]),
        *((viewing_some, sizes) for sizes in [(4, 5), (1,) * N]),
    ],
)
def test_what_autograd_says(forward: Any, sizes: tuple[int, ...]) -> None:
    """Whatever nets do with what comes in another order."""
    (X, y), model = images(), net(forward)
    params = list(model.parameters())
    losses = [LOSS(model(x[None].clone()), t[None]) for x, t in zip(X, y, strict=True)]
    rows = [torch.autograd.grad(loss, params) for loss in losses]
    U = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows], 1)
    before = X.clone()
    data = list(zip(X.split(sizes), y.split(sizes), strict=True))
    risk = vl.EmpiricalRisk(model, LOSS, data)
    of = vl.PerSampleGradients(risk)
    x = torch.linspace(-1, 1, risk.num_params)
    for got, expected in [
        (risk.value(), torch.stack(losses).mean().detach()),
        (risk.gradient(), U.mean(1)),
        (of.squared_norms(), U.square().sum(0)),
        (of.to_dense(), U),
        (of.variance(), U.var(1, unbiased=False)),
        (vl.EmpiricalFisher(risk) @ x, U @ (U.T @ x) / N),
        (vl.PerSampleGradients(risk.at()).squared_norms(), U.square().sum(0)),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(X, before) and X.is_contiguous()


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (6, 6)])
@pytest.mark.parametrize("by_strides", [False, True])
def test_images_of_several_shapes_come_as_they_are_given(
    sizes: tuple[int, int], by_strides: bool
) -> None:
    """An order is tried on those of one shape; of others a net may think otherwise."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if by_strides and x.shape[2] == 4:
            x = torch.as_strided(x, x.shape, (32, 16, 4, 1))
        return m.out(m.conv(x.sin()).tanh().mean((2, 3)).repeat(1, 4))

    model, y = net(forward), torch.arange(N) % C
    data = [
        (torch.randn(n, 2, k, k), y[:n]) for n, k in zip((N, 4), sizes, strict=True)
    ]
    params = list(model.parameters())
    rows = [
        torch.autograd.grad(LOSS(model(x[None].clone()), t[None]), params)
        for X, y in data
        for x, t in zip(X, y, strict=True)
    ]
    norms = torch.stack([sum(g.square().sum() for g in row) for row in rows])  # type: ignore[misc]
    risk = vl.EmpiricalRisk(model, LOSS, data)
    torch.testing.assert_close(vl.PerSampleGradients(risk).squared_norms(), norms)
    assert risk.model.channels_last == (sizes[0] == sizes[1])


def orders_seen(dtype: torch.dtype, **options: Any) -> set[bool]:
    seen = set()

    def forward(m: Any, x: Tensor) -> Tensor:
        seen.add(x.is_contiguous())
        return plain(m, x)

    risk = vl.EmpiricalRisk(net(forward).to(dtype), LOSS, images(dtype), **options)
    if options:
        vl.PerSampleGradients(risk).squared_norms()
    return seen


def test_nets_that_take_it_get_it_until_the_end() -> None:
    """Also after passes that vectorise what is done with a sample."""
    model = net(lambda m, x: plain(m, x) * m.scale.exp())
    model.scale = nn.Parameter(torch.zeros(()))
    risk = vl.EmpiricalRisk(model, LOSS, images())
    vl.GGN(risk).diagonal()
    vl.Hessian(risk).diagonal()
    assert risk.model.channels_last


def test_one_group_of_samples_is_checked_as_it_is_given() -> None:
    assert orders_seen(torch.float32) == {True, False}


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, {"check": False}), (torch.float64, {})]
)
def test_inputs_as_they_are_given(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Where nothing would show what the order does, and where it does not pay."""
    assert orders_seen(dtype, **options) == {True}


@pytest.mark.parametrize("forward", [plain, viewing])
def test_nets_that_mix_samples_are_refused(forward: Any) -> None:
    def mixing(m: Any, x: Tensor) -> Tensor:
        h = forward(m, x)
        return h - h.mean(0)

    with pytest.raises(ValueError, match="depend on the other samples"):
        vl.EmpiricalRisk(net(mixing), LOSS, images())


def test_errors_are_those_of_the_net() -> None:
    def failing(m: Any, x: Tensor) -> Tensor:
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        vl.EmpiricalRisk(net(failing), LOSS, images())
