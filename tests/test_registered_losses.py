"""Losses that are registered from outside: right, or named as wrong."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl


class SquaredNorm(nn.Module):
    """Σ_n √(1 + ‖f_n − y_n‖²) − 1: couples the outputs of a sample."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return self.scale * ((1 + (f - y).square().sum(1)).sqrt() - 1).mean()


class Bare(vl.losses.OutputLoss):
    """With nothing but a total."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * ((1 + (output - target).square().sum(1)).sqrt() - 1).sum()


class Closed(Bare):
    """With everything in closed form."""

    def root_of(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        r = (output - target).unsqueeze(-1)
        return r, (1 + r.square().sum(1, keepdim=True)).sqrt()

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        r, s = self.root_of(output, target)
        return self.scale * r / s

    def hessian_product(self, output: Tensor, target: Tensor, X: Tensor) -> Tensor:
        r, s = (t.unsqueeze(-1) for t in self.root_of(output, target))
        return self.scale * (X / s - r * (r * X).sum(1, keepdim=True) / s**3)

    def hessian_diagonal(self, output: Tensor, target: Tensor) -> Tensor:
        r, s = self.root_of(output, target)
        return self.scale * (1 / s - r**2 / s**3)

    def sqrt(self, output: Tensor, target: Tensor) -> Tensor:
        r, s = self.root_of(output, target)  # (I − r rᵀ/s²)/s, by Sherman–Morrison
        eye = torch.eye(output.shape[1], dtype=output.dtype).unsqueeze(-1)
        r, s = r.unsqueeze(2), s.unsqueeze(2)
        root = eye - r * r.movedim(1, 2) / (s * (s + 1))
        return self.scale.sqrt() * root / s.sqrt()


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = torch.randn(7, 3).double(), torch.randn(7, 3).double()
    return net, [(X[:4], y[:4]), (X[4:], y[4:])]


def registered(
    made: type[Bare], **methods: Any
) -> tuple[nn.Module, SquaredNorm, list[tuple[Tensor, Tensor]]]:
    kind = type(made.__name__, (made,), methods)
    vl.losses.register(SquaredNorm)(lambda loss: kind(loss.scale))
    net, data = problem()
    return net, SquaredNorm(), data


@pytest.mark.parametrize("made", [Bare, Closed])
def test_a_registered_loss_is_what_autograd_says(made: type[Bare]) -> None:
    net, loss, data = registered(made)
    risk = vl.EmpiricalRisk(net, loss, data)
    assert isinstance(risk.loss, made)

    def function(f: Tensor, y: Tensor) -> Tensor:
        return loss(f, y)

    plain = vl.EmpiricalRisk(net, function, data, reduction="mean")
    assert not isinstance(plain.loss, made)
    torch.testing.assert_close(risk.value(), plain.value())
    torch.testing.assert_close(risk.gradient(), plain.gradient())
    for operator in (vl.GGN, vl.Hessian, vl.LossHessian, vl.PerSampleGradients):
        found, expected = operator(risk).to_dense(), operator(plain).to_dense()
        torch.testing.assert_close(found, expected)
    H = vl.LossHessian(risk)
    torch.testing.assert_close(H.diagonal(), vl.LossHessian(plain).diagonal())
    S = H.sqrt().to_dense()
    torch.testing.assert_close(S @ S.T, H.to_dense())
    V = vl.GGNFactor(risk).to_dense()
    torch.testing.assert_close(V @ V.T, vl.GGN(plain).to_dense())
    with pytest.raises(ValueError, match="SquaredNorm has no likelihood"):
        vl.GGN(risk, mc_samples=1).trace()


def test_a_registered_loss_is_of_the_risk() -> None:
    """The user's tensors may change; the risk is copied and travels."""
    net, loss, data = registered(Closed)
    risk = vl.EmpiricalRisk(net, loss, data)
    before = vl.GGN(risk).to_dense()
    loss.scale.mul_(3.0)
    torch.testing.assert_close(vl.GGN(risk).to_dense(), before)
    torch.testing.assert_close(vl.GGN(copy.deepcopy(risk)).to_dense(), before)


@pytest.mark.parametrize("wrong", ["shape", "NaN"])
def test_samples_of_another_form_are_refused(wrong: str) -> None:
    def sample(self: Any, output: Tensor, target: Tensor, M: int, draws: Any) -> Tensor:
        drawn = draws.normal(len(output), 3, M).to(output)
        return drawn if wrong == "shape" else drawn.unsqueeze(-1) / 0.0

    net, loss, data = registered(Bare, sample=sample)
    with pytest.raises(ValueError, match="sample of SquaredNorm must give gradients"):
        vl.GGN(net, loss, data, mc_samples=2)


def test_subclasses_are_not_taken_for_their_base() -> None:
    class Doubled(SquaredNorm):
        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return 2 * super().forward(f, y)

    class Shifted(nn.MSELoss):
        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return super().forward(f, y) ** 1 + f.square().mean()

    net, loss, data = registered(Closed)
    double = vl.GGN(net, Doubled(), data).to_dense()
    torch.testing.assert_close(double, 2 * vl.GGN(net, loss, data).to_dense())
    twice = vl.GGN(net, Shifted(), data[:1]).to_dense()
    plain = vl.GGN(net, nn.MSELoss(), data[:1]).to_dense()
    torch.testing.assert_close(twice, 2 * plain)


WRONG: dict[str, tuple[type[Bare], dict[str, Any]]] = {
    "total / weight": (Bare, {"total": lambda self, f, y: 2 * Bare.total(self, f, y)}),
    "gradient": (
        Closed,
        {"gradient": lambda self, f, y: 1.001 * Closed.gradient(self, f, y)},
    ),
    "hessian_product": (
        Closed,
        {"hessian_product": lambda self, f, y, X: X / self.root_of(f, y)[1][..., None]},
    ),
    "hessian_diagonal": (
        Closed,
        {
            "hessian_diagonal": lambda self, f, y: (
                1 / self.root_of(f, y)[1] + 0 * f[..., None]
            )
        },
    ),
    "S Sᵀ x with S = sqrt": (
        Closed,
        {"sqrt": lambda self, f, y: 1.001 * Closed.sqrt(self, f, y)},
    ),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", WRONG)
def test_a_wrong_closed_form_is_named(method: str, weighted: bool) -> None:
    net, loss, data = registered(WRONG[method][0], **WRONG[method][1])
    if weighted:
        loss = vl.losses.Weighted(loss)
        data = [(X, (y, torch.ones_like(y[:, 0]))) for X, y in data]
    named = f"loss: {method} of (Weighted )?SquaredNorm is wrong"
    with pytest.raises(ValueError, match=named):
        vl.GGNFactor(net, loss, data).gram.to_dense()


def test_second_derivatives_of_a_loss_are_looked_at_once() -> None:
    calls: list[Tensor] = []

    def hessian_product(self: Any, f: Tensor, y: Tensor, X: Tensor) -> Tensor:
        calls.append(X)
        return Closed.hessian_product(self, f, y, X)

    risk = vl.EmpiricalRisk(*registered(Closed, hessian_product=hessian_product))
    vl.LossHessian(risk)
    assert calls
    calls.clear()
    for kind in (vl.LossHessian, vl.GGN, vl.Hessian):
        kind(risk)
    assert not calls
    vl.LossHessian(risk.subset([0, 1]))  # other outputs
    assert calls


SHAPES: dict[str, Any] = {
    "gradient": lambda self, f, y: f,
    "hessian_product": lambda self, f, y, X: X.squeeze(2),
    "sqrt": lambda self, f, y: Closed.sqrt(self, f, y)[:, :, :2],
}


@pytest.mark.parametrize("method", SHAPES)
def test_a_wrong_shape_is_named(method: str) -> None:
    net, loss, data = registered(Closed, **{method: SHAPES[method]})
    with pytest.raises(ValueError, match=f"loss: {method} of SquaredNorm has shape"):
        vl.GGNFactor(net, loss, data).gram.to_dense()


def test_a_mean_over_something_else_says_its_divisor() -> None:
    class Entries(SquaredNorm):
        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return super().forward(f, y) / 3

    class OutputEntries(Bare):
        def weight(self, output: Tensor, target: Tensor) -> Tensor:
            return output.new_tensor(output.numel())

    net, data = problem()
    vl.losses.register(Entries)(lambda loss: Bare(loss.scale))
    with pytest.raises(ValueError, match="total / weight of Entries is wrong"):
        vl.EmpiricalRisk(net, Entries(), data)
    vl.losses.register(Entries)(lambda loss: OutputEntries(loss.scale))
    found = vl.GGN(net, Entries(), data).to_dense()
    vl.losses.register(SquaredNorm)(lambda loss: Closed(loss.scale))
    torch.testing.assert_close(3 * found, vl.GGN(net, SquaredNorm(), data).to_dense())


def test_a_loss_without_roots_is_refused_only_where_one_is_asked_for() -> None:
    class Saddle(nn.Module):
        reduction = "sum"

        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return (f[:, 0] * f[:, 1]).sum()

    class OutputSaddle(vl.losses.OutputLoss):
        def total(self, output: Tensor, target: Tensor) -> Tensor:
            return (output[:, 0] * output[:, 1]).sum()

    net, data = problem()
    vl.losses.register(Saddle)(lambda loss: OutputSaddle())
    G = vl.GGN(net, Saddle(), data)
    plain = vl.GGN(vl.EmpiricalRisk(net, Saddle().forward, data, reduction="sum"))
    x = torch.linspace(-1, 1, G.shape[0]).double()
    torch.testing.assert_close(G @ x, plain @ x)
    with pytest.raises(ValueError, match="Saddle is not convex"):
        vl.GGNFactor(net, Saddle(), data).gram.to_dense()


def test_a_coupled_batch_is_refused() -> None:
    class Spread(nn.Module):
        reduction = "sum"

        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return (f - f.mean(0)).square().sum()

    class OutputSpread(vl.losses.OutputLoss):
        def total(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - output.mean(0)).square().sum()

    net, data = problem()
    vl.losses.register(Spread)(lambda loss: OutputSpread())
    with pytest.raises(ValueError, match=r"Spread .* is not the sum of losses"):
        vl.EmpiricalRisk(net, Spread(), data)


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match=r"kind: a subclass of torch\.nn\.Module"):
        vl.losses.register(nn.functional.mse_loss)  # type: ignore[arg-type]
    vl.losses.register(SquaredNorm)(lambda loss: loss)  # type: ignore[arg-type]
    net, data = problem()
    with pytest.raises(TypeError, match=r"must return a vl\.losses\.OutputLoss"):
        vl.EmpiricalRisk(net, SquaredNorm(), data)


def test_a_loss_with_parameters_of_the_model_is_refused() -> None:
    net, loss, data = registered(Closed)
    loss.scale = net[0].weight
    with pytest.raises(ValueError, match="uses parameters of the model"):
        vl.EmpiricalRisk(net, loss, data)


def test_a_registered_loss_is_pickled() -> None:
    vl.losses.register(SquaredNorm)(_closed)
    net, data = problem()
    G = vl.GGN(net, SquaredNorm(), data)
    torch.testing.assert_close(pickle.loads(pickle.dumps(G)).to_dense(), G.to_dense())


def _closed(loss: SquaredNorm) -> Closed:
    return Closed(loss.scale)
