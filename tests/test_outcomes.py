"""What is kept of a run of the tests, and in which order the next one takes them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import outcomes

pytestmark = pytest.mark.host("text")


def test_what_failed_goes_first_and_what_passed_last(tmp_path: Path) -> None:
    former = tmp_path / "tests.jsonl"
    known = {"a": "passed", "b": "failed", "c": "skipped", "d": "passed"}
    lines = [json.dumps({"test": t, "outcome": what}) for t, what in known.items()]
    former.write_text("\n".join(lines))
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in "adebfc"]
    options = {"--spread": False, "--first": former}
    config: Any = SimpleNamespace(getoption=options.get)
    outcomes.pytest_collection_modifyitems(config, items)
    assert "".join(item.nodeid for item in items) == "befadc"


def test_failures_that_differ_in_numbers_are_one() -> None:
    def failed(test: str, message: str) -> dict[str, Any]:
        return {"test": test, "outcome": "failed", "message": message, "at": "a.py:3"}

    found = outcomes.summary(
        [
            failed("x.py::one", "off by 1.5e-03 at 0x7f00"),
            {"test": "x.py::two", "outcome": "passed"},
            failed("y.py::three", "off by 2 at 0x1a\nand more"),
            failed("y.py::four", "no such key"),
        ]
    )
    assert found["counts"] == {"failed": 3, "passed": 1}
    assert [group["often"] for group in found["failures"]] == [2, 1]
    assert found["failures"][0]["tests"] == ["x.py::one", "y.py::three"]
    assert found["files"] == {"y.py": 2, "x.py": 1}
