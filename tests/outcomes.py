"""What became of each test, one JSON line each: -p tests.outcomes --outcomes FILE.

The lines are written as tests end, so that they are there too where the run is ended.
:func:`summary` groups the failures by what they say.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

# Of the last lines of a failure, which the first few of a kind have.
LINES, WIDTH, FEW = 25, 200, 3
# What differs between failures that are one: numbers, and what has addresses.
_CHANGING = re.compile(r"0x[0-9a-f]+|[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="a file for the lines")
    parser.addoption(
        "--first",
        type=Path,
        help="such a file of former runs: what failed goes first, what passed last",
    )
    parser.addoption(
        "--spread",
        action="store_true",
        help="take tests from all files alike, for a run that may be stopped",
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("--spread"):
        items.sort(key=lambda item: crc32(item.nodeid.encode()))
    former = config.getoption("--first")
    if former is not None:
        lines = map(json.loads, former.read_text().splitlines())
        failed = {line["test"]: line["outcome"] == "failed" for line in lines}
        order = {True: 0, None: 1, False: 2}
        items.sort(key=lambda item: order[failed.get(item.nodeid)])


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--outcomes")
    if file is not None and not hasattr(config, "workerinput"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        config.pluginmanager.register(Outcomes(file))


class Outcomes:
    """Writes the lines."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kinds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome == "passed" and report.when != "call":
            return
        self._write(report, report.nodeid, seconds=round(report.duration, 3))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, report.nodeid or "collection", seconds=0.0)

    def _write(self, report: Any, test: str, seconds: float) -> None:
        line = {"test": test, "outcome": report.outcome, "seconds": seconds}
        if report.outcome == "failed":
            lines = str(report.longrepr).splitlines()
            crash = getattr(report.longrepr, "reprcrash", None)
            line["message"] = (crash.message if crash else "\n".join(lines[-1:]))[:500]
            line["at"] = f"{Path(crash.path).name}:{crash.lineno}" if crash else ""
            self._kinds[kind(line)] += 1
            shown = lines[-LINES:] if self._kinds[kind(line)] <= FEW else []
            line["lines"] = [text[:WIDTH] for text in shown]
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            line["message"] = report.longrepr[-1]
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def kind(failure: dict[str, Any]) -> str:
    """What failures have in common that are one."""
    said = (failure["message"].splitlines() or [""])[0]
    return f"{failure['at']} {_CHANGING.sub('#', said)}"


def summary(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the failures by what they say, the most frequent first."""
    counts: Counter[str] = Counter()
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    files: Counter[str] = Counter()
    for line in lines:
        counts[line["outcome"]] += 1
        if line["outcome"] == "failed":
            groups[kind(line)].append(line)
            files[line["test"].split("::")[0]] += 1
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return {
        "counts": dict(counts),
        "files": dict(files.most_common()),
        "failures": [
            {
                "often": len(group),
                "says": says,
                "tests": [line["test"] for line in group],
                "first": group[0],
            }
            for says, group in ordered
        ],
    }
