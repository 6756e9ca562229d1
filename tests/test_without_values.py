"""Tensors on device "meta" have shapes alone: whatever is given one says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl

LOSS = nn.CrossEntropyLoss()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(5, 3), torch.randint(2, (5,))


def risk(model: nn.Module | None = None, loss: nn.Module = LOSS) -> vl.EmpiricalRisk:
    return vl.EmpiricalRisk(model or nn.Linear(3, 2), loss, data())


def empty(*shape: int) -> Tensor:
    return torch.ones(shape, device="meta")


def net_with_buffer() -> nn.Module:
    norm = nn.BatchNorm1d(3).eval()
    norm.running_mean = empty(3)
    return nn.Sequential(norm, nn.Linear(3, 2))


def frozen_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 2), nn.Linear(2, 2, device="meta").requires_grad_(False)
    )


def weighted() -> nn.Module:
    return nn.CrossEntropyLoss(weight=empty(2))


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (lambda: risk(frozen_net()), "model: '1.weight' is"),
        (lambda: risk(net_with_buffer()), "model: '0.running_mean' is"),
        (lambda: risk(loss=weighted()), "loss: a weight is"),
        (lambda: risk().on((empty(5, 3), data()[1])), "data: batch 0 is"),
        (lambda: risk().at(empty(8)), "parameters: a vector is"),
        (lambda: risk().at([empty(2, 3), empty(2)]), "parameters: that of 'weight' is"),
        (lambda: risk().subset(empty(2).long()), "indices: a tensor is"),
        (lambda: vl.GGN(risk()) @ empty(8), "x: a tensor is"),
        (lambda: vl.GGN(risk()).eigh(k=2, v0=empty(8)), "v0: a tensor is"),
        (lambda: vl.GGN(risk()).restrict(empty(2).long()), "index: a tensor is"),
        (lambda: vl.GGN(risk()).logdet(damping=empty(2)), "damping: a tensor is"),
        (lambda: empty() * vl.GGN(risk()), "scales or damps an operator is"),
        (lambda: vl.Laplace(risk(), empty(8)), "prior_precision: a tensor is"),
    ],
)
def test_the_argument_is_named(use: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as raised:
        use()
    assert "on device 'meta', without values" in str(raised.value)
    assert "Give one on 'cpu' or a GPU." in str(raised.value)


def test_no_costs_are_measured_of_it() -> None:
    with pytest.raises(ValueError, match="device: 'meta' computes nothing"):
        vl.calibrate("meta")
