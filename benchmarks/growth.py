"""How time and memory grow: ``python -m benchmarks.growth``.

- A product with G, against N and against D (widths of the MLP): both linear.
- The Gram matrix, against its side N·R: quadratic in time, and in memory beyond a
  working memory that is bounded by a budget (``memory=``, here 64 MiB). The peak of a
  single sample (libraries, net, what is loaded at first use) is taken off.

Exponents are slopes of straight lines through the logarithms of the larger half of the
points; the smaller ones show what each call costs at least. Prints them, and writes a
picture and JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vivit_linop as vl
from benchmarks.measure import (
    Run,
    environment,
    in_turns,
    peak_memory,
    peak_memory_in_subprocess,
)
from benchmarks.problems import Problem, make_problem, mlp

RESULTS = Path(__file__).parent / "results"
BUDGET = 2**26  # bytes

SAMPLES = {"mlp": [32, 64, 128, 256, 512, 1024]}
WIDTHS = [256, 512, 1024, 2048, 4096]
GRAM_SAMPLES = {"mlp": [64, 128, 256, 512, 1024], "3c3d": [8, 16, 32, 64, 128]}
QUICK_SAMPLES = {"mlp": [32, 64, 128]}
QUICK_WIDTHS = [256, 512, 1024]
QUICK_GRAM_SAMPLES = {"mlp": [32, 64, 128], "3c3d": [4, 8, 16]}
# On a GPU, smaller ones take no longer than their calls.
GPU_SAMPLES = {"mlp": [2048, 4096, 8192, 16384, 32768, 65536]}
GPU_WIDTHS = [1024, 2048, 4096, 8192, 16384]
GPU_GRAM_SAMPLES = {"mlp": [256, 512, 1024, 2048], "3c3d": [128, 256, 512, 1024]}


@dataclass
class Curve:
    """What was measured along one axis.

    Attributes:
        label: What grows.
        axis: With what.
        unit: Of the values.
        expected: The exponent that the operation count gives.
        points: Values by position on the axis.
    """

    label: str
    axis: str
    unit: str
    expected: float
    points: dict[int, float] = field(default_factory=dict)

    @property
    def exponent(self) -> float:
        """The slope in logarithms, over the larger half of the points."""
        positions = sorted(self.points)
        larger = positions[-max(2, math.ceil(len(positions) / 2)) :]
        values = [self.points[position] for position in larger]
        return float(np.polyfit(np.log(larger), np.log(values), 1)[0])


def product(problem: Problem) -> Run:
    G = vl.GGN(problem.model, problem.loss, problem.data)
    x = problem.columns(1).squeeze(1)
    return lambda: G @ x


def gram(problem: Problem) -> Run:
    risk = vl.EmpiricalRisk(problem.model, problem.loss, problem.data, memory=BUDGET)

    def run() -> torch.Tensor:
        V = vl.GGNFactor(risk)  # a new one: it keeps its Gram matrix
        return V.gram.matrix

    return run


def wide_mlp(width: int, device: str) -> Problem:
    """The MLP 784-w-w/2-10."""
    problem = make_problem("mlp", device)
    torch.manual_seed(0)
    model = mlp(10, (width, width // 2)).eval().to(device)
    return Problem(f"mlp, width {width}", model, nn.CrossEntropyLoss(), problem.data)


def side(problem: Problem) -> int:
    """N·R of the Gram matrix of cross-entropy."""
    return problem.num_samples * (problem.num_classes - 1)


def timed(curve: Curve, runs: dict[int, Run], options: argparse.Namespace) -> Curve:
    """Add the medians of the times of runs, measured in turns."""
    for run in runs.values():
        run()
    named = {str(position): run for position, run in runs.items()}
    times = in_turns(named, torch.device(options.device), *options.effort)
    curve.points = {int(name): statistics.median(of) for name, of in times.items()}
    return curve


def measure(options: argparse.Namespace) -> Iterator[Curve]:
    """Measure one curve after the other."""
    device = options.device
    for net, sizes in options.samples.items():
        runs = {N: product(make_problem(net, device, N)) for N in sizes}
        yield timed(Curve(f"G @ x, {net}", "N", "s", 1.0), runs, options)
    wide = [wide_mlp(width, device) for width in options.widths]
    runs = {problem.num_params: product(problem) for problem in wide}
    yield timed(Curve("G @ x, mlp", "D", "s", 1.0), runs, options)
    del wide, runs
    for net, sizes in options.gram_samples.items():
        problems = [make_problem(net, device, N) for N in sizes]
        runs = {side(problem): gram(problem) for problem in problems}
        yield timed(Curve(f"Gram, {net}", "N·R", "s", 2.0), runs, options)
        memory = Curve(f"Gram, {net}", "N·R", "B", 2.0)
        one, *peaks = (peak_of_gram(net, device, N) for N in (1, *sizes))
        for problem, peak in zip(problems, peaks, strict=True):
            memory.points[side(problem)] = float(max(peak - one, 1))
        yield memory


def peak_of_gram(net: str, device: str, num_samples: int) -> int:
    """The peak of memory of a Gram matrix; on the CPU that of a process of its own."""
    if torch.device(device).type == "cuda":
        return peak_memory(gram, make_problem(net, device, num_samples))
    of_net = ["--memory-of", net, "--device", device, "--at", str(num_samples)]
    return peak_memory_in_subprocess("benchmarks.growth", of_net)


def print_curve(curve: Curve) -> None:
    """Print the points and the exponent."""
    print(f"\n{curve.label}, {'time' if curve.unit == 's' else 'peak memory'}")
    for position, value in curve.points.items():
        if curve.unit == "s":
            print(f"  {curve.axis} = {position:>10,}{1e3 * value:12.2f} ms")
        else:
            matrix = 4 * position**2 / 2**20
            print(
                f"  {curve.axis} = {position:>10,}{value / 2**20:12.1f} MiB; "
                f"4 (N·R)² bytes are {matrix:.1f} MiB"
            )
    print(
        f"  exponent {curve.exponent:.2f}, of the operation count {curve.expected:g}",
        flush=True,
    )


def draw(curves: list[Curve], path: Path) -> None:
    """Draw times against N, D and N·R, and memory against N·R."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((curve.axis, curve.unit) for curve in curves))
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for index, (axis, unit) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for curve in curves:
            if (curve.axis, curve.unit) != (axis, unit):
                continue
            positions = np.array(sorted(curve.points), dtype=float)
            scale = 1.0 if unit == "s" else 2.0**-20
            values = scale * np.array([curve.points[int(p)] for p in positions])
            label = f"{curve.label}: {curve.exponent:.2f}"
            (line,) = axes.loglog(positions, values, "o-", label=label)
            guide = values[-1] * (positions / positions[-1]) ** curve.expected
            axes.loglog(positions, guide, ":", color=line.get_color())
        axes.set_xlabel(axis)
        axes.set_ylabel("seconds" if unit == "s" else "MiB beyond those of N = 1")
        axes.legend(title="exponent (dotted: expected)", fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.memory_of is not None:
        problem = make_problem(options.memory_of, options.device, options.at)
        print(json.dumps({"peak_bytes": peak_memory(gram, problem)}))
        return
    facts = environment(torch.device(options.device))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    curves = []
    for curve in measure(options):
        print_curve(curve)
        curves.append(curve)
    RESULTS.mkdir(exist_ok=True)
    device = options.device.replace(":", "")
    stem = RESULTS / f"growth-{device}-{time.strftime('%Y%m%d-%H%M%S')}"
    report: dict[str, Any] = {
        "environment": facts,
        "curves": [{**vars(curve), "exponent": curve.exponent} for curve in curves],
    }
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1))
    draw(curves, stem.with_suffix(".png"))
    print(f"\nWritten to {os.path.relpath(stem)}.json and .png.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points")
    parser.add_argument("--memory-of", metavar="NET", help=argparse.SUPPRESS)
    parser.add_argument("--at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.effort, sizes = (15, 20.0), (SAMPLES, WIDTHS, GRAM_SAMPLES)
    if options.quick:
        sizes = QUICK_SAMPLES, QUICK_WIDTHS, QUICK_GRAM_SAMPLES
        options.effort = 2, 5.0
    elif torch.device(options.device).type == "cuda":
        sizes = GPU_SAMPLES, GPU_WIDTHS, GPU_GRAM_SAMPLES
        options.effort = 5, 5.0
    options.samples, options.widths, options.gram_samples = sizes
    return options


if __name__ == "__main__":
    main()
