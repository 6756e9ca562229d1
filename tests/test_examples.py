"""Every example runs and passes its own checks; those that draw save a picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host("processes of their own")

ROOT = Path(__file__).parents[1]
# What begins with "_" is shared by examples. Others need a large package and weights;
# `make examples` runs them.
LARGE = {"minilm.py", "gpt2.py"}
EXAMPLES = sorted(
    path for path in (ROOT / "examples").glob("[!_]*.py") if path.name not in LARGE
)


def test_there_are_examples() -> None:
    assert "quickstart.py" in [example.name for example in EXAMPLES]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_runs_and_saves_its_picture(example: Path, tmp_path: Path) -> None:
    draws = "--output" in example.read_text()
    finished = subprocess.run(
        [sys.executable, str(example), *(["--output", str(tmp_path)] * draws)],
        cwd=tmp_path,  # it must not depend on where it is run from
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    pictures = list(tmp_path.glob("**/*.png"))
    assert bool(pictures) == draws
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
