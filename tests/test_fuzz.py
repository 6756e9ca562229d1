"""A short run of the fuzzer on fixed seeds; ``make fuzz`` takes fresh ones."""

import pytest

import vivit_linop as vl
from tests.fuzz import checks
from tests.fuzz.__main__ import shrunk
from tests.fuzz.expressions import Expression
from tests.fuzz.nets import Plan
from tests.fuzz.truth import Undecided


def said(case: Plan | Expression) -> str:
    """What is wrong with a case, and the case; nothing if it has no truth."""
    try:
        findings = case.findings()
    except Undecided:
        return ""
    return "\n".join([*map(str, findings), case.code()]) if findings else ""


@pytest.mark.parametrize("seed", range(16))
def test_nets(seed: int) -> None:
    assert not (wrong := said(Plan.draw(seed))), wrong


@pytest.mark.parametrize("seeds", [range(n, n + 20) for n in range(0, 80, 20)], ids=str)
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
