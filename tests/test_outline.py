"""Expressions as trees: parts, shapes, and costs as torch counts them."""

from __future__ import annotations

import html
from fractions import Fraction
from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vivit_linop as vl
from tests.operator_market import MARKET, build
from vivit_linop.operators.outline import Cost, Outline, as_html, outline

# What torch does not count: solves with factors, and projections that are drawn.
UNCOUNTED = ("inverse", "woodbury", "random_projection", "adjoint_sum")


def problem(out: int = 4, hidden: int = 8) -> vl.EmpiricalRisk:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, out))
    X, y = torch.rand(16, 2, dtype=torch.float64), torch.randint(out, (16,))
    return vl.EmpiricalRisk(net.double(), nn.CrossEntropyLoss(), (X, y))


def counted(op: vl.TorchLinearOperator, x: Tensor) -> int:
    op @ x  # makes what is kept
    op @ x
    with FlopCounterMode(display=False) as counter:
        op @ x
    return counter.get_total_flops()


class Text(HTMLParser):
    """The words of a page, and its tags, which must be closed in their order."""

    VOID = frozenset({"br", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("name", MARKET)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    op, _ = build(name, torch.float64, "cpu")
    cost = outline(op).cost
    assert cost is not None and cost.gradients == 0
    products = counted(op, torch.rand(op.shape[1], dtype=torch.float64))
    assert products <= cost.flops
    if not any(part in name for part in UNCOUNTED):
        # What is beside products of matrices: some entries of vectors.
        assert cost.flops <= 1.35 * products + 5 * sum(op.shape)


@pytest.mark.parametrize("name", MARKET)
def test_trees_are_pages(name: str) -> None:
    op, _ = build(name, torch.float64, "cpu")
    text = Text(op._repr_html_())
    assert text.tags <= {"div", "details", "summary", "b", "span"}
    assert type(op).__name__ in text.words
    assert f"{op.shape[0]} × {op.shape[1]}" in text.words


def test_passes_are_those_that_torch_counts() -> None:
    """Of a wide net: its first layer, which needs no derivative in x, is small."""
    risk = problem(out=64, hidden=64)
    net, D = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64)), 0
    x = torch.rand(16, 2)
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(net(x), torch.zeros(16).long()).backward()
    gradient, D = counter.get_total_flops(), risk.num_params
    J, H = vl.Jacobian(risk), vl.Hessian(risk)
    for op in (J, J.T, H, vl.GGN(risk, mc_samples=1)):
        cost = outline(op).cost
        assert cost is not None
        vector = torch.rand(op.shape[1], dtype=torch.float64)
        passes = counted(op, vector) / gradient
        assert passes <= 1.1 * float(cost.gradients), op
        assert op.shape != (D, D) or passes > 0.4 * float(cost.gradients), op


def test_an_expression_of_a_net() -> None:
    risk = problem()
    J, G = vl.Jacobian(risk), vl.GGN(risk)
    S = (G + 0.1 * vl.Identity(risk.num_params)).inv()
    A = J @ S @ J.T
    assert [name for name, _ in outline(A).parts] == ["A₁", "A₂", "A₃"]
    assert [part for _, part in outline(A).parts][1] is S
    cost = outline(A).cost
    assert cost is not None and cost.gradients == 4 * Fraction(2, 3)
    words = Text(A._repr_html_()).words
    for line in (
        "Sandwich 64 × 64",
        f"torch.float64, {A.device}; a product costs 8/3 gradients + ",
        "A₂ = Woodbury 60 × 60 (A + δ I)⁻¹, δ = 0.1 4/3 gradients + ",
        "A = GGN 60 × 60 V Vᵀ 4/3 gradients",
        "V = GGNFactor 60 × 48 JᵀS 2/3 gradient + ",
        "J = Jacobian 64 × 60 J 2/3 gradient",
        "S = LossHessianSqrt 64 × 48 16 blocks",
        "A₃ = Pullback 60 × 64 Jᵀ 2/3 gradient",
    ):
        assert line in " ".join(words.split()), line


def test_a_tree_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = problem()
    operators = [
        vl.GGN(risk),
        vl.Jacobian(risk),
        vl.Hessian(risk),
        vl.LossHessian(risk),
    ]
    operators += [operators[0].factor.T @ operators[0].factor]

    def refuse(*_: object) -> None:
        raise AssertionError("the net has run")

    monkeypatch.setattr(nn.Linear, "forward", refuse)
    for op in operators:
        assert "×" in op._repr_html_()


def test_gram_matrices_that_are_known_are_cheaper() -> None:
    G = vl.GGN(problem())
    K = G.factor.T @ G.factor
    before = outline(K).cost
    K.to_dense()
    after = outline(K).cost
    assert before is not None and before.gradients == Fraction(4, 3)
    assert after == Cost(flops=2 * 48**2)
    assert "its matrix is known" in K._repr_html_()


def test_inverses_cost_what_they_are_multiplied_by() -> None:
    V, delta = vl.Dense(torch.rand(9, 2)), torch.tensor(0.5, requires_grad=True)
    followed = (V @ V.T + delta * vl.Identity(9)).inv()
    by_entry = (V @ V.T + vl.Diagonal(1.0 + torch.rand(9))).inv()
    assert outline(followed).formula == "(A + δ I)⁻¹, δ = 0.5"
    assert outline(followed).cost == outline(followed.inverse).cost
    rows = Cost(flops=2 * 9)
    assert outline(by_entry).cost == outline(by_entry.woodbury).cost + rows


class Marked(vl.TorchLinearOperator):
    """An operator of a user's, of which nothing is known."""

    self_adjoint = True

    def _multiply(self, X: Tensor) -> Tensor:
        return X


def test_operators_of_ones_own() -> None:
    A = Marked((3, 3), torch.float64)
    assert outline(A) == Outline()
    assert "costs" not in A._repr_html_()
    assert outline(A + vl.Diagonal(torch.rand(3))).cost is None
    assert outline(vl.Kronecker(A, torch.rand(2, 2).double())).cost is None

    class Named(Marked):
        pass

    Named.__name__ = "<script>alert(1)</script>"

    @outline.register(Named)
    def outline_of_named(op: Named) -> Outline:
        return Outline("<b> & A", [("<i>", A)], Cost(Fraction(1), 5e9))

    page = (2 * Named((3, 3), torch.float64))._repr_html_()
    assert "<script" not in page and "<i>" not in page
    text = Text(page)
    assert "<script>alert(1)</script> 3 × 3" in text.words
    assert "<b> & A" in text.words and "1 gradient + 5 GFLOP" in text.words
    assert html.escape("<i> = ") in page


def test_long_and_deep_trees_are_cut() -> None:
    A = vl.BlockDiagonal([torch.eye(2)] * 30)
    words = Text(as_html(A)).words
    assert "… and 22 more" in words and words.count("Dense") == 8
    B: vl.TorchLinearOperator = Marked((2, 2), torch.float64)
    for _ in range(40):
        B = vl.BlockDiagonal([B])
    assert len(as_html(B)) < 10_000
    assert "…" in as_html(B)


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        (Cost(), "nothing"),
        (Cost(flops=999), "999 FLOP"),
        (Cost(flops=1000), "1 kFLOP"),
        (Cost(flops=999_900), "1 MFLOP"),
        (Cost(flops=2.5e16), "2.5e+04 TFLOP"),
        (Cost(Fraction(1)), "1 gradient"),
        (3 * Cost(Fraction(2, 3)) + Cost(flops=1), "2 gradients + 1 FLOP"),
    ],
)
def test_units(cost: Cost, said: str) -> None:
    assert str(cost) == said
