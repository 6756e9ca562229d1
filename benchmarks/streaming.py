"""Data that do not fit: ``python -m benchmarks.streaming``.

Two sizes of a data set go through the 3c3d net from a ``DataLoader`` that draws its
images when they are asked for. Each runs in a process of its own, which builds the risk
and takes the gradient and products with G, Vᵀ and V. Peak memory should stay, and times
should be linear in N. Prints them, and writes JSON.

What is kept of each sample are its outputs and its target; a product with Vᵀ also
returns R numbers for it. ``memory=`` bounds all else that is kept. With glibc, resident
memory also holds what its allocator cannot give back between two batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import vivit_linop as vl
from benchmarks.measure import environment, peak_memory, peak_resident_memory, seconds
from benchmarks.problems import NETS, make_problem

RESULTS = Path(__file__).parent / "results"
SIZES = 600, 60_000
QUICK_SIZES = 600, 3_000
NET = "3c3d"
BATCH = 100
BUDGET = 2**25  # bytes
AIM = 1.2
Sample = tuple[Tensor, Tensor]


class Synthetic(Dataset[Sample]):
    """Random images and classes, drawn anew from the number of the sample."""

    def __init__(self, num_samples: int, net: str = NET) -> None:
        self._num_samples = num_samples
        self._shape, self._classes = NETS[net].shape, NETS[net].num_classes

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(self._shape, generator=generator)
        return image, torch.randint(self._classes, (), generator=generator)


def stream(num_samples: int, device: str, net: str = NET) -> dict[str, Any]:
    """Stream that many samples; returns times, and the peak of this process."""
    torch_device = torch.device(device)
    problem = make_problem(net, device, num_samples=1)
    loader = DataLoader(Synthetic(num_samples, net), BATCH)
    x = problem.columns(1).squeeze(1)
    times = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        result, times[name] = seconds(run, torch_device)
        return result

    # Tracing and what is imported for it take the same time for all sizes.
    vl.GGN(problem.model, problem.loss, problem.data) @ x
    nothing = peak_memory(None, problem)
    risk = timed(
        "risk",
        lambda: vl.EmpiricalRisk(problem.model, problem.loss, loader, memory=BUDGET),
    )
    timed("gradient", risk.gradient)
    G = vl.GGN(risk)
    timed("G @ x, first", lambda: G @ x)
    timed("G @ x", lambda: G @ x)
    z = timed("V.T @ x", lambda: G.factor.T @ x)
    timed("V @ z", lambda: G.factor @ z)
    if torch_device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(torch_device)
    else:
        peak = peak_resident_memory()
    return {"seconds": times, "peak_bytes": peak, "nothing_bytes": nothing}


def stream_in_subprocess(num_samples: int, device: str) -> dict[str, Any]:
    arguments = ["--only", str(num_samples), "--device", device]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(finished.stderr)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def print_table(measured: dict[int, dict[str, Any]]) -> None:
    """Print what both sizes took, and the ratios."""
    (small, few), (large, many) = measured.items()
    print(f"\n{'':18}{f'N = {small:,}':>14}{f'N = {large:,}':>14}{'ratio':>10}")
    for name, value in few["seconds"].items():
        other = many["seconds"][name]
        print(f"{name:18}{value:12.2f} s{other:12.2f} s{other / value:10.2f}")
    for name, key in (("peak memory", "peak_bytes"), ("… before", "nothing_bytes")):
        value, other = few[key] / 2**20, many[key] / 2**20
        print(f"{name:18}{value:10.0f} MiB{other:10.0f} MiB{other / value:10.2f}")
    ratio = many["peak_bytes"] / few["peak_bytes"]
    print(f"\nN grows by {large / small:.0f}, memory by {ratio:.2f}; ", end="")
    print(f"aim ≤ {AIM:g}: {'yes' if ratio <= AIM else 'no'}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.only is not None:
        print(json.dumps(stream(options.only, options.device)))
        return
    facts = environment(torch.device(options.device))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    sizes = options.samples or (QUICK_SIZES if options.quick else SIZES)
    measured = {N: stream_in_subprocess(N, options.device) for N in sizes}
    print_table(measured)
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = RESULTS / f"streaming-{torch.device(options.device).type}-{stamp}.json"
    report = {"environment": facts, "budget": BUDGET, "samples": measured}
    path.write_text(json.dumps(report, indent=1))
    print(f"\nWritten to {os.path.relpath(path)}.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--samples", type=int, nargs=2, help="two values of N")
    parser.add_argument("--quick", action="store_true", help=f"N = {QUICK_SIZES}")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
