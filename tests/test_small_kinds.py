"""Kinds of targets that torch takes, and parameters without entries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import vivit_linop as vl
from tests.cases import Lambda, mlp

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).double()
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])


def random_vector(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, generator=generator, dtype=torch.float64)


# Targets ------------------------------------------------------------------------------


def log_probabilities() -> nn.Module:
    return nn.Sequential(mlp(4, 5, 3), nn.LogSoftmax(1))


def maps() -> nn.Module:
    """Classes of each of four positions, as in segmentation."""
    return Lambda(lambda m, x: m.f(x).view(-1, 3, 4), f=mlp(4, 12))


def same_numbers(left: vl.EmpiricalRisk, right: vl.EmpiricalRisk, drawn: bool) -> None:
    x = random_vector(left.num_params)

    def numbers(risk: vl.EmpiricalRisk) -> list[Tensor]:
        G, H = vl.GGN(risk), vl.Hessian(risk)
        generator = torch.Generator().manual_seed(0)
        values = [
            risk.value(),
            risk.gradient(),
            G @ x,
            H @ x,
            G.eigvalsh(),
            G.diagonal(),
            vl.PerSampleGradients(risk).to_dense(),
            vl.GGN(risk.subset([4, 2])) @ x,
        ]
        if drawn:
            values.append(vl.GGN(risk, mc_samples=2, generator=generator) @ x)
        return values

    for got, expected in zip(numbers(left), numbers(right), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("make", "loss", "y"),
    [
        (lambda: mlp(4, 5, 3), nn.CrossEntropyLoss(), CLASSES),
        (
            lambda: mlp(4, 5, 3),
            nn.CrossEntropyLoss(
                weight=torch.tensor([1.0, 2.0, 3.0]).double(), label_smoothing=0.1
            ),
            CLASSES,
        ),
        (
            lambda: mlp(4, 5, 3),
            nn.CrossEntropyLoss(ignore_index=255),
            torch.tensor([0, 255, 1, 1, 255, 2]),
        ),
        (log_probabilities, nn.NLLLoss(), CLASSES),
        (maps, nn.CrossEntropyLoss(), CLASSES[:, None].expand(6, 4)),
    ],
    ids=["plain", "weights", "ignored", "NLL", "maps"],
)
@pytest.mark.parametrize("cut", [6, 4])
def test_class_indices_of_a_byte(
    make: Any, loss: nn.Module, y: Tensor, cut: int
) -> None:
    net = make().double()
    risks = [
        vl.EmpiricalRisk(net, loss, list(zip(X.split(cut), t.split(cut), strict=True)))
        for t in (y.to(torch.uint8), y)
    ]
    expected = loss(net(X), y)
    torch.testing.assert_close(risks[0].value(), expected.detach())
    gradient = torch.autograd.grad(expected, list(net.parameters()))
    torch.testing.assert_close(risks[0].gradient(), risks[0].flatten(gradient))
    same_numbers(*risks, drawn=True)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.NLLLoss()])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.bool])
def test_class_indices_that_torch_does_not_take(
    loss: nn.Module, dtype: torch.dtype
) -> None:
    with pytest.raises(TypeError, match=r"^data: .*y\.long\(\)"):
        vl.EmpiricalRisk(log_probabilities().double(), loss, (X, CLASSES.to(dtype)))


def test_smooth_l1_without_a_bend_is_the_absolute_error() -> None:
    net, y = mlp(4, 5, 3).double(), torch.rand(len(X), 3).double()
    loss = nn.SmoothL1Loss(beta=0.0)
    expected = torch.autograd.grad(nn.L1Loss()(net(X), y), list(net.parameters()))
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    torch.testing.assert_close(risk.gradient(), risk.flatten(expected))
    assert not vl.GGN(risk).to_dense().any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(),
        nn.BCEWithLogitsLoss(),
        nn.HuberLoss(),
        nn.SmoothL1Loss(),
        nn.PoissonNLLLoss(),
    ],
)
def test_labels_and_counts_that_are_no_real_numbers(
    loss: nn.Module, dtype: torch.dtype
) -> None:
    net, y = mlp(4, 5, 3).double(), torch.eye(3).repeat(2, 1).to(dtype)
    risks = [vl.EmpiricalRisk(net, loss, (X, t)) for t in (y, y.double())]
    torch.testing.assert_close(risks[0].value(), loss(net(X), y.double()).detach())
    drawn = isinstance(loss, (nn.MSELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss))
    same_numbers(*risks, drawn)


def test_backpack_is_given_the_same_targets() -> None:
    pytest.importorskip("backpack")
    net = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    x = random_vector(43)
    for operator in (vl.PositiveCurvatureHessian, vl.KFRA):
        found, expected = (
            operator(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))) @ x
            for y in (CLASSES.byte(), CLASSES)
        )
        torch.testing.assert_close(found, expected)


# Parameters without entries -----------------------------------------------------------


class Partly(nn.Module):
    """A net of which a part has no inputs, no outputs, no rows, or is not used."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.kind = nn.Linear(4, 3), kind
        parts: dict[str, nn.Module] = {
            "no inputs": nn.Linear(0, 3),
            "no outputs": nn.Linear(4, 0),
            "no rows": nn.Embedding(0, 3),
            "nothing": nn.ParameterList([torch.zeros(0, 2)]),
            "not used": nn.ParameterList([torch.zeros(0)]),
            "not normalised": nn.LayerNorm(0),
        }
        self.b = parts[kind]

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x).tanh()
        match self.kind:
            case "no inputs":
                return h + self.b(x[:, :0])
            case "no outputs" | "not normalised":
                more = self.b(x if self.kind == "no outputs" else x[:, :0])
                return torch.cat([h, more], 1)
            case "no rows":
                return h + self.b(torch.zeros(len(x), 0, dtype=torch.long)).sum(1)
            case "nothing":
                return h + self.b[0].sum()
            case _:
                return h


KINDS = (
    "no inputs",
    "no outputs",
    "no rows",
    "nothing",
    "not used",
    "not normalised",
)


@pytest.mark.parametrize("cut", [6, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_entries(kind: str, cut: int) -> None:
    net = Partly(kind).double()
    batches = list(zip(X.split(cut), CLASSES.split(cut), strict=True))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), batches)
    params = {name: p.detach() for name, p in net.named_parameters()}
    assert list(risk.params) == list(params)
    D = sum(p.numel() for p in params.values())
    jacobians = jacrev(lambda p: functional_call(net, p, (X,)))(
        {name: p for name, p in params.items() if p.numel()}
    )
    J = torch.cat([j.reshape(18, -1) for j in jacobians.values()], 1)
    p = net(X).softmax(1).detach()
    blocks = [q.diag() - q.outer(q) for q in p]
    G = J.T @ torch.block_diag(*blocks) @ J / 6
    residuals = p - nn.functional.one_hot(CLASSES, 3)
    U = (residuals.reshape(6, 3, 1) * J.reshape(6, 3, D)).sum(1).T
    x = random_vector(D)
    ours = vl.GGN(risk)
    expected = torch.linalg.eigvalsh(G)
    evals = ours.eigvalsh()
    torch.testing.assert_close(risk.gradient(), U.mean(1))
    torch.testing.assert_close(ours @ x, G @ x)
    torch.testing.assert_close(evals, expected[-len(evals) :], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.diagonal(), G.diagonal())
    torch.testing.assert_close(ours.to_dense(), G)
    torch.testing.assert_close(vl.PerSampleGradients(risk).to_dense(), U)
    torch.testing.assert_close(vl.PerSampleGradients(risk).variance(), U.var(1, False))
    damped = G + 0.1 * torch.eye(D).double()
    inverse = (ours + 0.1 * vl.Identity(D)).inv()
    torch.testing.assert_close(inverse @ x, torch.linalg.solve(damped, x))
    # Blocks of biases are exact in KFAC too.
    places = torch.arange(D).split([q.numel() for q in params.values()])
    blocks = ours.block_diagonal("parameter").to_dense()
    approximations = [
        approximation(risk, variant="exact").to_dense()
        for approximation in (vl.KFAC, vl.EKFAC)
    ]
    for place, q in zip(places, params.values(), strict=True):
        exact = [blocks, *(approximations if q.ndim == 1 else [])]
        for dense in exact:
            torch.testing.assert_close(dense[place][:, place], G[place][:, place])
    for dense in approximations:
        assert dense.shape == (D, D) and dense.isfinite().all()
    assert [part.shape for part in risk.unflatten(x)] == [
        q.shape for q in params.values()
    ]


def test_torchscript_is_refused_with_a_way_out() -> None:
    net = mlp(4, 5, 3)
    inside = nn.Sequential(
        nn.Linear(4, 4).double(), torch.jit.script(copy.deepcopy(net))
    )
    for module in (torch.jit.script(net), torch.jit.trace(net, X), inside):
        with pytest.raises(ValueError, match=r"^model: .*torch\.jit.*Give the module"):
            vl.EmpiricalRisk(module, nn.CrossEntropyLoss(), (X, CLASSES))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x)


SCRIPTED: dict[str, Callable[[], nn.Module]] = {
    "script": lambda: torch.jit.script(Swish()),
    "trace": lambda: torch.jit.trace(Swish(), torch.rand(6, 5)),
    "several": lambda: torch.jit.script(nn.Sequential(Swish(), nn.Identity())),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_parts_without_parameters(name: str) -> None:
    plain = nn.Sequential(nn.Linear(4, 5), Swish(), nn.Linear(5, 3)).double()
    net = nn.Sequential(plain[0], SCRIPTED[name](), plain[2])
    risks = [
        vl.EmpiricalRisk(model, nn.CrossEntropyLoss(), (X, CLASSES))
        for model in (net, plain)
    ]
    for quantity in (
        lambda risk: vl.GGN(risk).to_dense(),
        lambda risk: vl.GGN(risk).eigvalsh(),
        lambda risk: vl.Hessian(risk).diagonal(),
        lambda risk: vl.KFAC(risk, variant="exact").to_dense(),
        lambda risk: copy.deepcopy(risk).gradient(),
        lambda risk: risk.at().value(),
    ):
        torch.testing.assert_close(*map(quantity, risks))
    assert risks[0].is_current()
