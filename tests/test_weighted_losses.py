"""Weights of samples, which travel with the targets."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.comparing import assert_near, inputs, jacobian
from vivit_linop.risk.losses.derived import losses_of_samples

N = 7
W = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 1.5], dtype=torch.float64)


def net(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)
    return nn.Sequential(*layers).double()


def welsch(f: Tensor, y: Tensor) -> Tensor:
    return (1 - (-((f - y) ** 2) / 2).exp()).sum()


def branching(f: Tensor, y: Tensor) -> Tensor:
    """torch cannot vectorise it."""
    pairs = zip(f, y, strict=True)
    parts = [(g - z).square().sum() * (2 if z[0] > 0 else 1) for g, z in pairs]
    return torch.stack(parts).sum()


CLASSES = torch.arange(N) % 3
# A loss, its targets, the mean's divisor of N samples, and whether there are labels.
KINDS: dict[str, tuple[Any, Tensor, float, bool]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), CLASSES, N, True),
    "with weights of classes": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1),
        CLASSES,
        float(torch.tensor([1.0, 2.0, 0.5])[CLASSES].sum()),
        True,
    ),
    "squares": (nn.MSELoss(), inputs(N, 3), 3 * N, True),
    "sum of squares": (nn.MSELoss(reduction="sum"), inputs(N, 3), 1.0, True),
    "counts": (
        nn.PoissonNLLLoss(),
        CLASSES[:, None].expand(N, 3).double(),
        3 * N,
        True,
    ),
    "Huber": (nn.HuberLoss(), inputs(N, 3), 3 * N, False),
    "by functions": (
        vl.Loss(lambda f, y: F.cross_entropy(f, y, reduction="none")),
        CLASSES,
        N,
        False,
    ),
    "not convex": (welsch, 3 * inputs(N, 3), 1.0, False),
    "branching": (branching, inputs(N, 3), 1.0, False),
}


def weighted(loss: Any) -> vl.losses.Weighted:
    named = isinstance(loss, nn.Module)
    return vl.losses.Weighted(loss) if named else vl.losses.Weighted(loss, "sum")


def value(loss: Any, divisor: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Σ w_n ℓ_n over the divisor, one sample at a time."""
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss)
        loss.reduction = "sum"
        if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None:
            loss.weight = loss.weight.double()

    def function(f: Tensor, y: Tensor, w: Tensor) -> Tensor:
        parts = [w[n] * loss(f[n : n + 1], y[n : n + 1]) for n in range(len(f))]
        return torch.stack(parts).sum() / divisor

    return function


@pytest.mark.parametrize("name", KINDS)
def test_weighted(name: str) -> None:
    loss, y, divisor, has_labels = KINDS[name]
    model, X = net(), inputs(N, 4)
    f, truth = model(X).detach(), value(loss, divisor)
    J = jacobian(model(X), model.parameters())
    H = torch.autograd.functional.hessian(lambda f: truth(f, y, W), f)
    H = H.reshape(f.numel(), f.numel())
    data = [(X[:4], (y[:4], W[:4])), (X[4:], (y[4:], W[4:]))]
    risk = vl.EmpiricalRisk(model, weighted(loss), data)
    assert_near(risk.value(), truth(f, y, W))
    assert_near(weighted(loss)(f, (y, W)), truth(f, y, W))  # to train with
    assert_near(vl.LossHessian(risk).to_dense(), H)
    assert_near(vl.LossHessian(risk).diagonal(), H.diagonal())
    G = vl.GGN(risk)
    assert_near(G.to_dense(), J.T @ H @ J)
    assert_near(G.diagonal(), (J.T @ H @ J).diagonal())
    if name != "not convex":
        S = vl.LossHessian(risk).sqrt().to_dense()
        assert_near(S @ S.T, H)
    leaf = f.clone().requires_grad_()
    (slope,) = torch.autograd.grad(truth(leaf, y, W), leaf)
    assert_near(risk.gradient(), J.T @ slope.reshape(-1))
    if has_labels:
        S = vl.LossHessian(risk).sqrt(20_000, torch.Generator().manual_seed(0))
        found = S.to_dense().square().sum(1)
        assert ((found - H.diagonal()).abs() <= 0.2 * H.diagonal() + 1e-12).all()
        assert vl.KFAC(risk).trace() > 0
    for other in (risk.subset([0, 5, 2]), copy.deepcopy(risk)):
        assert vl.GGN(other).trace().isfinite()


@pytest.mark.parametrize(
    ("loss", "divisor"),
    [
        (nn.KLDivLoss(reduction="batchmean"), N),
        (nn.KLDivLoss(), 3 * N),
        (nn.KLDivLoss(reduction="sum"), 1),
    ],
)
def test_divergences_divide_as_they_do(loss: nn.KLDivLoss, divisor: float) -> None:
    model, X, y = nn.Sequential(net(), nn.LogSoftmax(1)), inputs(N, 4), inputs(N, 3)
    y = y.softmax(1)
    risk = vl.EmpiricalRisk(model, vl.losses.Weighted(loss), (X, (y, W)))
    f = model(X).detach()
    value = (W[:, None] * y * (y.log() - f)).sum() / divisor
    assert_near(risk.value(), value)
    p = f.exp()
    blocks = (
        W[:, None, None] / divisor * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    )
    assert_near(vl.LossHessian(risk).to_dense(), torch.block_diag(*blocks))
    mean = loss.reduction != "sum"
    assert risk.reduction == ("mean" if mean else "sum")
    again = vl.EmpiricalRisk(model, loss, (X, y), reduction=risk.reduction)
    assert again.reduction == risk.reduction


@pytest.mark.parametrize("loss", [nn.MSELoss(), F.mse_loss, vl.Loss(F.mse_loss)])
def test_a_reduction_that_the_loss_has_not_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match="'sum' was given"):
        vl.losses.Weighted(loss, "sum")
    with pytest.raises(ValueError, match="reduction"):
        vl.losses.Weighted(branching)


def each_gaussian(f: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(f[0], y, f[1], reduction="none")


@pytest.mark.parametrize(
    "loss",
    [
        vl.losses.Weighted(nn.GaussianNLLLoss(reduction="sum")),
        vl.losses.Weighted(vl.Loss(each_gaussian, reduction="sum")),
        vl.losses.Weighted(lambda f, y: each_gaussian(f, y).sum(), "sum"),
    ],
    ids=["torch's", "by functions", "a function"],
)
def test_several_outputs_of_a_weighted_loss(loss: nn.Module) -> None:
    """Means and variances; no closed form is known to be right."""
    model = nn.Linear(4, 4).double()
    X, y = inputs(N, 4), inputs(N, 2)

    def predict(model: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = model(X).chunk(2, dim=1)
        return mean, variance.exp()

    risk = vl.EmpiricalRisk(model, loss, (X, (y, W)), predict=predict)
    outputs = predict(model, X)
    total = (W[:, None] * each_gaussian(outputs, y)).sum()
    assert_near(risk.value(), total.detach())
    assert_near(loss(outputs, (y, W)), total)  # to train with
    gradient = torch.autograd.grad(total, list(model.parameters()))
    assert_near(risk.gradient(), risk.flatten(gradient))
    f = torch.cat([part.detach().flatten(1) for part in outputs], dim=1)

    def of_flat(f: Tensor) -> Tensor:
        return (W[:, None] * each_gaussian((f[:, :2], f[:, 2:]), y)).sum()

    H = torch.autograd.functional.hessian(of_flat, f).reshape(4 * N, 4 * N)
    assert_near(vl.LossHessian(risk).to_dense(), H)
    assert not risk.loss.tested and not risk.loss.convex


def test_closed_forms_stay() -> None:
    loss = vl.losses.Weighted(nn.CrossEntropyLoss())
    risk = vl.EmpiricalRisk(net(), loss, (inputs(N, 4), (CLASSES, W)))
    assert vl.GGNFactor(risk).width == 2 and risk.loss.tested
    again = pickle.loads(pickle.dumps(risk))
    assert_near(vl.GGN(again).to_dense(), vl.GGN(risk).to_dense())


def counted(calls: list[Any], function: Any, *args: Any) -> Any:
    calls.append(args)
    return function(*args)


def test_losses_of_samples_are_vectorised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the library in one evaluation."""
    for name in ("cross-entropy", "squares", "counts", "Huber"):
        loss, y, _, _ = KINDS[name]
        risk = vl.EmpiricalRisk(net(), loss, (inputs(N, 4), y))
        calls: list[Any] = []
        total = functools.partial(counted, calls, type(risk.loss).total)
        monkeypatch.setattr(risk.loss, "total", functools.partial(total, risk.loss))
        losses = losses_of_samples(risk.loss, risk.outputs[0], risk.targets()[0])
        assert losses.shape == (N,) and len(calls) == 1
        assert_near(losses.sum() * risk.scale, risk.value())


def test_the_loss_of_a_weighted_one_uses_no_parameters_of_the_model() -> None:
    model = net()
    weight = model[0].weight

    def penalised(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum() + 0 * weight.sum()

    data = inputs(N, 4), (inputs(N, 3), W)
    with pytest.raises(ValueError, match="uses parameters of the model"):
        vl.EmpiricalRisk(model, vl.losses.Weighted(penalised, "sum"), data)


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        (CLASSES, TypeError, r"targets \(y, w\)"),
        ((CLASSES, W[:, None]), ValueError, r"must be \[7\]"),
        ((CLASSES, -W), ValueError, "not negative"),
        ((CLASSES, W / 0), ValueError, "finite"),
    ],
)
def test_wrong_weights(target: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        loss = vl.losses.Weighted(nn.CrossEntropyLoss())
        vl.EmpiricalRisk(net(), loss, (inputs(N, 4), target))


def own_value(f: Tensor, y: dict[str, Tensor]) -> Tensor:
    return (y["weight"] * (f - y["mean"])).cosh().sum(1)


class OwnModule(nn.Module):
    reduction = "sum"

    def forward(self, f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        return own_value(f, {"mean": y[0], "weight": y[1]}).sum()


Y, SCALES = inputs(N, 3), inputs(N, 3).exp()
SEVERAL_TARGETS: dict[str, tuple[nn.Module, Any]] = {
    "weights": (vl.losses.Weighted(nn.MSELoss(reduction="sum")), (Y, W)),
    "a mapping": (vl.Loss(own_value, reduction="sum"), {"mean": Y, "weight": SCALES}),
    "a pair": (OwnModule(), (Y, SCALES)),
}


@pytest.mark.parametrize("name", SEVERAL_TARGETS)
def test_hessians_of_several_targets_do_without_backpack(name: str) -> None:
    loss, y = SEVERAL_TARGETS[name]
    model, X = net(), inputs(N, 4)
    risk = vl.EmpiricalRisk(model, loss, (X, y))
    names, params = zip(*model.named_parameters(), strict=True)

    def value(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in params])
        shaped = [v.view_as(p) for v, p in zip(parts, params, strict=True)]
        named = dict(zip(names, shaped, strict=True))
        f = torch.func.functional_call(model, named, (X,))
        if name == "weights":
            return (W * (f - Y).square().sum(1)).sum()
        return own_value(f, {"mean": Y, "weight": SCALES}).sum()

    theta = torch.cat([p.detach().flatten() for p in params])
    H = torch.autograd.functional.hessian(value, theta)
    assert_near(vl.Hessian(risk).diagonal(), H.diagonal())
    assert_near(vl.Hessian(risk).trace(), H.trace())
    for kind in (vl.KFRA, vl.PositiveCurvatureHessian):
        with pytest.raises(ValueError, match=r"data: .* for one tensor of targets"):
            kind(risk)
