"""Tests and benchmarks on a device, in one call: python -m benchmarks.gpu.

Writes what became of each test and what was measured to a folder, and prints a table.
``--minutes`` is divided: the tests first, then suites, what matters most first. What
fails or takes too long is a row with its reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import (
    at_most,
    environment,
    in_full_precision,
    in_turns,
    prepare,
)
from benchmarks.problems import make_problem

ROOT = Path(__file__).parents[1]
# Seconds that pytest gets to end after it was told to.
ENDING = 20.0
# Bytes that are kept of what pytest prints.
LOG = 400_000
# Of the minutes, what tests get where suites run too.
TESTS_SHARE = 0.4
# Of a suite's part of the time, what its rounds get; set-ups have the rest.
ROUNDS_SHARE = 0.4
# Rounds at most, and the shortest part of a suite, in seconds.
ROUNDS, SHORTEST = 20, 4.0
# Suite, net and N (None for the net's own), what matters most first.
PLAN: list[tuple[str, str, int | None]] = [
    ("products", "mlp", None),
    ("products", "3c3d", 512),
    ("spectra", "mlp", None),
    ("spectra", "3c3d", 128),
    ("routes", "3c3d", 512),
    ("quantities", "3c3d", 512),
    ("inverses", "mlp", None),
    ("products", "resnet32", 512),
    ("products", "transformer", 512),
    ("products", "3c3d", 2048),
    ("vivit", "3c3d", 64),
    ("compositions", "mlp", 128),
    ("certificates", "3c3d", 512),
    ("vivit", "mlp", 64),
    ("spectra", "resnet32", 64),
    ("spectra", "transformer", 128),
    ("directions", "mlp", None),
    ("routes", "mlp", None),
]
SMALL_PLAN: list[tuple[str, str, int | None]] = [
    ("products", "tiny", None),
    ("routes", "tiny", None),
    ("products", "transformer", 4),
]
STREAMED = 600, 3_000


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60.0 * options.minutes
    if not options.suites_only:
        share = 1.0 if options.tests_only else TESTS_SHARE
        print_tests(run_tests(options, options.minutes * share))
    if not options.tests_only:
        Benchmarks(options, end).run()


# Tests -------------------------------------------------------------------------------


def run_tests(options: argparse.Namespace, minutes: float) -> dict[str, Any]:
    """Run pytest on the device for so many minutes at most; returns its summary."""
    lines = options.out / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.outcomes", "--outcomes", str(lines.resolve()), "--spread"]
    command += ["--device", options.device, "-n", str(options.processes)]
    command += ["--tb=short", "--continue-on-collection-errors"]
    if options.first is not None:
        command += ["--first", str(options.first.resolve())]
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
        ended = waited_for(run, 60.0 * minutes)
    log_file = options.out / "tests.log"
    log_file.write_bytes(log_file.read_bytes()[-LOG:])
    from tests.outcomes import summary

    written = lines.read_text().splitlines() if lines.exists() else []
    found = summary(json.loads(line) for line in written)
    found["seconds"] = round(time.perf_counter() - start, 1)
    found["ended"] = "all" if ended else f"stopped after {minutes:.1f} minutes"
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
    print(f"{found['ended']}, {found['seconds']} s", flush=True)


# Suites ------------------------------------------------------------------------------


class Benchmarks:
    """Runs the suites, keeps what was measured, and writes it after each.

    Args:
        options: Those of the command.
        end: When time is over, by ``time.perf_counter()``.
    """

    def __init__(self, options: argparse.Namespace, end: float) -> None:
        self.options, self.end = options, end
        self.device = torch.device(options.device)
        if self.device.type == "cuda":
            in_full_precision()
        self.lines: list[str] = []
        self.report: dict[str, Any] = {
            "environment": environment(self.device),
            "suites": [],
        }

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def run(self) -> None:
        plan = SMALL_PLAN if self.options.small else PLAN
        facts = self.report["environment"]
        self.say(", ".join(f"{name} {value}" for name, value in facts.items()))
        self.say(
            f"\n{'milliseconds':46}{'fastest':>10}{'median':>10}{'first':>10}"
            f"{'peak':>12}"
        )
        others: list[tuple[str, Callable[[], Any]]] = [
            ("waits", self.waits),
            ("calibration", self.calibration),
            ("streaming", self.streaming),
        ]
        only = tuple(self.options.only)
        if only:
            plan = [of for of in plan if title(*of).startswith(only)]
            others = [of for of in others if of[0].startswith(only)]
        parts = len(plan) + len(others)
        # Peers differentiate attention in forward mode, which fused kernels lack.
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            for number, (suite, net, samples) in enumerate(plan):
                self.suite(suite, net, samples, self.left / (parts - number))
                self.write()
        for number, (name, measure) in enumerate(others):
            with contextlib.suppress(TimeoutError):
                self.other(name, measure, self.left / (len(others) - number))
            self.write()
        self.say(f"\n{self.left:.0f} s left")
        self.write()

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def write(self) -> None:
        out = self.options.out
        (out / "gpu.json").write_text(json.dumps(self.report, indent=1, default=str))
        (out / "gpu.txt").write_text("\n".join(self.lines) + "\n")

    def other(self, name: str, measure: Callable[[], Any], seconds: float) -> None:
        """One of the measurements that are no suites."""
        self.say(f"\n{name}")
        if seconds < SHORTEST:
            self.say("not run: no time left")
            self.report[name] = {"error": "no time left"}
            return
        try:
            with at_most(seconds):
                self.report[name] = measure()
        except Exception as error:
            self.report[name] = {"error": f"{type(error).__name__}: {error}"}
            self.say(f"failed: {type(error).__name__}: {error}"[:200])

    def suite(
        self, suite_name: str, net: str, samples: int | None, share: float
    ) -> None:
        """Time the cases of a suite on a net, in so many seconds."""
        from benchmarks.__main__ import SUITES, agreement_of

        suite = SUITES[suite_name]
        self.say(f"\n{title(suite_name, net, samples)}")
        row: dict[str, Any] = {"suite": suite_name, "net": net, "samples": samples}
        self.report["suites"].append(row)
        if share < SHORTEST:
            self.say("not run: no time left")
            row["error"] = "no time left"
            return
        start = time.perf_counter()
        try:
            problem = make_problem(net, self.options.device, samples)
            limit = share / max(1, len(suite.cases)) * 3
            prepared = prepare(
                suite, problem, guard=lambda: at_most(min(limit, self.left))
            )
            row["agreement"] = agreement_of(suite, problem, prepared.results)
            prepared.results.clear()
            budget = min(
                max(share * ROUNDS_SHARE, share - (time.perf_counter() - start)),
                self.left,
            )
            with at_most(3 * budget + 5.0):
                times = in_turns(prepared.runs, self.device, ROUNDS, budget / 3)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            self.say(f"failed: {row['error']}"[:200])
            return
        row |= {
            "num_params": problem.num_params,
            "num_samples": problem.num_samples,
            "seconds": times,
            "first_seconds": prepared.first,
            "peak_bytes": prepared.peak,
            "unavailable": prepared.unavailable,
        }
        for name in suite.cases:
            self.say(case_line(name, times, prepared))
        for label, distance in row["agreement"].items():
            self.say(f"    {label[:60]:60}{distance:8.1e}")
        row["ratios"] = {}
        for ratio in suite.ratios:
            if ratio.of(times) and times[ratio.numerator] and times[ratio.denominator]:
                value = min(times[ratio.numerator]) / min(times[ratio.denominator])
                row["ratios"][ratio.label] = value
                self.say(f"    {ratio.label:60}{value:8.2f}")

    def waits(self) -> Any:
        """How often the host waits for the device, beside what the rehearsal allows."""
        from benchmarks import syncs

        if self.device.type != "cuda":
            raise RuntimeError("only CUDA counts them")
        rows = syncs.count_all(self.device)
        of_all: dict[str, list[Any]] = {}
        for row in rows:
            of_all.setdefault(str(row["operation"]), []).append(row)
        for operation, of in of_all.items():
            counts = [r["counted"] for r in of if r["counted"] is not None]
            errors = [r["error"] for r in of if r["error"]]
            self.say(
                f"{operation:46}{max(counts, default=-1):10}{of[0]['limit']:10}"
                + ("  grew" if any(r["grew"] for r in of) else "")
                + (f"  {errors[0][:60]}" if errors else "")
            )
            for of_net in (row for row in of if row["grew"]):
                self.say(f"    {of_net['net']}: {of_net['places']}")
        return rows

    def calibration(self) -> Any:
        """What ``vl.calibrate`` measures, beside what is assumed."""
        import vivit_linop as vl

        assumed = vl.DeviceCosts.default(self.device)
        try:
            measured = vl.calibrate(self.device)
        finally:
            assumed.use(self.device)
        for name, value in asdict(assumed).items():
            found = asdict(measured)[name]
            self.say(f"{name:20}assumed {value!s:>24}   measured {found!s:>24}")
        return {"assumed": asdict(assumed), "measured": asdict(measured)}

    def streaming(self) -> Any:
        """Peaks of memory and times for two sizes of streamed data."""
        from benchmarks import streaming

        sizes = (20, 40) if self.options.small else STREAMED
        found = {size: streaming.stream(size, str(self.device)) for size in sizes}
        for size, each in found.items():
            beyond = (each["peak_bytes"] - each["nothing_bytes"]) / 2**20
            self.say(
                f"N = {size}: {beyond:.0f} MiB beyond nothing, "
                + ", ".join(f"{k} {1e3 * s:.0f} ms" for k, s in each["seconds"].items())
            )
        return found


def title(suite: str, net: str, samples: int | None) -> str:
    return f"{suite}, {net}" + (f", N = {samples}" if samples else "")


def case_line(name: str, times: dict[str, list[float]], prepared: Any) -> str:
    if name in prepared.unavailable:
        return f"{name:46}not run: {prepared.unavailable[name]}"[:150]
    if not times.get(name):
        return f"{name:46}{'':20}{1e3 * prepared.first[name]:10.2f}"
    values = times[name]
    numbers = min(values), statistics.median(values), prepared.first[name]
    peak = prepared.peak.get(name)
    return (
        f"{name:46}"
        + "".join(f"{1e3 * s:10.2f}" for s in numbers)
        + (f"{peak / 2**20:8.0f} MiB" if peak is not None else "")
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu")
    parser.add_argument("--tests-only", action="store_true", help="no benchmarks")
    parser.add_argument("--suites-only", action="store_true", help="no tests")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="a suite by the beginning of its title, as 'spectra, 3c3d'; several times",
    )
    parser.add_argument("--small", action="store_true", help="nets for tests")
    parser.add_argument("--minutes", type=float, default=7.5, help="of all")
    parser.add_argument("--processes", type=int, default=14, help="of the tests")
    parser.add_argument("--each", type=float, default=60.0, help="seconds of a test")
    parser.add_argument(
        "--first",
        type=Path,
        help="tests.jsonl of former runs: what failed goes first, what passed last",
    )
    parser.add_argument("tests", nargs="*", help="files, by default all; or -k words")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
