"""A short run of the fuzzer on fixed seeds; ``make fuzz`` takes fresh ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import vivit_linop as vl
from tests.fuzz import checks
from tests.fuzz.__main__ import shrunk
from tests.fuzz.expressions import Expression
from tests.fuzz.nets import Plan
from tests.fuzz.truth import Case, Curvature, Undecided

pytestmark = pytest.mark.host("its nets are the CPU's")


def said(case: Plan | Expression) -> str:
    """What is wrong with a case, and the case; nothing if it has no truth."""
    try:
        findings = case.findings()
    except Undecided:
        return ""
    return "\n".join([*map(str, findings), case.code()]) if findings else ""


@pytest.mark.parametrize("seed", range(8))
def test_nets(seed: int) -> None:
    assert not (wrong := said(Plan.draw(seed))), wrong


@pytest.mark.parametrize("seeds", [range(n, n + 10) for n in range(0, 40, 10)], ids=str)
def test_expressions(seeds: range) -> None:
    for seed in seeds:
        assert not (wrong := said(Expression.draw(seed))), wrong


def test_what_is_wrong_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagonal that is wrong for nets with a certain layer."""
    diagonal = vl.GGN.sample_diagonals
    wrong = lambda G: diagonal(G) * (1.0 + 1e-6)  # noqa: E731
    monkeypatch.setattr(vl.GGN, "sample_diagonals", wrong)
    case = Plan.draw(2)
    (finding,) = case.findings("diagonals")
    assert finding.check == "diagonals" and not finding.refused
    small = shrunk(case, finding)
    assert not small.layers and small.samples == 1
    assert "Case(model, loss, data, params" in small.code()


def build(net: Callable[[], nn.Module], X: Tensor) -> Case:
    torch.manual_seed(0)
    model = net().double()
    y = torch.ones_like(model(X)).detach()
    return Case(model, nn.MSELoss(), (X, y))


INPUT, TOKENS = torch.rand(3, 2).double() - 0.5, torch.tensor([[0, 1], [2, 0], [1, 1]])
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, bool]] = {
    "smooth": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()), INPUT, True),
    "padding": (
        lambda: nn.Sequential(nn.Embedding(3, 2, padding_idx=0), nn.Tanh()),
        TOKENS,
        True,
    ),
    "kink": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.ReLU()),
        torch.tensor([[0.0, 0.0], [0.5, 0.25]]).double(),
        True,
    ),
    # Torch's derivative is a constant that does not know of the norm.
    "norm": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), INPUT, False),
    "norm of a number": (lambda: weight_norm(nn.Linear(1, 1)), INPUT[:, :1], False),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NETS)
def test_a_refusal_is_right_where_second_derivatives_are_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, X, right = NETS[name]
    make = lambda: build(net, X)  # noqa: E731
    assert Curvature(make()).is_right() == right
    assert not checks.findings(make, only="hessian")

    def refuse(*_: object) -> None:
        raise ValueError("model: its second derivatives by torch are wrong.")

    monkeypatch.setattr(vl.Hessian, "__matmul__", refuse)
    assert bool(checks.findings(make, only="hessian")) == right


def test_cases_have_a_truth() -> None:
    """Nearly all programs run in plain torch, and no rounding harms their truth."""
    undecided = 0
    for seed in range(100, 112):
        try:
            Plan.draw(seed).findings("no check at all")
        except Undecided:
            undecided += 1
    assert undecided <= 3
    assert set(checks.CURVED) < set(checks.CHECKS)
