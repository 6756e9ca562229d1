"""Every example runs and passes its own checks; those that draw save a picture."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
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

# What most of them import, which takes longer than the rest of some; torch's compiler
# comes with the first optimiser or ``vmap``.
IMPORTS = [
    *("vivit_linop", "matplotlib.pyplot", "sklearn.datasets", "backpack"),
    "torch._dynamo",
]


def run(script: Path, arguments: list[str], folder: Path) -> tuple[int | None, str]:
    """Run ``python script arguments`` in a folder; its exit status and what it writes.

    The process is forked from one that has imported what most scripts do, and has
    computed nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTS, __name__])
    output = folder / "output.txt"
    process = context.Process(target=run_here, args=(script, arguments, folder, output))
    process.start()
    process.join(timeout=600)
    process.kill()
    process.join()
    return process.exitcode, output.read_text()


def run_here(script: Path, arguments: list[str], folder: Path, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(folder)  # it must not depend on where it is run from
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def test_there_are_examples() -> None:
    assert "quickstart.py" in [example.name for example in EXAMPLES]


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("import sys; print(__name__, *sys.argv[1:])", 0, "__main__ a b"),
        ("assert 1 == 2, 'no'", 1, "AssertionError: no"),
        ("raise SystemExit(3)", 3, ""),
        ("import os; os.abort()", -6, ""),
    ],
)
def test_how_a_script_ends_is_seen(
    code: str, status: int, last: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    found, written = run(script, ["a", "b"], tmp_path)
    assert found == status and written.strip().endswith(last), written


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_runs_and_saves_its_picture(example: Path, tmp_path: Path) -> None:
    draws = "--output" in example.read_text()
    arguments = ["--output", str(tmp_path)] * draws
    status, written = run(example, arguments, tmp_path)
    assert status == 0, written
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
