"""Run the tests on the lowest and the newest versions, on each Python that is there.

    make matrix ARGS="tests/test_operators.py -x"

Every combination has an environment of its own in build/matrix, made once. The lowest
versions stand in tests/lowest.txt, the newest are what pip takes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ["python3.11", "python3.12", "python3.13"]
VERSIONS = {"lowest": ["-c", str(ROOT / "tests" / "lowest.txt")], "newest": []}


def runs(python: str) -> bool:
    """Whether there is this interpreter; pyenv's shims stand for some that are not."""
    found = shutil.which(python)
    return (
        bool(found)
        and not subprocess.run([python, "-V"], capture_output=True).returncode
    )


def environment(python: str, versions: str) -> Path:
    """The interpreter of an environment with the package and what its tests need."""
    folder = ROOT / "build" / "matrix" / f"{python}-{versions}"
    made = folder / "made"
    interpreter = folder / "bin" / "python"
    if not made.exists():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        install = [interpreter, "-m", "pip", "install", "-q", *VERSIONS[versions]]
        subprocess.run([*install, "torch"], check=True)
        subprocess.run([*install, "-e", f"{ROOT}[test]"], check=True)
        made.touch()
    return interpreter


def main() -> None:
    found = [python for python in PYTHONS if runs(python)]
    failed = []
    for python in found:
        for versions in VERSIONS:
            print(f"== {python}, {versions} versions", flush=True)
            command = [environment(python, versions), "-m", "pytest", "-q", "-n", "2"]
            if subprocess.run([*command, *sys.argv[1:]], cwd=ROOT).returncode:
                failed.append(f"{python}, {versions}")
    print("failed:", "; ".join(failed) or "none", "of", len(found) * len(VERSIONS))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
