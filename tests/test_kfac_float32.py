"""Damped inverses of KFAC and EKFAC in float32, at small δ, against float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl

EPS = torch.finfo(torch.float32).eps
SMALL = [1e-5, 1e-6, 1e-7, 1e-8, 1e-9]


def _mlp(scales: Tensor) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    return net, scales * torch.rand(9, 12)


def _convolutions() -> tuple[nn.Module, Tensor]:
    """With more positions than the rank of what they see."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.ConvTranspose2d(3, 2, 2), nn.Flatten()
    )
    return nn.Sequential(net, nn.Linear(32, 4)), torch.rand(6, 2, 4, 4)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: _mlp(torch.ones(12)),
    "inputs of many scales": lambda: _mlp(torch.logspace(0, -4, 12)),
    "convolutions": _convolutions,
}


def _approximation(name: str, kind: Any, dtype: torch.dtype, joint: bool) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net, X = NETS[name]()
        y = torch.randint(4, (len(X),))
    net = copy.deepcopy(net).to(dtype)
    data = X.to(dtype), y
    given = {"variant": "exact", "joint_bias": joint}
    return kind(net, nn.CrossEntropyLoss(), data, **given)


@pytest.mark.parametrize("joint_bias", [False, True])
@pytest.mark.parametrize("kind", [vl.KFAC, vl.EKFAC])
@pytest.mark.parametrize("name", NETS)
def test_positive_definite_or_refused(name: str, kind: Any, joint_bias: bool) -> None:
    K = _approximation(name, kind, torch.float32, joint_bias)
    truth = _approximation(name, kind, torch.float64, joint_bias).to_dense()
    evals, evecs = torch.linalg.eigh(truth)
    largest, D = evals.max().item(), len(truth)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(D, 40, generator=generator)
    # Among them vectors that the inverse hardly sees, and those that it sees most.
    vectors = torch.cat([noise, (truth @ noise.double()).float(), evecs.float()], dim=1)
    g = truth @ noise[:, 0].double()
    definite = 0
    for relative in SMALL:
        delta = relative * largest
        try:
            inverse = (K + delta * vl.Identity(D)).inv()
        except ValueError as error:
            assert relative <= 10 * EPS, "refused where digits are left"
            assert "damping" in str(error)
            continue
        definite += 1
        assert ((vectors * (inverse @ vectors)).sum(0) > 0).all()
        # What is formed has the rounding of its largest entries.
        formed = torch.linalg.eigvalsh((inverse @ torch.eye(D)).double())
        assert formed.min() >= -4 * EPS * formed.max()
        exact = torch.linalg.solve(truth + delta * torch.eye(D).double(), g)
        error = (inverse @ g.float()).double() - exact
        assert error.norm() <= EPS / relative * exact.norm()
        # Samples of the posterior exist, and have that covariance.
        root = (inverse.sqrt() @ torch.eye(D)).double()
        covariance = (inverse @ torch.eye(D)).double()
        assert (root @ root.T - covariance).norm() <= 1e-5 * covariance.norm()
    assert definite >= 3


@pytest.mark.parametrize("variant", ["mc", "exact", "empirical"])
def test_kronecker_factors_are_symmetric_to_the_bit(variant: str) -> None:
    """That they are is not looked at again: so their eigenpairs are of all of them."""
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 210)
    )
    X, y = torch.randn(7, 2, 5, 5), torch.randint(210, (7,))
    data = list(zip(X.split(3), y.split(3), strict=True))
    K = vl.KFAC(net, nn.CrossEntropyLoss(), data, variant=variant)
    for block in K.blocks:
        for factor in getattr(block, "factors", [block]):
            matrix = factor.to_dense()
            assert torch.equal(matrix, matrix.T)
