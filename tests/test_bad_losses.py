"""Losses that cannot be differentiated or summed are refused, by name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.bad_cases import CE, CLASSES, MSE, TARGETS, X, net, refused, risk_of, toy
from tests.cases import Lambda
from tests.curvature_cases import fresh

# Losses -------------------------------------------------------------------------------


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def test_reduction() -> None:
    data = (X, TARGETS)
    refused("reduction", risk_of(loss=squares, data=data), ValueError)
    refused("reduction", risk_of(loss=nn.MSELoss(reduction="none"), data=data))
    refused("reduction", risk_of(loss=squares, data=data, reduction="none"))
    refused("reduction", risk_of(loss=squares, data=data, reduction="average"))
    refused("reduction", risk_of(loss=squares, data=data, reduction=3))
    refused("reduction", risk_of(loss=MSE, data=data, reduction="sum"))
    refused("loss", risk_of(loss=squares, data=data, reduction="sum"), ValueError)
    refused("reduction", lambda: vl.GGN(net(), squares, data), ValueError)
    # Elementwise, though it is said to be a mean.
    refused(
        "loss",
        risk_of(loss=F.mse_loss_none if False else _each, data=data, reduction="mean"),
    )


def _each(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square()


def test_loss_that_returns_no_tensor() -> None:
    refused("loss", risk_of(loss=lambda f, y: 1.0, reduction="mean"))
    refused("loss", risk_of(loss=lambda f, y: None, reduction="mean"))


@pytest.mark.parametrize("N", [2, 3, 6])
def test_losses_that_mix_samples(N: int) -> None:
    def contrastive(output: Tensor, target: Tensor) -> Tensor:
        return -(output @ output.T).log_softmax(1).diagonal().mean()

    def centred(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.mean(0)).square().sum()

    def root(output: Tensor, target: Tensor) -> Tensor:
        return squares(output, target).sqrt()

    def pairwise(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.flip(0)).square().sum()

    data = (X[:N], TARGETS[:N])
    for loss, reduction in (
        (contrastive, "mean"),
        (centred, "sum"),
        (root, "mean"),
        (pairwise, "sum"),
    ):
        refused("loss", risk_of(loss=loss, data=data, reduction=reduction), ValueError)
    # Divided by the weights of the batch's classes: a mean of another kind.
    weights = torch.tensor([1.0, 2.0, 7.0]).double()

    def weighted(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, weight=weights)

    y = torch.tensor([0, 2, 1, 0, 0, 2])
    for data in ((X, y), [(x[None], k[None]) for x, k in zip(X, y, strict=True)]):
        refused("loss", risk_of(net(), weighted, data, reduction="mean"), ValueError)


def test_checks_can_be_turned_off() -> None:
    def mixed(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        return h - h.mean(0)

    def centred(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.mean(0)).square().sum()

    for model, loss in ((Lambda(mixed, f=net()), nn.MSELoss()), (net(), centred)):
        reduction = getattr(loss, "reduction", "sum")
        build = risk_of(model, loss, (X, TARGETS), reduction=reduction)
        refused("(model|loss)", build, ValueError)
        risk = risk_of(model, loss, (X, TARGETS), reduction=reduction, check=False)()
        value = risk.subset(range(6)).value()
        torch.testing.assert_close(value, loss(model(X), TARGETS).detach())
    refused("check", risk_of(check="no"), TypeError)


def test_mixing_in_a_model_of_one_batch_size() -> None:
    def mixed(m: Any, x: Tensor) -> Tensor:
        h = m.f(x.view(6, 4))
        return h - h.mean(0)

    refused("model", risk_of(Lambda(mixed, f=net())), ValueError)
    fixed = Lambda(lambda m, x: m.f(x.view(6, 4)), f=net())
    assert risk_of(fixed)().num_samples == 6


def test_predict() -> None:
    refused("predict", risk_of(predict=3), TypeError)
    refused(
        "predict",
        risk_of(
            lambda p, x: x @ p["w"],
            CE,
            (X, CLASSES),
            {"w": torch.ones(4, 3)},
            predict=lambda m, x: m(x),
        ),
        TypeError,
    )
    nested = Lambda(lambda m, x: (m.f(x), x), f=net())
    refused("model", risk_of(nested), TypeError, "predict=")
    assert risk_of(nested, predict=lambda m, x: m(x)[0])().num_outputs == 3


def test_targets_of_the_likelihoods() -> None:
    logs = Lambda(lambda m, x: m.f(x).log_softmax(1), f=net())
    refused("loss", risk_of(loss=nn.NLLLoss()), ValueError, "log_softmax")
    refused("data", risk_of(logs, nn.NLLLoss(), (X, TARGETS)), ValueError, "indices")
    gauss, poisson = nn.GaussianNLLLoss(), nn.PoissonNLLLoss()
    refused("data", risk_of(loss=gauss, data=(X, TARGETS)), ValueError, "stack")
    pairs = torch.stack([TARGETS, -TARGETS.abs() - 1.0], dim=-1)
    refused("data", risk_of(loss=gauss, data=(X, pairs)), ValueError, "negative")
    counts = TARGETS.abs().round()
    refused("data", risk_of(loss=poisson, data=(X, -1.0 - counts)), ValueError)
    rates = nn.PoissonNLLLoss(log_input=False)
    refused("loss", risk_of(loss=rates, data=(X, counts)), ValueError, "log_input")
    positive = Lambda(lambda m, x: m.f(x).exp(), f=net())
    risk = risk_of(positive, rates, (X, counts))()
    refused("mc_samples", lambda: vl.GGN(risk, mc_samples=1), ValueError, "biased")
    tokens = Lambda(lambda m, x: m.f(x)[:, None].expand(-1, 2, -1), f=net())
    refused(
        "data",
        risk_of(tokens, CE, (X, CLASSES[:, None].expand(-1, 2))),
        ValueError,
        "transpose",
    )


def test_exact_factors_of_wide_outputs() -> None:
    """Refused with their size and what fits; products need none of it."""
    V = 300_000  # a block of the exact root has 9e10 entries
    net = Lambda(lambda m, x: m.f(x), f=nn.Linear(1, V, bias=False))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (torch.ones(2, 1), CLASSES[:2]))
    G, x = vl.GGN(risk), torch.linspace(-1.0, 1.0, V)
    p = net(torch.ones(1, 1)).softmax(1)[0].detach()
    torch.testing.assert_close(G @ x, p * (x - p @ x))
    for use in (
        lambda: vl.GGNFactor(risk),
        lambda: vl.LossHessian(risk).sqrt(),
        lambda: G.factor.T @ x,
        G.eigvalsh,
        G.trace,
        vl.LossHessian(risk).sqrt,
    ):
        with pytest.raises(MemoryError, match=r"GB(.|\n)*mc_samples="):
            use()
    sampled = vl.GGN(risk, mc_samples=1, generator=torch.Generator().manual_seed(0))
    assert sampled.eigvalsh().shape == (2,)
    H = vl.LossHessian(risk)
    torch.testing.assert_close(H.diagonal(), (p * (1 - p) / 2).repeat(2))
    for op in (H, vl.Jacobian(risk)):
        with pytest.raises(MemoryError, match=r"GB"):
            op.to_dense()


def test_loss_that_mixes_only_in_its_curvature() -> None:
    # The value of the coupling is zero for all outputs, its second derivative is not.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        shift = output - output.detach()
        return (output - target).square().sum() + shift.sum() ** 2

    def use() -> Any:
        risk = vl.EmpiricalRisk(net(), loss, (X, TARGETS), reduction="sum")
        return vl.GGN(risk) @ torch.ones(43).double()

    refused("loss", use, ValueError)


@pytest.mark.parametrize(
    "loss", [lambda f, y: y.sum(), lambda f, y: (f - y).square().sum().detach()]
)
def test_loss_that_is_not_differentiable_in_the_output(loss: Any) -> None:
    def use() -> Any:
        risk = vl.EmpiricalRisk(net(), loss, (X, TARGETS), reduction="sum")
        return vl.GGN(risk) @ torch.ones(43).double()

    refused("loss", use, ValueError)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_of_losses(name: str) -> None:
    y = (TARGETS > 0).double()
    for value in (-torch.ones(3), torch.full((3,), float("nan"))):
        refused(
            "(loss|data)",
            risk_of(loss=nn.BCEWithLogitsLoss(**{name: value}), data=(X, y)),
            ValueError,
        )
    # Of samples: has no meaning for other samples.
    of_samples = nn.BCEWithLogitsLoss(**{name: torch.rand(6, 3).double()})
    refused("loss", risk_of(loss=of_samples, data=(X, y)), ValueError)
    if name == "weight":
        for value in (-torch.ones(3), torch.ones(2), torch.full((3,), float("nan"))):
            refused(
                "(loss|data)",
                risk_of(loss=nn.CrossEntropyLoss(weight=value.double())),
                ValueError,
            )


def test_nonconvex_loss() -> None:
    risk = fresh("nonconvex_loss")
    H = vl.LossHessian(risk)
    refused("loss", H.sqrt, ValueError, "not convex")
    refused("loss", lambda: vl.GGNFactor(risk), ValueError, "not convex")
    G, x = vl.GGN(risk), torch.ones(risk.num_params).double()
    assert (G @ x).isfinite().all()
    J = vl.Jacobian(risk)
    torch.testing.assert_close(J.T @ H @ J @ x, G @ x)
    damped = G + 0.1 * vl.Identity(len(x))
    for use in (
        G.inv,
        G.sqrt,
        damped.inv,
        damped.sqrt,
        G.gram.to_dense,
        lambda: G.eigh(k=1, route="ARPACK on K"),
        lambda: G.block_diagonal("parameter"),
        lambda: vl.KFAC(risk, variant="exact"),
    ):
        refused("loss", use, ValueError, "give positive_part=True")


# Monte-Carlo --------------------------------------------------------------------------


def test_mc_samples() -> None:
    risk = toy()
    H = vl.LossHessian(risk)
    for value, error in ((-1, ValueError), (1.5, TypeError), ("1", TypeError)):
        for build in (
            lambda v=value: H.sqrt(v),
            lambda v=value: vl.GGN(risk, mc_samples=v),
            lambda v=value: vl.GGNFactor(risk, mc_samples=v),
        ):
            refused("mc_samples", build, error)
    refused("mc_samples", lambda: H.sqrt(True), TypeError)
    refused("mc_samples", lambda: H.sqrt(None), TypeError)
    huber = vl.EmpiricalRisk(net(), nn.HuberLoss(), (X, TARGETS))
    refused("mc_samples", lambda: vl.GGN(huber, mc_samples=1), ValueError, "likelihood")
    refused("mc_samples", lambda: vl.GGNFactor(huber, mc_samples=1), ValueError)
    with pytest.raises(TypeError, match="generator"):
        H.sqrt(1, 42)


# Combining operators ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (nn.CosineEmbeddingLoss(), "two embeddings"),
        (nn.TripletMarginLoss(), "an anchor"),
        (nn.MarginRankingLoss(), "two scores"),
        (nn.CTCLoss(), "no second derivative"),
        (nn.BCEWithLogitsLoss(torch.rand(6, 1)), "sample axis"),
    ],
    ids=str,
)
def test_losses_that_are_none_of_one_output(loss: Any, says: str) -> None:
    refused("loss", risk_of(loss=loss, data=(X, TARGETS.sigmoid())), says=says)


def test_weights_that_number_samples() -> None:
    model = nn.Sequential(net(), nn.Sigmoid())
    loss, data = nn.BCELoss(torch.rand(6, 1).double()), (X, TARGETS.sigmoid())
    refused("loss", risk_of(model, loss, data), says="sample axis")


def test_losses_without_second_derivatives() -> None:
    """Refused where a Hessian is asked for; gradients of samples need none."""
    y = torch.tensor([[0, 1, -1], [2, -1, 0], [1, 0, -1]]).repeat(2, 1)
    risk = vl.EmpiricalRisk(net(), nn.MultiLabelMarginLoss(), (X, y))
    for operator in (vl.GGN, vl.LossHessian, vl.Hessian):
        refused("loss", lambda op=operator: op(risk), says="second derivative")
    torch.testing.assert_close(
        vl.PerSampleGradients(risk).to_dense().mean(1), risk.gradient()
    )


def test_divergences_of_what_are_no_log_probabilities() -> None:
    data = (X, TARGETS.softmax(1))
    refused("loss", risk_of(loss=nn.KLDivLoss(), data=data), says="log_softmax")
    refused("data", risk_of(loss=nn.KLDivLoss(), data=(X, TARGETS)))
    refused("data", risk_of(loss=nn.KLDivLoss(), data=(X, CLASSES)), says="NLLLoss")


class Unsteady(nn.Module):
    """Another function in each call."""

    reduction = "mean"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.register_buffer("centre", torch.zeros(3).double())

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "draws":
            output = F.dropout(output, 0.5)
        elif self.kind == "counts":
            output = min(1.0, self.calls / 1000) * output
        else:
            self.centre.mul_(0.9).add_(0.1)
            output = output - self.centre
        return squares(output, target)


@pytest.mark.parametrize("kind", ["draws", "counts", "keeps"])
@pytest.mark.parametrize("N", [1, 4])
def test_losses_that_are_no_function(kind: str, N: int) -> None:
    """Of one sample as of several."""
    refused(
        "loss",
        risk_of(loss=Unsteady(kind), data=(X[:N], TARGETS[:N])),
        ValueError,
        "another value when it is called again",
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: (f - y).abs().sqrt().sum(),
        lambda f, y: (f - y).norm(dim=1).sum(),
        lambda f, y: (f - y).abs().pow(1.5).sum(),
        vl.Loss(lambda f, y: (f - y).abs().pow(1.5), reduction="sum", coupled="none"),
    ],
)
def test_losses_with_derivatives_that_are_none(loss: Any) -> None:
    """At one sample, where a net has its target."""
    model, y = net().double(), TARGETS.clone()
    y[2] = model(X)[2].detach()
    reduction = None if isinstance(loss, vl.Loss) else "sum"
    risk = vl.EmpiricalRisk(model, loss, [(X, y)], reduction=reduction)
    for kind in (vl.GGN, vl.LossHessian, vl.Hessian):
        refused(
            "loss", lambda kind=kind: kind(risk), ValueError, "NaN or Inf, at sample 2"
        )
    y[2] += 0.1
    risk = vl.EmpiricalRisk(model, loss, [(X, y)], reduction=reduction)
    assert vl.GGN(risk).trace().isfinite()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_targets_in_another_dtype(dtype: torch.dtype) -> None:
    """What a loss refuses, and what torch computes with all the same."""
    labels = (TARGETS > 0).to(dtype)
    probabilities = nn.Sequential(net(), nn.Sigmoid())

    def own(output: Tensor, target: Tensor) -> Tensor:
        return nn.BCELoss()(output.sigmoid(), target)

    says = f"targets are {dtype}"
    build = risk_of(probabilities, nn.BCELoss(), (X, labels))
    refused("data", build, TypeError, says)
    data = (X, labels)
    refused("data", risk_of(None, own, data, reduction="mean"), TypeError, says)
    if dtype is torch.bool:
        refused("data", risk_of(None, nn.L1Loss(), (X, labels)), TypeError, says)
    # Of another fault torch says what it is.
    with pytest.raises(RuntimeError, match="size"):
        risk_of(None, nn.L1Loss(), (X, labels[:, :2].to(torch.int64)))()
    for loss in (MSE, nn.BCEWithLogitsLoss(), nn.HuberLoss()):
        found = vl.GGN(net(), loss, (X, labels)).to_dense()
        truth = vl.GGN(net(), loss, (X, labels.double())).to_dense()
        torch.testing.assert_close(found, truth)


def normalised(output: Tensor, target: Tensor) -> Tensor:
    """Its value is 1 for any samples."""
    losses = (output - target).abs()
    return losses.mean() / losses.mean().detach()


def reweighted(output: Tensor, target: Tensor) -> Tensor:
    """Each sample has the value 1, and weights by its share of the batch."""
    losses = (output - target).abs().sum(1)
    shares = losses.detach() / losses.detach().sum()
    return (1.0 + shares * (losses - losses.detach())).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "loss",
    [
        normalised,
        reweighted,
        lambda f, y: 1e9 + (f - f.mean(0) - y).abs().sum(1).mean(),
    ],
)
def test_slopes_that_mix_samples(loss: Any, dtype: torch.dtype) -> None:
    """What is linear has no Hessian to show it, and its value does not."""
    data = X.to(dtype), TARGETS.to(dtype)
    build = risk_of(net().to(dtype), loss, data, reduction="mean")
    refused("loss", build, ValueError, "not the mean of losses of single samples")
    # The same without the batch is taken.
    own = risk_of(
        *(net().to(dtype), lambda f, y: 1e4 + (f - y).abs().sum(1).mean(), data),
        reduction="mean",
    )
    plain = risk_of(
        *(net().to(dtype), lambda f, y: (f - y).abs().sum(1).mean(), data),
        reduction="mean",
    )
    U, truth = (vl.PerSampleGradients(risk()).to_dense() for risk in (own, plain))
    torch.testing.assert_close(U, truth)


def test_losses_in_a_lower_precision() -> None:
    def halved(f: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(f.bfloat16(), y.bfloat16())

    for loss, dtype in (
        (lambda f, y: F.mse_loss(f.float(), y.float()), torch.float64),
        (halved, torch.float64),
        (halved, torch.float32),
    ):
        data = X.to(dtype), TARGETS.to(dtype)
        build = risk_of(net().to(dtype), loss, data, reduction="mean")
        refused("loss", build, ValueError, "a lower precision than")
    higher = vl.EmpiricalRisk(
        net().float(),
        lambda f, y: F.mse_loss(f.double(), y.double()),
        (X.float(), TARGETS.float()),
        reduction="mean",
    )
    exact = vl.EmpiricalRisk(net(), MSE, (X, TARGETS)).gradient()
    torch.testing.assert_close(higher.gradient(), exact.float())


@pytest.mark.parametrize(
    "loss",
    [
        lambda target, output: CE(output, target),
        lambda output, target: output.logits.sum() + target.sum(),
        lambda output, target: (output[:, 3] - target).square().mean(),
    ],
    ids=["swapped", "another container", "a class too many"],
)
def test_a_loss_that_fails_says_on_what(loss: Any) -> None:
    """The error is that of the loss; a note says what it was called with."""
    with pytest.raises((RuntimeError, IndexError, AttributeError)) as caught:
        vl.EmpiricalRisk(net(), loss, (X, CLASSES), reduction="mean")
    (note,) = caught.value.__notes__
    assert note.startswith("loss: <lambda>")
    assert "with a tensor [6, 3] and a tensor [6]." in note


def test_kfac_names_the_variant_that_draws_nothing() -> None:
    loss = nn.MultiMarginLoss()
    refused("mc_samples", lambda: vl.KFAC(net(), loss, (X, CLASSES)), says="'exact'")
