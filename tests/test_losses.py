"""The GGN of losses of torch, against autograd of a function of all outputs."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vivit_linop as vl
from tests import cases
from tests.comparing import jacobian

LOG_SOFTMAX, SIGMOID = nn.LogSoftmax(1), nn.Sigmoid()
PROBABILITIES = torch.tensor(
    [[0.1, 0.7, 0.2], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4], [0.6, 0.1, 0.3]]
).double()
SIGNS = torch.tensor([[1.0, -1, 1], [1, 1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
LABELS, WEIGHTS = torch.tensor([2, 0, 1, 1]), torch.tensor([0.5, 1.5, 2.0]).double()


def kullback_leibler(f: Tensor, t: Tensor) -> Tensor:
    """As a function of all outputs, not of log-probabilities only."""
    return -(t * f.log_softmax(1)).sum()


def multi_margin(f: Tensor, y: Tensor) -> Tensor:
    losses = [
        WEIGHTS[c] * (0.7 - row[c] + row[i]).relu() ** 2 / 3
        for row, c in zip(f, y, strict=True)
        for i in range(3)
        if i != c
    ]
    return torch.stack(losses).sum() / 4


@pytest.mark.parametrize(
    ("loss", "last", "y", "function"),
    [
        (nn.BCELoss(), SIGMOID, PROBABILITIES, None),
        (nn.BCELoss(WEIGHTS, reduction="sum"), SIGMOID, PROBABILITIES, None),
        (nn.MultiLabelSoftMarginLoss(WEIGHTS), None, SIGNS.clamp(min=0), None),
        (nn.SoftMarginLoss(), None, SIGNS, None),
        (nn.MultiMarginLoss(2, 0.7, WEIGHTS), None, LABELS, multi_margin),
        (
            nn.KLDivLoss(),
            LOG_SOFTMAX,
            PROBABILITIES,
            lambda f, t: kullback_leibler(f, t) / 12,
        ),
        (
            nn.KLDivLoss(reduction="batchmean"),
            LOG_SOFTMAX,
            PROBABILITIES,
            lambda f, t: kullback_leibler(f, t) / 4,
        ),
        (
            nn.KLDivLoss(reduction="sum", log_target=True),
            LOG_SOFTMAX,
            PROBABILITIES[[0, 2, 3, 3]].log(),
            lambda f, t: kullback_leibler(f, t.exp()),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_losses_of_torch(loss: Any, last: Any, y: Tensor, function: Any) -> None:
    """Exact, and the same in two cuts into batches."""
    net = nn.Sequential(*cases.mlp(4, 5, 3), *([last] if last else [])).double()
    X = cases.features(4, 4).double()
    value = loss(net(X), y).detach()
    J = jacobian(net(X), net.parameters())
    hessian = torch.autograd.functional.hessian
    H = hessian(lambda f: (function or loss)(f, y), net(X).detach()).reshape(12, 12)
    G = J.T @ H @ J
    for sizes in ([4], [1, 3], [1, 1, 1, 1]):
        batches = list(zip(X.split(sizes), y.split(sizes), strict=True))
        of = vl.EmpiricalRisk(net, loss, batches)
        torch.testing.assert_close(of.value(), value, rtol=1e-12, atol=1e-12)
        x = torch.linspace(-1.0, 1.0, len(G)).double()
        torch.testing.assert_close(vl.GGN(of) @ x, G @ x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(vl.GGN(of).to_dense(), G, rtol=1e-10, atol=1e-12)
        gradient = torch.autograd.grad(loss(net(X), y), list(net.parameters()))
        U, r = vl.PerSampleGradients(of), of.reduction_factor
        torch.testing.assert_close(r * U.to_dense().sum(1), of.flatten(gradient))


@pytest.mark.parametrize(
    ("function", "module", "y"),
    [
        (F.cross_entropy, nn.CrossEntropyLoss(), torch.tensor([0, 2, 1, -100])),
        (F.mse_loss, nn.MSELoss(), torch.eye(4)[:, :3].double()),
        (
            F.binary_cross_entropy_with_logits,
            nn.BCEWithLogitsLoss(),
            torch.eye(4)[:, :3].double(),
        ),
        (
            partial(F.cross_entropy, weight=WEIGHTS, label_smoothing=0.1),
            nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1),
            torch.tensor([0, 2, 1, -100]),
        ),
        (
            partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHTS),
            nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
            torch.eye(4)[:, :3].double(),
        ),
        (F.poisson_nll_loss, nn.PoissonNLLLoss(), torch.eye(4)[:, :3].double()),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_functions_of_torch_are_their_modules(
    function: Any, module: nn.Module, y: Any, weighted: bool
) -> None:
    X, net = torch.rand(4, 2).double(), nn.Linear(2, 3).double()
    if weighted:
        y = y, torch.rand(4).double()
        function, module = map(vl.losses.Weighted, (function, module))
    risk, same = (vl.EmpiricalRisk(net, loss, (X, y)) for loss in (function, module))
    assert risk.reduction == "mean"
    assert torch.equal(risk.value(), same.value())
    if not weighted:
        torch.testing.assert_close(risk.value(), function(net(X), y).detach())
    G = vl.GGN(risk, mc_samples=2, generator=torch.Generator().manual_seed(0))
    expected = vl.GGN(same, mc_samples=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(G.to_dense(), expected.to_dense())
    assert vl.GGNFactor(risk).width == vl.GGNFactor(same).width
    with pytest.raises(ValueError, match="'sum' was given"):
        vl.EmpiricalRisk(net, function, (X, y), reduction="sum")


@pytest.mark.parametrize(
    ("function", "module", "y"),
    [
        (F.l1_loss, nn.L1Loss(), PROBABILITIES),
        (partial(F.huber_loss, delta=0.3), nn.HuberLoss(delta=0.3), PROBABILITIES),
        (F.smooth_l1_loss, nn.SmoothL1Loss(), PROBABILITIES),
        (F.soft_margin_loss, nn.SoftMarginLoss(), SIGNS),
        (F.hinge_embedding_loss, nn.HingeEmbeddingLoss(), SIGNS),
        (
            F.multilabel_soft_margin_loss,
            nn.MultiLabelSoftMarginLoss(),
            SIGNS.clamp(min=0),
        ),
        (
            partial(F.multi_margin_loss, p=2, weight=WEIGHTS, reduction="sum"),
            nn.MultiMarginLoss(2, weight=WEIGHTS, reduction="sum"),
            LABELS,
        ),
        (torch.compile(nn.MSELoss(), backend="aot_eager"), nn.MSELoss(), SIGNS),
    ],
)
def test_functions_without_a_likelihood_are_their_modules(
    function: Any, module: nn.Module, y: Tensor
) -> None:
    """Also where torch's own have no second derivatives; and they travel."""
    X, net = torch.rand(4, 2).double(), nn.Linear(2, 3).double()
    risk, same = (vl.EmpiricalRisk(net, loss, (X, y)) for loss in (function, module))
    torch.testing.assert_close(risk.value(), function(net(X), y).detach())
    G = vl.GGN(same).to_dense()
    for other in (risk, pickle.loads(pickle.dumps(risk))):
        assert torch.equal(vl.GGN(other).to_dense(), G)
        assert torch.equal(other.gradient(), same.gradient())


def test_options_that_only_a_function_has() -> None:
    """It stays a function."""
    X, y, net = torch.rand(4, 2), torch.rand(4, 3), nn.Linear(2, 3)
    loss = partial(F.huber_loss, weight=None)
    risk = vl.EmpiricalRisk(net, loss, (X, y), reduction="mean")
    torch.testing.assert_close(risk.value(), loss(net(X), y).detach())


@pytest.mark.parametrize("loss", [nn.NLLLoss(), nn.NLLLoss(WEIGHTS.float())])
@pytest.mark.parametrize("more", [0.0, 1e-4])
def test_log_probabilities_that_sum_to_one_in_a_few_digits(
    loss: nn.NLLLoss, more: float
) -> None:
    """Their value is torch's, and derivatives are those of the probabilities."""
    net, X, y = nn.Linear(4, 3), cases.features(4, 4).float(), LABELS

    def log_probabilities(net: nn.Module, X: Tensor) -> Tensor:
        return (net(X).softmax(1) + more).log()

    risk = vl.EmpiricalRisk(net, loss, (X, y), predict=log_probabilities)
    value = loss(log_probabilities(net, X), y)
    torch.testing.assert_close(risk.value(), value.detach(), rtol=1e-6, atol=0.0)
    gradient = torch.autograd.grad(value, list(net.parameters()))
    torch.testing.assert_close(risk.gradient(), risk.flatten(gradient))
    U = vl.PerSampleGradients(risk).to_dense()
    torch.testing.assert_close(U.mean(1), risk.flatten(gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "last", "signs"),
    [
        (nn.MSELoss(), None, False),
        (nn.L1Loss(), None, False),
        (nn.BCELoss(), SIGMOID, False),
        (nn.SoftMarginLoss(), None, True),
        (nn.HingeEmbeddingLoss(), None, True),
        (vl.losses.Weighted(nn.BCELoss()), SIGMOID, False),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_means_are_over_all_entries_of_batches_of_several_widths(
    loss: Any, last: Any, signs: bool, reduction: str
) -> None:
    loss = copy.deepcopy(loss)
    weighted = isinstance(loss, vl.losses.Weighted)
    plain = loss.loss if weighted else loss
    plain.reduction = loss.reduction = reduction
    net = nn.Sequential(nn.Linear(4, 1), nn.Flatten(1), *([last] if last else []))
    net, params = net.double(), list(net.parameters())
    X = [torch.randn(3, 5, 4).double(), torch.randn(2, 2, 4).double()]
    y = [torch.rand(x.shape[:2]).double() for x in X]
    y = [(2.0 * each - 1).sign() for each in y] if signs else y
    ones = [torch.ones(len(x)).double() for x in X]
    data = list(zip(X, zip(y, ones, strict=True) if weighted else y, strict=True))
    of = vl.EmpiricalRisk(net, loss, data)
    f, target = (torch.cat([t.flatten() for t in parts]) for parts in (map(net, X), y))
    value = plain(f, target)
    torch.testing.assert_close(of.value(), value.detach())
    gradient = torch.autograd.grad(value, params, retain_graph=True)
    torch.testing.assert_close(of.gradient(), of.flatten(gradient))
    rows = [of.flatten(torch.autograd.grad(c, params, retain_graph=True)) for c in f]
    J = torch.stack(rows)
    H = torch.autograd.functional.hessian(lambda f: plain(f, target), f.detach())
    torch.testing.assert_close(vl.GGN(of).to_dense(), J.T @ H @ J)


def test_rows_of_labels_of_several_numbers() -> None:
    """A mean over rows of a mean over labels."""
    net, loss = nn.Linear(4, 3).double(), nn.MultiLabelSoftMarginLoss()
    X = [torch.randn(3, 5, 4).double(), torch.randn(2, 2, 4).double()]
    y = [(torch.rand(*x.shape[:2], 3) > 0.5).double() for x in X]
    of = vl.EmpiricalRisk(net, loss, list(zip(X, y, strict=True)))
    f, target = (torch.cat([t.flatten(0, 1) for t in each]) for each in (X, y))
    torch.testing.assert_close(of.value(), loss(net(f), target).detach())


TEACHER = nn.Linear(4, 3).double()


@pytest.mark.parametrize(
    ("loss", "target", "function"),
    [
        (nn.CrossEntropyLoss(), lambda X: TEACHER(X).softmax(1), F.cross_entropy),
        (nn.MSELoss(), lambda X: nn.Parameter(X[:, :3]), F.mse_loss),
        (
            nn.BCEWithLogitsLoss(),
            lambda X: TEACHER(X).sigmoid(),
            F.binary_cross_entropy_with_logits,
        ),
        (
            nn.GaussianNLLLoss(),
            lambda X: torch.stack([TEACHER(X), X[:, :3]], -1),
            lambda f, y: F.gaussian_nll_loss(f, y[..., 0], y[..., 1]),
        ),
        (
            vl.losses.Weighted(nn.HuberLoss()),
            lambda X: (TEACHER(X), X[:, 0]),
            lambda f, y: (F.huber_loss(f, y[0], reduction="none").mean(1) @ y[1]) / 4,
        ),
    ],
)
def test_targets_that_require_grad_are_constants(
    loss: Any, target: Any, function: Any
) -> None:
    """Those of a teacher, or parameters: what comes of them has no graph."""
    net = nn.Sequential(*cases.mlp(4, 5, 3)).double()
    X = cases.features(4, 4).double().abs() + 0.1
    y = target(X)
    plain = tuple(t.detach() for t in y) if isinstance(y, tuple) else y.detach()
    learnt, known = (vl.EmpiricalRisk(net, loss, (X, of)) for of in (y, plain))
    gradient = torch.autograd.grad(function(net(X), plain), list(net.parameters()))
    torch.testing.assert_close(learnt.gradient(), learnt.flatten(gradient))
    quantities: list[Any] = [
        lambda risk: vl.LossHessian(risk).to_dense(),
        lambda risk: vl.PerSampleGradients(risk).to_dense(),
        lambda risk: vl.EmpiricalFisher(risk).to_dense(),
        lambda risk: vl.GGN(risk).to_dense(),
        lambda risk: vl.Hessian(risk).to_dense(),
    ]
    for quantity in quantities:
        found, expected = quantity(learnt), quantity(known)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for p in TEACHER.parameters())


def recomputed(output: Tensor, y: Tensor) -> Tensor:
    """As of vocabularies whose probabilities are not kept."""
    value: Tensor = checkpoint(F.cross_entropy, output, y, use_reentrant=True)
    return value


class Recomputed(nn.Module):
    reduction = "mean"

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return recomputed(output, y)


def recomputed_rows(output: Tensor, y: Tensor) -> Tensor:
    rows = partial(F.cross_entropy, reduction="none")
    value: Tensor = checkpoint(rows, output, y, use_reentrant=True)
    return value


@pytest.mark.parametrize(
    "loss", [recomputed, Recomputed(), vl.Loss(recomputed_rows)], ids="fml"
)
def test_losses_with_reentrant_checkpoints(loss: Any) -> None:
    """Torch has no ``autograd.grad`` of these."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    X, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    options = {"reduction": "mean"} if loss is recomputed else {}
    risk = vl.EmpiricalRisk(net, loss, (X, y), **options)
    output = net(X).detach()
    slopes = (output.softmax(1) - F.one_hot(y, 3)) / 6
    p = output.softmax(1)
    blocks = torch.block_diag(*(p.diag_embed() - p[:, :, None] * p[:, None]) / 6)
    J = jacobian(net(X), net.parameters())
    torch.testing.assert_close(risk.gradient(), J.T @ slopes.reshape(-1))
    G = J.T @ blocks @ J
    for op in (vl.GGN(risk), vl.Hessian(risk)):
        torch.testing.assert_close(op.to_dense(), G)
