"""Layers that give views of what they compute, into which the net then writes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import Lambda
from vivit_linop.net.certified import find_structure


def transposed_relu(m: nn.Module, x: Tensor) -> Tensor:
    """F.linear of one transposed sample gives a view."""
    h = m.first(x.transpose(0, 1)).relu_().transpose(0, 1)
    return m.last(h.flatten(1))


def transposed_product(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x.transpose(0, 1))
    h.mul_(h.detach() + 2.0)
    return m.last(h.transpose(0, 1).flatten(1))


def part_of_it(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x.transpose(0, 1))
    h[1:].tanh_()
    return m.last(h.transpose(0, 1).flatten(1))


FORWARDS = {
    "relu": transposed_relu,
    "product": transposed_product,
    "part": part_of_it,
}


def risk_of(forward: Callable[..., Tensor], sizes: list[int]) -> vl.EmpiricalRisk:
    torch.manual_seed(0)
    net = Lambda(forward, first=nn.Linear(4, 4), last=nn.Linear(12, 3)).double()
    X, y = torch.randn(3, 3, 4).double(), torch.randn(3, 3).double()
    batches = list(zip(X.split(sizes), y.split(sizes), strict=True))
    return vl.EmpiricalRisk(net, nn.MSELoss(reduction="sum"), batches, check=False)


@pytest.mark.parametrize("name", FORWARDS)
def test_columns_of_one_sample_keep_the_structure_of_their_layers(name: str) -> None:
    risk = risk_of(FORWARDS[name], [1, 1, 1])
    V = vl.GGNFactor(risk)
    dense = vl.Jacobian(risk).to_dense()
    H = vl.LossHessian(risk).to_dense()
    G = dense.T @ H @ dense
    assert (V @ V.T).to_dense().sub(G).norm() <= 1e-12 * G.norm()
    assert (V.to_dense() @ V.to_dense().T - G).norm() <= 1e-12 * G.norm()
    assert not find_structure(risk, alone=True).opaque


@pytest.mark.parametrize("name", FORWARDS)
def test_kfac_is_the_same_however_the_data_are_cut(name: str) -> None:
    whole = vl.KFAC(risk_of(FORWARDS[name], [3]), variant="exact").to_dense()
    for sizes in ([2, 1], [1, 2], [1, 1, 1]):
        found = vl.KFAC(risk_of(FORWARDS[name], sizes), variant="exact").to_dense()
        assert (found - whole).norm() <= 1e-12 * whole.norm()
