"""``vl.Loss``: a loss of one's own, by functions of outputs and targets."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.comparing import assert_near, inputs, jacobian
from vivit_linop.risk.losses.draws import Draws


def net(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)
    return nn.Sequential(*layers).double()


def classes(n: int, *shape: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(count, (n, *shape), generator=generator)


class Truth:
    """J, H and G of a risk, by plain autograd from the value of the loss alone."""

    def __init__(self, model: nn.Module, loss: vl.Loss, X: Tensor, y: Tensor) -> None:
        self.J = jacobian(model(X), model.parameters())
        self.f = f = model(X).detach()
        H = torch.autograd.functional.hessian(lambda f: loss(f, y), f)
        self.H = H.reshape(f.numel(), f.numel())
        self.G = self.J.T @ self.H @ self.J


# Losses of several kinds, with the Fisher matrix in output space ----------------------


def gaussian(f: Tensor, y: Tensor) -> Tensor:
    """Mean and log-variance."""
    return 0.5 * (f[:, 1] + (f[:, 0] - y[:, 0]) ** 2 * (-f[:, 1]).exp())


def gaussian_label(f: Tensor, y: Tensor, draws: vl.losses.LabelDraws) -> Tensor:
    deviation = (0.5 * f[:, 1:]).exp()
    return f[:, :1] + deviation * draws.normal(deviation)


def gaussian_fisher(f: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([(-f[:, 1]).exp(), torch.full((6,), 0.5)], 1))


def softplus_variance(f: Tensor, y: Tensor) -> Tensor:
    """``torch``'s own, with both from the net."""
    mean, variance = f[:, :1], F.softplus(f[:, 1:]) + 0.1
    return F.gaussian_nll_loss(mean, y, variance, reduction="none", eps=1e-12)


def softplus_label(f: Tensor, y: Tensor, draws: vl.losses.LabelDraws) -> Tensor:
    mean, variance = f[:, :1], F.softplus(f[:, 1:]) + 0.1
    return mean + variance.sqrt() * draws.normal(mean)


def softplus_fisher(f: Tensor) -> Tensor:
    v, slope = F.softplus(f[:, 1]) + 0.1, f[:, 1].sigmoid()
    return torch.diag_embed(torch.stack([1 / v, slope**2 / (2 * v**2)], 1))


def student(f: Tensor, y: Tensor) -> Tensor:
    """Student's t with four degrees of freedom: bounded slopes."""
    return (2.5 * ((f - y) ** 2 / 4).log1p()).sum()


def student_label(f: Tensor, y: Tensor, draws: vl.losses.LabelDraws) -> Tensor:
    squares = sum(draws.normal(f) ** 2 for _ in range(4))
    return f + draws.normal(f) / (squares / 4).sqrt()


def student_fisher(f: Tensor) -> Tensor:
    return torch.diag_embed(torch.full_like(f, 5 / 7))  # (ν + 1)/(ν + 3)


def mixed(f: Tensor, y: Tensor) -> Tensor:
    """Two tasks: a class among three, and a count."""
    first = F.cross_entropy(f[:, :3], y[:, 0].long(), reduction="none")
    return first + f[:, 3].exp() - y[:, 1] * f[:, 3]


def mixed_label(f: Tensor, y: Tensor, draws: vl.losses.LabelDraws) -> Tensor:
    first = draws.categories(f[:, :3].softmax(1)).to(f)
    return torch.stack([first, draws.counts(f[:, 3].exp())], 1)


def mixed_fisher(f: Tensor) -> Tensor:
    p = f[:, :3].softmax(1)
    fisher = torch.zeros(6, 4, 4, dtype=f.dtype)
    fisher[:, :3, :3] = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    fisher[:, 3, 3] = f[:, 3].exp()
    return fisher


def mixed_targets() -> Tensor:
    return torch.stack([classes(6).double(), classes(6, count=5).double()], 1)


Kind = tuple[vl.Loss, int, Tensor, Callable[[Tensor], Tensor]]
KINDS: dict[str, Callable[[], Kind]] = {
    "mean and log-variance": lambda: (
        vl.Loss(gaussian, sample=gaussian_label),
        2,
        inputs(6, 1),
        gaussian_fisher,
    ),
    "mean and variance by softplus": lambda: (
        vl.Loss(softplus_variance, sample=softplus_label),
        2,
        inputs(6, 1),
        softplus_fisher,
    ),
    "Student's t": lambda: (
        vl.Loss(student, sample=student_label, reduction="sum", coupled="none"),
        3,
        2 * inputs(6, 3),
        student_fisher,
    ),
    "two tasks": lambda: (
        vl.Loss(mixed, sample=mixed_label),
        4,
        mixed_targets(),
        mixed_fisher,
    ),
}


@functools.cache
def solved(name: str) -> tuple[vl.EmpiricalRisk, Truth, Tensor]:
    loss, C, y, fisher = KINDS[name]()
    model, X = net(3, C), inputs(6, 3)
    truth = Truth(model, loss, X, y)
    blocks = fisher(truth.f) / (6 if loss.reduction == "mean" else 1)
    data = [(X[:4], y[:4]), (X[4:], y[4:])]
    return vl.EmpiricalRisk(model, loss, data), truth, torch.block_diag(*blocks)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_missing_comes_by_autograd(name: str) -> None:
    risk, truth, _ = solved(name)
    assert_near(vl.LossHessian(risk).to_dense(), truth.H)
    G = vl.GGN(risk)
    assert_near(G.to_dense(), truth.G)
    assert_near(G.diagonal(), truth.G.diagonal())
    assert_near(G.eigh(k=2).eigenvalues, torch.linalg.eigvalsh(truth.G)[-2:])


@pytest.mark.parametrize("name", KINDS)
def test_samples_have_the_fisher_matrix(name: str) -> None:
    risk, truth, fisher = solved(name)
    M = 20_000
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is a likelihood
        vl.GGN(risk.subset([0, 1]), mc_samples=1)
    S = vl.LossHessian(risk).sqrt(M, generator).to_dense()
    found = S @ S.T
    # The error of a mean of M products of normal numbers, at six deviations and more.
    size = fisher.diagonal().outer(fisher.diagonal()).sqrt()
    # That of a squared score is up to four times as large.
    assert ((found - fisher).abs() <= 24 / M**0.5 * size + 1e-12).all()
    # Scores have mean zero.
    scores = S.sum(1) / M**0.5 / fisher.diagonal().sqrt()
    assert scores.abs().max() < 6 / M**0.5
    G = vl.GGN(risk, mc_samples=M // 10, generator=generator)
    expected = truth.J.T @ fisher @ truth.J
    assert (G.to_dense() - expected).norm() < 0.1 * expected.norm()
    G.eigvalsh()
    (G + 0.1 * vl.Identity(len(expected))).inv()


@pytest.mark.parametrize("name", KINDS)
def test_draws_depend_on_samples_only(name: str) -> None:
    loss, C, y, _ = KINDS[name]()
    model, X = net(3, C), inputs(6, 3)
    whole = vl.EmpiricalRisk(model, loss, (X, y))
    cut = vl.EmpiricalRisk(model, loss, [(X[:1], y[:1]), (X[1:], y[1:])])
    before = torch.random.get_rng_state()
    S, T = (
        vl.LossHessian(risk).sqrt(3, torch.Generator().manual_seed(7)).to_dense()
        for risk in (whole, cut)
    )
    assert_near(S, T)
    assert torch.equal(before, torch.random.get_rng_state())
    own = S.reshape(6, C, 6, 3).diagonal(dim1=0, dim2=2)  # [C, M, N]
    if name != "two tasks":  # counts may be the same
        assert own[0].unique().numel() == 18  # no two draws are one


def test_torchs_own_generator_is_reproducible() -> None:
    def sample(f: Tensor, y: Tensor, draws: Any) -> Tensor:
        return torch.distributions.Normal(f, 1.0).sample()

    def value(f: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (f - y).square().sum(1)

    loss, data = vl.Loss(value, sample=sample), (inputs(6, 3), inputs(6, 2))
    risk = vl.EmpiricalRisk(net(3, 2), loss, data)
    before = torch.random.get_rng_state()
    S, T = (
        vl.LossHessian(risk).sqrt(500, torch.Generator().manual_seed(7)).to_dense()
        for _ in range(2)
    )
    assert_near(S, T)
    assert torch.equal(before, torch.random.get_rng_state())
    unit = torch.eye(12, dtype=torch.float64) / 6
    assert (S @ S.T - unit).abs().max() < 0.3 / 6


def test_kfac() -> None:
    """For one sample with one position KFAC is the Monte-Carlo GGN's block."""
    risk, _, _ = solved("mean and log-variance")
    one = risk.subset([2])
    for kind in (vl.KFAC, vl.EKFAC):
        seeds = (torch.Generator().manual_seed(3) for _ in range(2))
        K = kind(one, mc_samples=5, generator=next(seeds)).to_dense()
        G = vl.GGN(one, mc_samples=5, generator=next(seeds)).to_dense()
        assert_near(K[:12, :12], G[:12, :12])


@pytest.mark.parametrize("entries", [True, False])
def test_of_a_likelihood_all_entries_count(entries: bool) -> None:
    """A mean over entries is no likelihood: its gradients are too small for it."""

    def value(f: Tensor, y: Tensor) -> Tensor:
        losses = F.poisson_nll_loss(f, y, reduction="none")
        return losses if entries else losses.mean(1)

    def sample(f: Tensor, y: Tensor, draws: vl.losses.LabelDraws) -> Tensor:
        return draws.counts(f.exp())

    data = inputs(6, 3), classes(6, 4, count=5).double()
    risk = vl.EmpiricalRisk(net(3, 4), vl.Loss(value, sample=sample), data)
    known = vl.EmpiricalRisk(net(3, 4), nn.PoissonNLLLoss(), data)
    assert_near(vl.GGN(risk).to_dense(), vl.GGN(known).to_dense())
    if entries:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours, theirs = (vl.GGN(r, mc_samples=2000).trace() for r in (risk, known))
        assert_near(ours, theirs, rtol=0.1)
    else:
        X, y = data
        weighted = vl.losses.Weighted(vl.Loss(value, sample=sample))
        same = vl.EmpiricalRisk(net(3, 4), weighted, (X, (y, torch.ones(6).double())))
        for of in (risk, same):
            with pytest.warns(UserWarning, match="0.2.* times its second derivatives"):
                vl.GGN(of, mc_samples=1)


# Closed forms -------------------------------------------------------------------------


def softmax_ce(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


def p_of(f: Tensor) -> Tensor:
    return f.softmax(1)


def covariance(p: Tensor) -> Tensor:
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


CLOSED: dict[str, Any] = {
    "all": dict(
        value=softmax_ce,
        gradient=lambda f, y: p_of(f) - F.one_hot(y, 3),
        hessian=lambda f, y: (
            torch.diag_embed(p_of(f)) - p_of(f)[:, :, None] * p_of(f)[:, None]
        ),
        sqrt=lambda f, y: (
            (torch.diag_embed(p_of(f)) - p_of(f)[:, :, None] * p_of(f)[:, None])
            / p_of(f).sqrt()[:, None]
        ),
        coupled="all",
    ),
    "none": dict(
        value=lambda f, y: (f.exp() - y * f).sum(1),
        gradient=lambda f, y: f.exp() - y,
        hessian=lambda f, y: f.exp(),
        sqrt=lambda f, y: (0.5 * f).exp(),
        coupled="none",
        reduction="sum",
    ),
    "none, by autograd": dict(
        value=lambda f, y: (f.exp() - y * f).sum(1), coupled="none", reduction="sum"
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name: str) -> None:
    loss = vl.Loss(**CLOSED[name])
    model, X, y = net(3, 3), inputs(6, 3), classes(6)
    if loss.coupled == "none":
        y = classes(6, 3).double()
    truth = Truth(model, loss, X, y)
    risk = vl.EmpiricalRisk(model, loss, [(X[:4], y[:4]), (X[4:], y[4:])])
    H = vl.LossHessian(risk)
    vl.testing.check_operator(H, truth.H)
    assert_near(H.diagonal(), truth.H.diagonal())
    S = H.sqrt().to_dense()
    assert_near(S @ S.T, truth.H)
    V = vl.GGNFactor(risk)
    assert V.width == 3
    assert_near(vl.GGN(risk).to_dense(), truth.G)
    assert_near((V @ V.T).diagonal(), truth.G.diagonal())
    U = vl.PerSampleGradients(risk)
    assert_near(U @ torch.ones(6).double() * risk.reduction_factor, risk.gradient())


@pytest.mark.parametrize("closed", [False, True])
def test_positions(closed: bool) -> None:
    """A focal loss of pixels: channels are coupled, positions are not."""

    def value(f: Tensor, y: Tensor) -> Tensor:
        log_p = f.log_softmax(1).gather(1, y.unsqueeze(1))
        return -((1 - log_p.exp()) ** 2 * log_p).mean((1, 2, 3))

    def of_pixel(f: Tensor, y: Tensor) -> Tensor:
        log_p = f.log_softmax(0).gather(0, y[None])[0]
        return -((1 - log_p.exp()) ** 2 * log_p) / 12

    def hessian(f: Tensor, y: Tensor) -> Tensor:
        pixels, labels = f.movedim(1, -1).reshape(-1, 3), y.reshape(-1)
        blocks = torch.vmap(torch.func.hessian(of_pixel))(pixels, labels)
        blocks = blocks.reshape(len(f), 3, 4, 3, 3)
        return blocks.movedim((3, 4), (1, 2))

    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 2, padding=1, stride=1).double()
    X, y = 3 * inputs(4, 1, 2, 3), classes(4, 3, 4)
    loss = vl.Loss(value, hessian=hessian if closed else None, coupled="channels")
    truth = Truth(model, loss, X, y)
    risk = vl.EmpiricalRisk(model, loss, (X, y))
    H = vl.LossHessian(risk)
    assert_near(H.to_dense(), truth.H)
    evals, evecs = torch.linalg.eigh(truth.H)
    assert evals[0] < 0
    part = (evecs * evals.clamp(min=0)) @ evecs.T
    positive = vl.LossHessian(risk, positive_part=True)
    assert_near(positive.to_dense(), part)
    assert positive.sqrt()._form(0).shape == (4, 3, 3, 12)
    assert_near(vl.GGN(risk).diagonal(), truth.G.diagonal())


def test_roots_of_several_shapes() -> None:
    """Of batches whose samples have different numbers of outputs."""

    def value(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).flatten(1).sum(1).square()  # of rank one

    def sqrt(f: Tensor, y: Tensor) -> Tensor:
        return 2**0.5 * torch.ones_like(f).flatten(1).unsqueeze(2)

    torch.manual_seed(0)
    model = nn.Conv1d(1, 2, 2).double()
    data = [(inputs(3, 1, n), inputs(3, 2, n - 1)) for n in (3, 5)]
    plain, closed = (
        vl.EmpiricalRisk(model, vl.Loss(value, sqrt=root, reduction="sum"), data)
        for root in (None, sqrt)
    )
    assert vl.GGNFactor(closed).shape[1] == 6
    assert_near(vl.GGN(closed).to_dense(), vl.GGN(plain).to_dense())
    for risk in (plain, closed):
        V = vl.GGNFactor(risk).to_dense()
        assert_near(V @ V.T, vl.GGN(plain).to_dense())


def test_kinds_of_values() -> None:
    """Losses of samples, of entries, a mean, a sum: one risk."""
    X, y = inputs(6, 3), inputs(6, 2)
    values: list[tuple[Callable[..., Tensor], str]] = [
        (lambda f, y: (f - y).square().mean(1), "mean"),
        (lambda f, y: (f - y).square(), "mean"),
        (lambda f, y: (f - y).square().mean(), "mean"),
        (lambda f, y: (f - y).square() / 12, "sum"),
        (lambda f, y: (f - y).square().sum() / 12, "sum"),
    ]
    expected = vl.EmpiricalRisk(net(3, 2), nn.MSELoss(), (X, y))
    for value, reduction in values:
        loss = vl.Loss(value, reduction=reduction)
        risk = vl.EmpiricalRisk(net(3, 2), loss, [(X[:4], y[:4]), (X[4:], y[4:])])
        assert_near(risk.value(), expected.value())
        assert_near(vl.GGN(risk).to_dense(), vl.GGN(expected).to_dense())
        assert_near(loss(torch.zeros(6, 2), y), y.square().mean())


def test_the_loss_is_of_the_risk() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64)

    def value(f: Tensor, y: Tensor) -> Tensor:
        return scale * (f - y).square().sum(1)

    def hessian(f: Tensor, y: Tensor) -> Tensor:
        return 2 * scale * torch.ones_like(f)

    loss = vl.Loss(value, hessian=hessian, coupled="none")
    risk = vl.EmpiricalRisk(net(3, 2), loss, (inputs(6, 3), inputs(6, 2)))
    before = vl.GGN(risk).to_dense()
    scale.mul_(3.0)
    assert_near(vl.GGN(risk).to_dense(), before)
    assert_near(vl.GGN(copy.deepcopy(risk)).to_dense(), before)
    model = net(3, 2)
    weight = model[0].weight
    penalised = vl.Loss(lambda f, y: (f - y).square().sum(1) + weight.square().sum())
    with pytest.raises(ValueError, match="uses parameters of the model"):
        vl.EmpiricalRisk(model, penalised, (inputs(6, 3), inputs(6, 2)))


# What is wrong is named ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gradient": lambda f, y: p_of(f)}, "gradient of softmax_ce is wrong"),
        ({"gradient": lambda f, y: p_of(f)[:, :2]}, "gradient of softmax_ce must"),
        ({"hessian": lambda f, y: torch.diag_embed(p_of(f))}, "hessian_product of"),
        ({"hessian": lambda f, y: p_of(f)}, "hessian of softmax_ce must return"),
        ({"sqrt": lambda f, y: torch.diag_embed(p_of(f))}, "with S = sqrt of"),
        ({"sqrt": lambda f, y: p_of(f)}, "sqrt of softmax_ce must return .6, 3, R"),
        ({"sqrt": lambda f, y: None}, "sqrt of softmax_ce must .* got NoneType"),
        ({"coupled": "none"}, "couples outputs at different positions"),
        ({"value": lambda f, y: softmax_ce(f, y)[:2]}, "the losses of 6 samples"),
        ({"value": lambda f, y: f.logsumexp((0, 1))}, "is not the mean of losses"),
    ],
)
def test_wrong_functions(change: dict[str, Any], says: str) -> None:
    data = inputs(6, 3), classes(6)
    with pytest.raises(ValueError, match=says):
        loss = vl.Loss(**{"value": softmax_ce, **change})
        vl.GGNFactor(vl.EmpiricalRisk(net(3, 3), loss, data)).gram.to_dense()


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (lambda f, y, draws: f, "labels in the form of the targets, ..6.., got ..6, 3"),
        (lambda f, y, draws: None, "got NoneType"),
        (lambda f, y, draws: torch.full((6,), float("nan")), "not all of them finite"),
        (None, "is has no likelihood|has no likelihood .* vl.Loss"),
    ],
)
def test_wrong_samples(sample: Any, says: str) -> None:
    loss = vl.Loss(lambda f, y: (f[:, 0] - y).square(), sample=sample)
    risk = vl.EmpiricalRisk(net(3, 3), loss, (inputs(6, 3), inputs(6)))
    with pytest.raises(ValueError, match=says):
        vl.GGN(risk, mc_samples=1)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="value: a function"):
        vl.Loss(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="hessian: a function"):
        vl.Loss(softmax_ce, hessian=torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: one of"):
        vl.Loss(softmax_ce, reduction="none")
    with pytest.raises(ValueError, match="coupled: one of"):
        vl.Loss(softmax_ce, coupled="pixels")


def mixture(f: Tensor, y: Tensor) -> Tensor:
    """A mixture density network: three weights, means and log-deviations."""
    weights, means, spread = f.unflatten(1, (3, 3)).unbind(1)
    parts = torch.distributions.Normal(means, spread.exp()).log_prob(y)
    return -(weights.log_softmax(1) + parts).logsumexp(1)


def mixture_label(f: Tensor, y: Tensor, draws: vl.losses.LabelDraws) -> Tensor:
    weights, means, spread = f.unflatten(1, (3, 3)).unbind(1)
    chosen = draws.categories(weights.softmax(1))[:, None]
    mean, deviation = means.gather(1, chosen), spread.gather(1, chosen).exp()
    return mean + deviation * draws.normal(mean)


def test_a_mixture_density_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Fisher matrix has no closed form: E[∇ℓ ∇ℓᵀ] = E[∇²ℓ] over drawn labels."""
    loss, X, y = vl.Loss(mixture, sample=mixture_label), inputs(2, 3), inputs(2, 1)
    model = net(3, 9)
    truth = Truth(model, loss, X, y)
    risk = vl.EmpiricalRisk(model, loss, (X, y))
    assert_near(vl.GGN(risk).to_dense(), truth.G)
    M = 40_000
    S, again = (
        vl.LossHessian(risk).sqrt(M, torch.Generator().manual_seed(0)).to_dense()
        for _ in range(2)
    )
    assert_near(S, again)
    # In several parts, the same.
    monkeypatch.setattr("vivit_linop.risk.losses.own.DRAWN_ENTRIES", 9 * M)
    parts = vl.LossHessian(risk).sqrt(M, torch.Generator().manual_seed(0)).to_dense()
    assert_near(parts, S)
    torch.manual_seed(0)
    f = truth.f.repeat_interleave(M, 0)
    labels = mixture_label(f, y, vl.losses.LabelDraws(Draws(5)))

    def single(f: Tensor, y: Tensor) -> Tensor:
        return mixture(f[None], y[None]).squeeze()

    hessians = torch.vmap(torch.func.hessian(single))(f, labels)
    fisher = torch.block_diag(*hessians.reshape(2, M, 9, 9).mean(1)) / 2
    assert (S @ S.T - fisher).norm() < 0.05 * fisher.norm()
