"""Every example runs and passes its own checks; those that draw save a picture."""

from __future__ import annotations

import re
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


def test_examples_have_cells_and_a_picture_for_the_gallery() -> None:
    for path in (ROOT / "examples").glob("[!_]*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n# %%\n") >= 2, path.name
        assert "plt." in text or ".plot(" in text, path.name
        thumbnail = re.search(r'sphinx_gallery_thumbnail_path = "(.+)"', text)
        assert (thumbnail is not None) == (path.name in LARGE), path.name
        if thumbnail:
            assert (ROOT / "docs" / thumbnail[1]).exists()
