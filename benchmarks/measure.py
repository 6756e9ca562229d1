"""Times, peak memory and the description of the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.problems import Problem, Unavailable

Run = Callable[[], Any]
Build = Callable[[Problem], Run]
Seconds = dict[str, list[float]]
Results = Mapping[str, Any]

# Seconds that one measurement takes at least.
SHORT = 5e-3


@dataclass(frozen=True)
class Ratio:
    """How many times as much one case takes as another, and what is aimed at.

    Attributes:
        label: What is printed.
        numerator: The name of a case.
        denominator: That of another.
        aims: The number aimed at, for the nets that have one.
        at_most: Whether the ratio should be smaller than that.
    """

    label: str
    numerator: str
    denominator: str
    aims: Mapping[str, float] = field(default_factory=dict)
    at_most: bool = False

    def of(self, values: Mapping[str, Any]) -> bool:
        """Whether both cases are among those measured."""
        return self.numerator in values and self.denominator in values

    def verdict(self, net: str, value: float) -> str:
        """What is aimed at, and whether it is reached."""
        if net not in self.aims:
            return ""
        aim = self.aims[net]
        reached = value <= aim if self.at_most else value >= aim
        return f"{'≤' if self.at_most else '≥'} {aim:g} {'yes' if reached else 'no'}"


@dataclass(frozen=True)
class Suite:
    """Cases that are timed together, and what is read off their times.

    Attributes:
        title: What is printed above the tables.
        cases: What is timed, by name. A case takes a problem, sets up and returns the
            function to time; it raises :class:`Unavailable` where it cannot run.
        nets: The nets, and N where it is not the net's own.
        ratios: Of times.
        memory_ratios: Of peaks of memory.
        agreement: A function of the problem and the cases' results that says, by
            name, how far these are apart.
        from_scratch: Whether what is timed begins with the net and the data. If not,
            what a case makes once and keeps is made outside, in its set-up.
        iterations: A function of the cases' results that says how many iterations
            each has taken, for suites of iterative methods.
    """

    title: str
    cases: Mapping[str, Build]
    nets: Mapping[str, int | None]
    ratios: list[Ratio] = field(default_factory=list)
    memory_ratios: list[Ratio] = field(default_factory=list)
    agreement: Callable[[Problem, Results], dict[str, float]] = lambda *_: {}
    from_scratch: bool = False
    iterations: Callable[[Results], dict[str, int]] = lambda _: {}


# Times -------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def mean_seconds(run: Run, device: torch.device) -> float:
    """Time a run; one that is over at once as often as fills some milliseconds.

    Alone, it would mostly measure how the case before has left the processor's caches.
    """
    total, count = 0.0, 0
    while total < SHORT:
        total, count = total + seconds(run, device)[1], count + 1
    return total / count


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise a ``TimeoutError`` in what takes longer, as soon as Python runs again."""
    if seconds == math.inf:
        yield
        return

    def over(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Prepared:
    """Cases that have run once.

    Attributes:
        runs: What is timed.
        results: What the first runs returned.
        first: Their seconds. With a set-up these are of the set-up and the first run,
            what is made once and kept is made there.
        peak: Bytes that were allocated in these runs on a GPU, beyond those before.
        unavailable: Why the other cases cannot run, or what they raised.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


Guard = Callable[[], contextlib.AbstractContextManager[object]]


def prepare(
    suite: Suite, problem: Problem, guard: Guard = contextlib.nullcontext
) -> Prepared:
    """Build all cases and run each once; what fails is said, and the others go on.

    Args:
        suite: The suite.
        problem: The problem.
        guard: Makes a context for each case, which may raise an error to end it.
    """
    prepared = Prepared()
    for name, build in suite.cases.items():
        try:
            with guard():
                _prepare_case(prepared, name, build, suite, problem)
        except Unavailable as reason:
            prepared.unavailable[name] = str(reason)
        except Exception as error:
            prepared.runs.pop(name, None)
            prepared.unavailable[name] = f"{type(error).__name__}: {error}"
            if problem.device.type == "cuda":
                torch.cuda.empty_cache()
    return prepared


def _prepare_case(
    prepared: Prepared, name: str, build: Build, suite: Suite, problem: Problem
) -> None:
    if not suite.from_scratch:
        # Imports and caches of the first time are not part of the set-up.
        build(problem)()

    def first_run() -> Any:
        prepared.runs[name] = build(problem)
        return prepared.runs[name]()

    on_gpu = problem.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(problem.device)
        before = torch.cuda.memory_allocated(problem.device)
    result, prepared.first[name] = seconds(first_run, problem.device)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(problem.device)
        prepared.peak[name] = peak - before
    prepared.results[name] = result


def in_turns(
    runs: Mapping[str, Run], device: torch.device, rounds: int, budget: float
) -> Seconds:
    """Time all runs once a round, so that drifts of the machine meet all of them.

    Every other round goes backwards. Ends before ``rounds`` when ``budget`` seconds are
    over, but not before three rounds unless these take three times as long. What
    fails in a round has no times.
    """
    times: Seconds = {name: [] for name in runs}
    start = time.perf_counter()
    for count in range(rounds):
        elapsed = time.perf_counter() - start
        if elapsed > (budget if count >= 3 else 3 * budget):
            break
        order = list(runs.items())
        for name, run in order if count % 2 == 0 else reversed(order):
            if name not in times:
                continue
            try:
                times[name].append(mean_seconds(run, device))
            except TimeoutError:
                raise
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}")
                del times[name]
    return times


@contextlib.contextmanager
def shared_cores(processes: int) -> Iterator[None]:
    """Let processes beside this one do nothing but take time on the cores."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def load() -> float:
    """How many processes have been running or waiting in the last minute."""
    return round(os.getloadavg()[0], 2)


def median_ratio(times: Seconds, ratio: Ratio) -> float:
    """The median over the rounds' own ratios."""
    pairs = zip(times[ratio.numerator], times[ratio.denominator], strict=True)
    return statistics.median(a / b for a, b in pairs)


# Agreement ---------------------------------------------------------------------------


def difference(value: Tensor, reference: Tensor) -> float:
    """The relative error in the norm."""
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm())


def differences(
    *pairs: tuple[str, str], by: Callable[[Any, Any], float] = difference
) -> Callable[[Problem, Results], dict[str, float]]:
    """Return an ``agreement`` that compares pairs of cases."""

    def agreement(problem: Problem, results: Results) -> dict[str, float]:
        return {
            f"{a} | {b}": by(results[a], results[b])
            for a, b in pairs
            if a in results and b in results
        }

    return agreement


# Memory ------------------------------------------------------------------------------


def peak_memory(build: Build | None, problem: Problem, runs: int = 1) -> int:
    """Build a case, run it and return this process's peak of memory in bytes.

    Without a case, that of the libraries, the net and the data. On the CPU it is the
    peak of the resident memory, on CUDA that of what torch has allocated.
    """
    if problem.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(problem.device)
    if build is not None:
        run = build(problem)
        for _ in range(runs):
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


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak_memory_in_subprocess(module: str, arguments: list[str]) -> int:
    """Run ``python -m module`` with these arguments; it prints the bytes."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}:\n{finished.stderr}")
    return int(json.loads(finished.stdout.splitlines()[-1])["peak_bytes"])


# The machine -------------------------------------------------------------------------


PACKAGES = (
    "vivit-linop",
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
    "vivit-for-pytorch",
    "torch",
    "scipy",
    "numpy",
)


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.+)", cpuinfo.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def product_speed(device: torch.device, size: int = 1024) -> float:
    """The best of ten float32 matrix products, in GFLOP/s."""
    A = torch.randn(size, size, device=device)
    best = min(seconds(lambda: A @ A, device)[1] for _ in range(10))
    return 2e-9 * size**3 / best


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    facts: dict[str, Any] = {
        "device": str(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load": load(),
        "float32 product, GFLOP/s": round(product_speed(device)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def in_full_precision() -> None:
    """Turn off TF32, torch's default for convolutions on a GPU, for peers too."""
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # since torch 2.9
        for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
            part.fp32_precision = "ieee"
    else:
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = False
