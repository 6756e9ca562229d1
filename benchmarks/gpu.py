"""Tests and benchmarks on a device, in one call: python -m benchmarks.gpu.

Writes what became of each test and what was measured to a folder, and prints a short
table last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# Seconds that pytest gets to end after it was told to.
ENDING = 20.0
# Bytes that are kept of what pytest prints.
LOG = 400_000


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    print_tests(run_tests(options))


def run_tests(options: argparse.Namespace) -> dict[str, Any]:
    """Run pytest on the device for so many minutes at most; returns its summary."""
    lines = options.out / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.outcomes", "--outcomes", str(lines.resolve()), "--spread"]
    command += ["--device", options.device, "-n", str(options.processes)]
    command += ["--tb=short", "--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(options.each)]
    command += options.tests
    start = time.perf_counter()
    with (options.out / "tests.log").open("w") as log:
        run = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
            start_new_session=True,  # its workers are ended with it
        )
        ended = waited_for(run, 60.0 * options.minutes)
    log_file = options.out / "tests.log"
    log_file.write_bytes(log_file.read_bytes()[-LOG:])
    from tests.outcomes import summary

    written = lines.read_text().splitlines() if lines.exists() else []
    found = summary(json.loads(line) for line in written)
    found["seconds"] = round(time.perf_counter() - start, 1)
    found["ended"] = "all" if ended else f"stopped after {options.minutes:g} minutes"
    found["device"] = device_name(options.device)
    found["torch"] = torch.__version__
    (options.out / "tests.json").write_text(json.dumps(found, indent=1))
    return found


def waited_for(run: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ended by itself; else it is asked to, and then made to."""
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGINT)
        try:
            run.wait(ENDING)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return False
    return True


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return device


def print_tests(found: dict[str, Any], failures: int = 40, lines: int = 6) -> None:
    """The failures by what they say, then the counts."""
    for group in found["failures"][:failures]:
        print(f"\n{group['often']:5} × {group['says'][:160]}")
        print(f"        {group['first']['test'][:150]}")
        for line in group["first"]["lines"][-lines:]:
            print(f"        | {line[:150]}")
    print("\nfailed, by file")
    for file, often in found["files"].items():
        print(f"{often:5} {file}")
    counts = ", ".join(f"{often} {what}" for what, often in found["counts"].items())
    print(f"\ntests on {found['device']}, torch {found['torch']}: {counts or 'none'}")
    print(f"{found['ended']}, {found['seconds']} s")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu")
    parser.add_argument("--tests-only", action="store_true", help="no benchmarks")
    parser.add_argument("--minutes", type=float, default=4.0, help="of the tests")
    parser.add_argument("--processes", type=int, default=14, help="of the tests")
    parser.add_argument("--each", type=float, default=60.0, help="seconds of a test")
    parser.add_argument("tests", nargs="*", help="files, by default all; or -k words")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
