"""What the documentation quotes of the benchmarks is what they have measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as command
from benchmarks import quoted
from benchmarks.problems import NETS

SUITES = command.SUITES
BEFORE = {"machine": {"processor": "an old one"}, "rows": []}


def report(rounds: int = 3, num_samples: int = 128, value: float = 4.0) -> Any:
    """A report of the suite of products on one net, as the command writes it."""
    measured = {
        "num_samples": num_samples,
        "seconds": {"G @ x": [0.1] * rounds},
        "median_ratios": {"curvlinops / ours, 1 column": value, "G @ x / gradient": 2},
        "memory_ratios": {},
    }
    facts = {"processor": "a new one", "load": 0.1}
    return {"environment": facts, "suites": {"products": {"mlp": measured}}}


def quote(*reports: Any, before: Any = BEFORE) -> Any:
    return quoted.quote(SUITES, reports, before)


def test_rows_have_the_values_and_the_aims() -> None:
    found = quote(report())
    assert found["machine"] == {"processor": "a new one"}
    first, second = found["rows"]
    aims = {ratio.label: ratio.aims["mlp"] for ratio in SUITES["products"].ratios[:2]}
    assert (first["value"], first["at_most"]) == (4.0, False)
    assert (second["value"], second["at_most"]) == (2.0, True)
    assert {row["label"]: row["aim"] for row in found["rows"]} == aims


def test_the_newest_counts_and_what_is_not_measured_stays() -> None:
    other = {"suite": "spectra", "net": "3c3d", "label": "x", "value": 7.0}
    before = {"machine": {}, "rows": [other]}
    found = quote(report(value=1.0), report(value=5.0), before=before)
    assert [row["value"] for row in found["rows"]] == [5.0, 2.0, 7.0]
    assert quote(before=before) == before


@pytest.mark.parametrize("rounds", [0, 2])
def test_quick_reports_are_not_quoted(rounds: int) -> None:
    assert quote(report(rounds)) == BEFORE


def test_what_has_failed_is_not_quoted() -> None:
    failed = report(value=5.0)
    failed["suites"]["products"]["3c3d"] = {"error": "MemoryError: "}
    failed["suites"]["spectra"] = {"mlp": {"error": "TimeoutError: "}}
    assert quote(failed) == quote(report(value=5.0))


def test_other_sizes_have_no_aim() -> None:
    assert [row["aim"] for row in quote(report(num_samples=64))["rows"]] == [None, None]


def test_the_command_writes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoted, "QUOTED", tmp_path / "results.json")
    quoted.QUOTED.write_text(json.dumps(BEFORE))
    paths = [tmp_path / "a.json", tmp_path / "growth.json"]
    paths[0].write_text(json.dumps(report()))
    paths[1].write_text(json.dumps({"curves": []}))
    command.main(["quote", *map(str, paths)])
    assert len(json.loads(quoted.QUOTED.read_text())["rows"]) == 2


def test_the_file_of_the_documentation() -> None:
    """Its rows are ratios that the suites have, with the aims of today."""
    rows = json.loads(quoted.QUOTED.read_text(encoding="utf-8"))["rows"]
    assert rows
    for row in rows:
        suite = SUITES[row["suite"]]
        times = {ratio.label: ratio for ratio in suite.ratios}
        peaks = {f"memory: {ratio.label}": ratio for ratio in suite.memory_ratios}
        ratio = (times | peaks)[row["label"]]
        assert row["net"] in NETS and row["value"] > 0
        assert row["aim"] in (None, ratio.aims.get(row["net"]))
        assert row["at_most"] == ratio.at_most


def drawn_results() -> Any:
    path = Path(__file__).parents[1] / "docs" / "_ext" / "drawn_results.py"
    spec = importlib.util.spec_from_file_location("drawn_results", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROW = {"suite": "s", "label": "a / b", "net": "mlp", "value": 3.0}


@pytest.mark.parametrize(
    ("aim", "at_most", "reached"),
    [(2, False, True), (4, False, False), (4, True, True), (2, True, False)],
)
def test_bars_know_whether_an_aim_is_reached(
    aim: float, at_most: bool, reached: bool
) -> None:
    row = {**ROW, "aim": aim, "at_most": at_most}
    assert drawn_results().reached(row) is reached
    assert drawn_results().reached({**row, "aim": None}) is None


def test_each_suite_has_a_table_with_each_number_once(tmp_path: Path) -> None:
    rows = [
        {**ROW, "aim": 2, "at_most": False},
        {**ROW, "net": "3c3d", "value": 0.51, "aim": None, "at_most": False},
        {**ROW, "label": "c / d", "value": 0.25, "aim": 0.3, "at_most": True},
        {**ROW, "suite": "t", "net": "digits", "aim": None, "at_most": False},
    ]
    lines = drawn_results().table(rows).splitlines()
    assert lines == [
        "| `s` | on `mlp` | on `3c3d` |",
        "| --- | --- | --- |",
        "| a / b | 3 (aim ≥ 2) | 0.51 |",
        "| c / d | 0.25 (aim ≤ 0.3) |  |",
        "",
        "| `t` | on `digits` |",
        "| --- | --- |",
        "| a / b | 3 |",
    ]
    drawn_results().bars(rows, "three", tmp_path / "bars.svg")
    assert "<svg" in (tmp_path / "bars.svg").read_text()
