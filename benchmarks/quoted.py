"""What the documentation quotes: ``python -m benchmarks quote``.

Reads the reports in ``benchmarks/results`` and writes the ratios of the newest
measurement of each suite and net, with their aims, to ``docs/results.json``. What no
report has stays as it is there. The documentation's build draws that file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Ratio, Suite
from benchmarks.problems import NETS

RESULTS = Path(__file__).parent / "results"
QUOTED = Path(__file__).parents[1] / "docs" / "results.json"
# Rounds at least, of a report that is quoted; --quick makes fewer.
_ROUNDS = 3
# What a machine is quoted by.
_FACTS = ("processor", "cores", "torch threads", "torch", "gpu")


@dataclass(frozen=True)
class Row:
    """One ratio that is quoted.

    Attributes:
        suite: The suite.
        label: The name of the ratio.
        net: What it was measured on.
        value: The median over rounds, or the ratio of two peaks of memory.
        aim: What was aimed at, if anything.
        at_most: Whether smaller is better.
    """

    suite: str
    label: str
    net: str
    value: float
    aim: float | None
    at_most: bool


def rows_of(
    name: str, suite: Suite, net: str, measured: Mapping[str, Any]
) -> list[Row]:
    """The rows of one suite on one net."""
    usual = suite.nets.get(net) or NETS[net].num_samples

    def row(ratio: Ratio, values: Mapping[str, float], label: str) -> Row:
        # What is aimed at is said of the default sizes.
        aim = ratio.aims.get(net) if measured["num_samples"] == usual else None
        value = float(f"{values[ratio.label]:.3g}")
        return Row(name, label, net, value, aim, ratio.at_most)

    times, memory = measured["median_ratios"], measured["memory_ratios"]
    rows = [row(r, times, r.label) for r in suite.ratios if r.label in times]
    rows += [
        row(r, memory, f"memory: {r.label}")
        for r in suite.memory_ratios
        if r.label in memory
    ]
    return rows


def quote(
    suites: Mapping[str, Suite], reports: Sequence[Mapping[str, Any]], before: Any
) -> dict[str, Any]:
    """Return what is quoted: of these reports, and else what was before.

    Args:
        suites: All suites, by name.
        reports: What the benchmarks have written, the oldest first.
        before: What was quoted before.
    """
    machine, rows = before["machine"], {}
    for row in before["rows"]:
        rows.setdefault((row["suite"], row["net"]), []).append(row)
    for report in reports:
        for name, nets in report["suites"].items():
            for net, measured in nets.items():
                # What has failed as a whole has an error and no times.
                times = measured.get("seconds", {})
                rounds = max(map(len, times.values()), default=0)
                if name not in suites or net not in NETS or rounds < _ROUNDS:
                    continue
                found = rows_of(name, suites[name], net, measured)
                rows[name, net] = [asdict(row) for row in found]
                facts = report["environment"]
                machine = {fact: facts[fact] for fact in _FACTS if fact in facts}
    order = list(suites)
    keys = sorted(rows, key=lambda key: order.index(key[0]))
    return {"machine": machine, "rows": [row for key in keys for row in rows[key]]}


def main(suites: Mapping[str, Suite], arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quote", description=__doc__
    )
    parser.add_argument(
        "reports", nargs="*", type=Path, help="by default all in benchmarks/results"
    )
    paths = parser.parse_args(arguments).reports or sorted(
        RESULTS.glob("*.json"), key=lambda path: path.stat().st_mtime
    )
    reports = [json.loads(path.read_text()) for path in paths]
    before = json.loads(QUOTED.read_text())
    after = quote(suites, [r for r in reports if "suites" in r], before)
    QUOTED.write_text(json.dumps(after, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(after['rows'])} rows in {QUOTED.name}.")
