"""Times, peak memory and the description of the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Problem

Run = Callable[[], Any]
Build = Callable[[Problem], Run]
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """How many times as long one case takes as another, and what is aimed at."""

    label: str
    numerator: str
    denominator: str
    target: str = ""


@dataclass(frozen=True)
class Suite:
    """Cases that are timed together, and what is read off their times.

    ``same`` are pairs of cases whose results should be equal; their difference is
    printed.
    """

    title: str
    cases: Mapping[str, Build]
    ratios: list[Ratio] = field(default_factory=list)
    same: list[tuple[str, str]] = field(default_factory=list)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def set_up(
    cases: Mapping[str, Build], problem: Problem
) -> tuple[dict[str, Run], dict[str, Any], dict[str, float]]:
    """Build all cases and run each once; return the runs, results and set-up times.

    The time of set-up is that of building a case and of its first run: what is made
    once and kept is made there. Each case is built twice, so that the imports and
    caches of the first time are not counted.
    """
    runs, results, times = {}, {}, {}
    for name, build in cases.items():
        build(problem)()

        def first_run(name: str = name, build: Build = build) -> Any:
            runs[name] = build(problem)
            return runs[name]()

        results[name], times[name] = seconds(first_run, problem.device)
    return runs, results, times


def in_turns(
    runs: Mapping[str, Run], device: torch.device, rounds: int, budget: float
) -> Seconds:
    """Time all runs once a round, so that drifts of the machine meet all of them.

    Every other round goes backwards. Ends before ``rounds`` when ``budget`` seconds are
    over, but not before three rounds.
    """
    times: Seconds = {name: [] for name in runs}
    start = time.perf_counter()
    for count in range(rounds):
        if count >= 3 and time.perf_counter() - start > budget:
            break
        order = list(runs.items())
        for name, run in order if count % 2 == 0 else reversed(order):
            times[name].append(seconds(run, device)[1])
    return times


def median_ratio(times: Seconds, ratio: Ratio) -> float:
    """The median over the rounds' own ratios."""
    pairs = zip(times[ratio.numerator], times[ratio.denominator], strict=True)
    return statistics.median(a / b for a, b in pairs)


def difference(value: Tensor, reference: Tensor) -> float:
    """The relative error in the norm."""
    return float((value - reference).norm() / reference.norm())


# Memory ------------------------------------------------------------------------------


def peak_memory(build: Build | None, problem: Problem) -> int:
    """Build a case, run it twice and return this process's peak of memory in bytes.

    Without a case, that of the libraries, the net and the data. On the CPU it is the
    peak of the resident memory, on CUDA that of what torch has allocated.
    """
    if problem.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(problem.device)
    if build is not None:
        run = build(problem)
        run()
        run()
    if problem.device.type == "cuda":
        return torch.cuda.max_memory_allocated(problem.device)
    return peak_resident_memory()


def peak_resident_memory() -> int:
    # On Linux, ru_maxrss of a process begins with that of the process that started it.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory_in_subprocess(arguments: list[str]) -> int:
    """Run ``python -m benchmarks`` with these arguments; it prints the bytes."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}:\n{finished.stderr}")
    return int(json.loads(finished.stdout.splitlines()[-1])["peak_bytes"])


# The machine -------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    packages = (
        "vivit-linop",
        "curvlinops-for-pytorch",
        "torch",
        "scipy",
        "numpy",
    )
    facts: dict[str, Any] = {
        "device": str(device),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["tf32 in convolutions"] = torch.backends.cudnn.allow_tf32
        facts["tf32 in products"] = torch.backends.cuda.matmul.allow_tf32
    return facts
