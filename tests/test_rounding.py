"""Parameters whose derivatives are zero but for rounding have columns like all others.

Their columns are noise, made in one order or another, which says nothing about the net:
what is wrong is refused all the same.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.cases import Lambda, parameter
from tests.pairs import pairwise

N = 5


class OneFeature(nn.Module):
    """A norm of one feature leaves a sign."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm = nn.Bilinear(3, 3, 1), norm(1)
        self.last = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x, x + 1.0)))


def direction(model: nn.Module, x: Tensor) -> Tensor:
    """The length of a has no influence where a sign is all that is used."""
    h = F.normalize(x @ torch.outer(model.a, model.a.exp()), dim=1)
    return model.last(h * (1.0 + x.square()))


def cosine(model: nn.Module, x: Tensor) -> Tensor:
    """Neither has that of one number in a cosine."""
    h = (x @ model.a)[:, None]
    return model.last(x * F.cosine_similarity(h, x[:, :1] + 3.0, dim=1)[:, None])


def net(forward: Callable[..., Tensor]) -> nn.Module:
    return Lambda(forward, a=parameter(3), last=nn.Linear(3, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "RMSNorm": lambda: OneFeature(nn.RMSNorm),
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)),
        nn.RMSNorm(1),
        nn.Linear(1, 3),
    ),
    "spectral_norm": lambda: nn.Sequential(
        nn.Linear(3, 1),
        nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1)),
        nn.Linear(1, 3),
    ),
    "normalize": lambda: net(direction),
    "cosine": lambda: net(cosine),
}


@pytest.mark.parametrize(
    ("name", "n", "dtype"), pairwise(NETS, [1, N], [torch.float64, torch.float32])
)
def test_noise_is_no_wrong_column(name: str, n: int, dtype: torch.dtype) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        model = NETS[name]().to(dtype).eval()
        X, y = torch.randn(n, 3, dtype=dtype), torch.randn(n, 3, dtype=dtype)
        risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y))
        J = dense_jacobian(model, X)
        G = 2 / (3 * n) * J.T @ J
        tolerance = 1e4 * torch.finfo(dtype).eps * G.norm()
        V = vl.GGNFactor(risk).to_dense()
        assert (V @ V.T - G).norm() <= tolerance
        assert (vl.GGN(risk).diagonal() - G.diagonal()).norm() <= tolerance
        vl.GGNFactor(risk, mc_samples=1).to_dense()
        vl.KFAC(risk)


class Counts(torch.autograd.Function):
    """Its backward passes are not the same each time."""

    calls = 0

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        Counts.calls += 1
        return gradient * (1.0 + 1e-3 * (Counts.calls % 7))


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize(
    "mix", [lambda h: h - h.mean(0), lambda h: h + h.flip(0), Counts.apply]
)
def test_what_is_wrong_is_no_noise(
    mix: Callable[[Tensor], Tensor], size: float
) -> None:
    # The derivatives are small, but not by rounding.
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.norm(m.first(x, x + 1.0))
        return m.last(h + size * mix(m.side(x)))

    model = Lambda(
        forward,
        first=nn.Bilinear(3, 3, 1),
        norm=nn.RMSNorm(1),
        side=nn.Linear(3, 1),
        last=nn.Linear(1, 3),
    ).double()
    data = torch.randn(N, 3).double(), torch.randn(N, 3).double()
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), data, check=False)
    with pytest.raises(ValueError, match=r"^model: .*other derivatives in"):
        vl.PerSampleGradients(risk).to_dense()


def signs(m: nn.Module, x: Tensor) -> Tensor:
    """A shift and what is left of a norm, both of which a softmax leaves out."""
    return (m.norm(m.first(x)) + m.shift).squeeze(2).log_softmax(1)


def scales(m: nn.Module, x: Tensor) -> Tensor:
    """A positive factor of what is divided by its length."""
    h = m.first(x) * (m.shift.cosh() + 1.0)
    return (3.0 * h / h.norm(dim=2, keepdim=True)).squeeze(2).log_softmax(1)


def cubes(m: nn.Module, x: Tensor) -> Tensor:
    """A power of it."""
    h = F.normalize((m.first(x) + m.shift) ** 3, dim=2).squeeze(2)
    return h.cosh() * h.softmax(1)


CANCELLING = {"signs": signs, "scales": scales, "cubes": cubes}


def of_positions(forward: Callable[..., Tensor]) -> nn.Module:
    return Lambda(
        forward, first=nn.Linear(3, 1), norm=nn.RMSNorm(1), shift=parameter(1)
    )


def dense_jacobian(model: nn.Module, X: Tensor) -> Tensor:
    rows = [
        torch.autograd.grad(
            out, list(model.parameters()), retain_graph=True, materialize_grads=True
        )
        for out in model(X).flatten()
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CANCELLING)
def test_slopes_of_nothing_but_noise_do_not_disagree(
    name: str, dtype: torch.dtype
) -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        model = of_positions(CANCELLING[name]).to(dtype).eval()
        X, y = torch.randn(3, 2, 3, dtype=dtype), torch.randn(3, 2, dtype=dtype)
        J = vl.Jacobian(vl.EmpiricalRisk(model, nn.MSELoss(), (X, y)))
        x = torch.randn(J.shape[1], dtype=dtype)
        dense = dense_jacobian(model, X)
        # Lengths near zero make it large.
        noise = 10 * torch.finfo(dtype).eps ** 0.5
        assert (J @ x - dense @ x).norm() <= noise * x.norm()


class Halved(torch.autograd.Function):
    """The identity, whose second derivatives are off by a factor of two."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.detach() * 0.5 + gradient * 0.5


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("name", CANCELLING)
def test_a_small_wrong_slope_is_no_noise(name: str, size: float) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return CANCELLING[name](m, x) + size * Halved.apply(m.side(x).squeeze(2))

    model = of_positions(forward)
    model.side = nn.Linear(3, 1)
    X, y = torch.randn(3, 2, 3).double(), torch.randn(3, 2).double()
    J = vl.Jacobian(vl.EmpiricalRisk(model.double(), nn.MSELoss(), (X, y)))
    x = torch.randn(J.shape[1]).double()
    expected = dense_jacobian(model, X) @ x
    assert (J @ x - expected).norm() <= 1e-9 * expected.norm()
