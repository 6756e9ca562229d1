"""Models that cast by themselves run in the precision that the risk is given."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vivit_linop as vl

Cast = Callable[[Tensor], Tensor]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class RMSNorm(nn.Module):
    """That of Llama and T5: squares in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * noise(4))

    def forward(self, x: Tensor) -> Tensor:
        squares = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(squares + 1e-6)).to(x.dtype)


class Attention(nn.Module):
    """A softmax in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scores(x).softmax(-1, dtype=torch.float32).type_as(x)
        return x * F.softmax(weights, -1, dtype=torch.float32).to(x)


class Rotated(nn.Module):
    """Pairs as complex numbers of float32, turned by a frequency that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(noise(2))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (2, 2)))
        turn = torch.polar(self.frequency.float().exp(), self.frequency.float())
        return torch.view_as_real(pairs * turn).flatten(-2).type(x.dtype)


class Masked(nn.Module):
    """A constant in float32, and a cast to its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(noise(4))

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones(4, dtype=torch.float32, device=x.device)
        return (x + self.shift).to(ones).exp().to(x.dtype)


KINDS: dict[str, type[nn.Module]] = {
    "squares": RMSNorm,
    "softmax": Attention,
    "complex": Rotated,
    "constant": Masked,
}


def net(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(3, 4), KINDS[kind](), nn.Linear(4, 2)
    return nn.Sequential(*layers).to(dtype)


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return noise(5, 3).to(dtype), noise(5, 2, seed=1).to(dtype)


def dense(kind: str) -> tuple[Tensor, Tensor]:
    """The GGN and the Hessian of the same net, written in float64."""

    class Plain(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kwargs = dict(kwargs or {})
            kwargs.pop("dtype", None)
            if func in (Tensor.to, Tensor.type, Tensor.type_as, Tensor.float):
                return args[0]
            return func(*args, **kwargs)

    model, (X, y) = net(kind, torch.float64), data(torch.float64)
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def outputs(theta: Tensor) -> Tensor:
        parts = zip(params.items(), theta.split(sizes), strict=True)
        state = {name: part.reshape(p.shape) for (name, p), part in parts}
        with Plain():
            return torch.func.functional_call(model, state, X)

    theta = torch.cat([p.detach().reshape(-1) for p in params.values()])
    J = torch.autograd.functional.jacobian(outputs, theta).reshape(10, -1)
    hessian = torch.autograd.functional.hessian(
        lambda t: F.mse_loss(outputs(t), y), theta
    )
    return J.T @ J * 2 / 10, hessian


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_in_float32(kind: str) -> None:
    """Differences in float64 are those of a net that is in float64 throughout."""
    risk = vl.EmpiricalRisk(net(kind), nn.MSELoss(), data(torch.float32))
    _, hessian = dense(kind)
    x = noise(risk.num_params)
    error = vl.Hessian(risk) @ x - (hessian @ x.double()).float()
    assert error.norm() <= 1e-5 * hessian.norm() * x.norm()


@pytest.mark.parametrize("of", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_throughout(kind: str, of: torch.dtype) -> None:
    model = net(kind, of)
    before = copy.deepcopy(model.state_dict())
    X, y = data(of)
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y), dtype=torch.float64)
    ggn, hessian = dense(kind)
    G, size = vl.GGN(risk), ggn.norm()
    # The spectrum takes columns; those of the Hessian certify themselves.
    assert (G.eigvalsh()[-3:] - torch.linalg.eigvalsh(ggn)[-3:]).norm() < 1e-12 * size
    assert (G.to_dense() - ggn).norm() < 1e-12 * size
    assert (vl.Hessian(risk).to_dense() - hessian).norm() < 1e-12 * hessian.norm()
    for name, value in model.state_dict().items():
        assert value.dtype is of and torch.equal(value, before[name])


def test_half_precision_inside() -> None:
    """A cast to bfloat16 inside follows dtype=, too."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16().exp().half().to(torch.float32)

    X, y = data(torch.float32)
    model = nn.Sequential(nn.Linear(3, 2), Half())
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y), dtype=torch.float32)
    assert torch.allclose(risk.outputs[0], model[0](X).exp(), rtol=1e-6)


class Checkpointed(nn.Module):
    """A net that keeps nothing of what is between its ends."""

    def __init__(self, net: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["squares", "softmax", "complex"])
def test_what_checkpoints_recompute_is_cast_alike(kind: str, reentrant: bool) -> None:
    model, batch = Checkpointed(net(kind), reentrant), data(torch.float32)
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), batch, dtype=torch.float64)
    G, (ggn, hessian) = vl.GGN(risk), dense(kind)
    assert (G.to_dense() - ggn).norm() < 1e-12 * ggn.norm()
    assert (G.diagonal() - ggn.diagonal()).norm() < 1e-12 * ggn.norm()
    assert (vl.Hessian(risk).to_dense() - hessian).norm() < 1e-12 * hessian.norm()


def test_checkpoints_of_functions_are_cast_alike() -> None:
    def layer(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).to(torch.float32).exp().to(x.dtype)

    (X, y), w = data(torch.float32), noise(3, 2, seed=2)
    batch = X.bfloat16(), y.bfloat16()
    X, y, w = (t.bfloat16().double() for t in (X, y, w))

    def function(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return checkpoint(layer, p["w"], x, use_reentrant=False)  # type: ignore[no-any-return]

    params, double = {"w": w.bfloat16()}, torch.float64
    risk = vl.EmpiricalRisk(function, nn.MSELoss(), batch, params, dtype=double)
    H = torch.autograd.functional.hessian(lambda w: F.mse_loss((X @ w).exp(), y), w)
    torch.testing.assert_close(vl.Hessian(risk).to_dense(), H.reshape(6, 6))


class Autocast(nn.Module):
    """A net that enters autocast by itself."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.casts = net, lambda: torch.autocast("cpu", dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        with self.casts():
            return self.net(x).float()  # type: ignore[no-any-return]


@pytest.mark.host("autocast of the CPU")
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", ["plain", "checkpoint", "nested"])
def test_autocast_of_the_model_follows_dtype(inside: str, lower: torch.dtype) -> None:
    body = net("softmax")
    if inside == "checkpoint":
        body = Checkpointed(body, reentrant=False)
    if inside == "nested":
        body = Autocast(body, torch.bfloat16)
    model, batch = Autocast(body, lower), data(torch.float32)
    ggn, _ = dense("softmax")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        risk = vl.EmpiricalRisk(model, nn.MSELoss(), batch, dtype=dtype)
        G = vl.GGN(risk).to_dense()
        assert (G - ggn).norm() < tolerance * ggn.norm()


@pytest.mark.parametrize("kind", ["squares", "softmax"])
def test_without_dtype_the_error_says_it(kind: str) -> None:
    model, batch = net(kind, torch.float64), data(torch.float64)
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), batch)
    x = noise(risk.num_params).double()
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        _ = vl.Hessian(risk) @ x
