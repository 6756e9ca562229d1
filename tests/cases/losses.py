"""Losses and reductions."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .market import Lambda, Problem, binary, case, classes, features, mlp, variants


def _mlp_with(
    loss: nn.Module, target: Callable[..., Tensor], *shape: int, **known: Any
) -> Problem:
    return Problem(mlp(4, 5, 3), loss, (features(6, 4), target(6, *shape)), **known)


variants(
    "mlp",
    lambda *a: _mlp_with(*a, likelihood=True),
    [
        ("mse_mean", nn.MSELoss(), features, 3),
        ("mse_sum", nn.MSELoss(reduction="sum"), features, 3),
        ("ce_mean", nn.CrossEntropyLoss(), classes, 3),
        ("ce_sum", nn.CrossEntropyLoss(reduction="sum"), classes, 3),
        ("bce_mean", nn.BCEWithLogitsLoss(), binary, 3),
        ("bce_sum", nn.BCEWithLogitsLoss(reduction="sum"), binary, 3),
        ("ce_smoothed", nn.CrossEntropyLoss(label_smoothing=0.25), classes, 3),
        (
            "bce_weighted",
            nn.BCEWithLogitsLoss(
                weight=torch.tensor([0.5, 2.0, 0.0]),
                pos_weight=torch.tensor([3.0, 1.0, 0.25]),
            ),
            binary,
            3,
        ),
    ],
)
variants(
    "linear",
    lambda loss, target, *shape: Problem(
        nn.Linear(4, 3), loss, (features(3, 4), target(3, *shape)), likelihood=True
    ),
    [
        ("mse", nn.MSELoss(), features, 3),
        ("ce", nn.CrossEntropyLoss(reduction="sum"), classes, 3),
        ("bce", nn.BCEWithLogitsLoss(), binary, 3),
    ],
)


@case
def ce_everything() -> Problem:
    # The divisor of the mean is the weight of all targets in all batches.
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]), ignore_index=1, label_smoothing=0.125
    )
    y = torch.tensor([0, 1, 2, 1, 1, 0])
    whole = Problem(mlp(4, 5, 3), loss, (features(6, 4), y), likelihood=True)
    return whole.rebatched(3, 2, 1)  # all of the second are ignored


@case
def ce_soft_targets() -> Problem:
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]), label_smoothing=0.25
    )
    y = torch.randn(6, 3).softmax(1)
    return Problem(mlp(4, 5, 3), loss, (features(6, 4), y), likelihood=True)


@case
def ce_unnormalised_soft_targets() -> Problem:
    loss = nn.CrossEntropyLoss(reduction="sum")
    return Problem(mlp(4, 3), loss, (features(4, 4), torch.rand(4, 3)))


@case
def ce_one_class() -> Problem:
    # p = 1 whatever the net says: G is exactly zero.
    data = (features(3, 2), classes(3, 1))
    return Problem(nn.Linear(2, 1), nn.CrossEntropyLoss(), data)


@case
def ce_two_classes() -> Problem:
    data = (features(5, 3), classes(5, 2))
    return Problem(mlp(3, 4, 2), nn.CrossEntropyLoss(), data, likelihood=True)


@case
def ce_sequence() -> Problem:
    # Outputs [N, C, d]: positions that the loss does not couple, some ignored.
    y = classes(4, 3, 5)
    y[0, :2] = y[2] = -100
    net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 3, 1))
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 2, 5), y), likelihood=True)


@case
def ce_image_soft() -> Problem:
    # Soft targets [N, C, h, w].
    net = nn.Conv2d(1, 3, 2)
    data = (features(3, 1, 3, 3), torch.randn(3, 3, 2, 2).softmax(1))
    return Problem(net, nn.CrossEntropyLoss(), data, likelihood=True)


@case
def ce_saturated() -> Problem:
    # In some samples one class has p = 1 to rounding, in others two share all mass.
    X = features(6, 4)
    X[:2] *= 1e3
    X[2] *= 30.0
    net = mlp(4, 3)
    loss = nn.CrossEntropyLoss(reduction="sum")
    # Logits up to 1e3 are rounded by 1e-4 in float32, and so are small p, relatively.
    return Problem(net, loss, (X, classes(6, 3)), likelihood=True, rtol32=1e-4)


@case
def bce_saturated() -> Problem:
    X = features(5, 3)
    X[:2] *= 1e3
    loss = nn.BCEWithLogitsLoss(reduction="sum")
    data = (X, binary(5, 2))
    return Problem(nn.Linear(3, 2), loss, data, likelihood=True, rtol32=1e-4)


@case
def bce_image() -> Problem:
    # Outputs [N, 2, 2, 2], soft targets, weights that broadcast over them.
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([[[2.0]], [[0.5]]]))
    data = (features(3, 1, 3, 3), torch.rand(3, 2, 2, 2))
    return Problem(nn.Conv2d(1, 2, 2), loss, data, likelihood=True)


@case
def mse_image() -> Problem:
    data = (features(3, 1, 3, 3), features(3, 2, 2, 2))
    return Problem(nn.Conv2d(1, 2, 2), nn.MSELoss(), data, likelihood=True)


@case
def huber() -> Problem:
    loss = nn.HuberLoss(delta=50.0)  # quadratic at all residuals here
    return Problem(mlp(4, 3, 2), loss, (features(5, 4), features(5, 2)))


@case
def huber_kinked() -> Problem:
    # Zero curvature where residuals exceed delta: the rank of H is not known before.
    loss = nn.HuberLoss(delta=1.0, reduction="sum")
    y = features(5, 2)
    y[::2] += 10.0
    return Problem(mlp(4, 3, 2), loss, (features(5, 4), y))


@case
def smooth_l1() -> Problem:
    # Some residuals inside of beta, some beyond.
    return _mlp_with(nn.SmoothL1Loss(beta=0.5), features, 3)


@case
def poisson() -> Problem:
    data = (features(5, 4), classes(5, 4, 2).double())
    return Problem(mlp(4, 3, 2), nn.PoissonNLLLoss(full=True), data, likelihood=True)


@case
def poisson_rates() -> Problem:
    # The Hessian depends on the counts: some of them are zero.
    net = Lambda(lambda m, x: F.softplus(m.layer(x)), layer=mlp(4, 3))
    loss = nn.PoissonNLLLoss(log_input=False, eps=0.125, reduction="sum")
    return Problem(net, loss, (features(5, 4), classes(5, 3, 3).double()))


@case
def gaussian() -> Problem:
    # [N, T, C] regression; a variance for each target, one below eps.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        y, variance = target.unbind(-1)
        return F.gaussian_nll_loss(output, y, variance, full=True, eps=0.0625)

    variance = torch.rand(4, 2, 3) + 0.25
    variance[0, 0, 0] = 0.0
    y = torch.stack([features(4, 2, 3), variance], dim=-1)
    return Problem(
        mlp(2, 3),
        nn.GaussianNLLLoss(full=True, eps=0.0625),
        (features(4, 2, 2), y),
        likelihood=True,
        reference_loss=loss,
    ).rebatched(1, 3)


@case
def nll() -> Problem:
    # The reference is the cross-entropy: of log-probabilities they are the same.
    options: dict[str, Any] = {
        "weight": torch.tensor([0.5, 2.0, 1.0]),
        "ignore_index": 1,
    }
    net = Lambda(lambda m, x: m.layer(x).log_softmax(1), layer=mlp(4, 5, 3))
    return Problem(
        net,
        nn.NLLLoss(**options),
        (features(6, 4), torch.tensor([0, 1, 2, 1, 1, 0])),
        likelihood=True,
        reference_loss=nn.CrossEntropyLoss(**options),
    ).rebatched(3, 2, 1)


@case
def coupled_function_loss() -> Problem:
    # All six outputs of a sample are coupled, in batches.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        f, t = output.flatten(1), target.flatten(1)
        return (f.logsumexp(1) + 0.5 * (f.sum(1) - t.sum(1)) ** 2).mean()

    net = Lambda(
        lambda m, x: m.layer(x).reshape(-1, 2, 3).transpose(1, 2), layer=mlp(3, 6)
    )
    whole = Problem(net, loss, (features(5, 3), features(5, 3, 2)), reduction="mean")
    return whole.rebatched(2, 3)


@case
def function_cross_entropy() -> Problem:
    # The same as nn.CrossEntropyLoss, through autograd.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, label_smoothing=0.125)

    data = (features(5, 4), classes(5, 3))
    return Problem(mlp(4, 3), loss, data, reduction="mean")


@case
def linear_loss() -> Problem:
    # No curvature at all in output space.
    net = Lambda(lambda m, x: m.layer(x).log_softmax(1), layer=mlp(3, 2))
    data = (features(4, 3), classes(4, 2))
    return Problem(net, functools.partial(F.nll_loss), data, reduction="mean")


@case
def linear_loss_of_linear_net() -> Problem:
    # Neither G nor the Hessian has anything in it.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum()

    data = (features(4, 3), features(4, 2))
    return Problem(nn.Linear(3, 2), loss, data, reduction="sum")


@case
def nonconvex_loss() -> Problem:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).sin().sum()

    data = (features(4, 3), features(4, 2))
    return Problem(mlp(3, 2), loss, data, reduction="sum", convex=False)
