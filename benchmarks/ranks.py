"""One process against several: times, and bytes on the wire against their formulas.

Starts itself under torchrun, with one thread a process, on one machine:

    python -m benchmarks.ranks [--processes 2] [--rounds 5]

One process and several take turns. Shown are the least time of all rounds, for a
machine that has other work now and then, and the median of the least times of the
rounds: where these differ, it was not idle. Below a product stand its parts: what each
process does of its own samples while the others do, which is the most that the machine
allows, and what ranks exchange. Bytes are those of the loopback device, in all
directions; they are Linux's counters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vivit_linop as vl
from benchmarks.problems import make_problem
from vivit_linop.net.cross_grams import own_gram_rows

NET, SAMPLES, COLUMNS = "3c3d", 128, 10
FEATURES, HIDDEN, CLASSES, COUNT = 256, 512, 10, 240


def main() -> None:
    if "RANK" in os.environ:
        work(Path(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sizes = (1, options.processes)
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    for _ in range(options.rounds):
        for size in sizes:
            found[size].append(started(size))
    print(
        f"{NET}, {SAMPLES} samples, one thread a process; load {os.getloadavg()[0]:.1f}"
    )
    print("ms of the clock: least | median of rounds; of the busiest processor: least")
    for what in found[options.processes][0]["times"]:
        print(compared(what, *(found[size] for size in sizes)))
    print(f"\nbytes over all of {options.processes} ranks, and by formula (MB)")
    for what in found[options.processes][0]["bytes"]:
        pairs = [each["bytes"][what] for each in found[options.processes]]
        measured, formula = min(pairs)
        ratio = measured / formula
        print(f"{what:24} {measured / 1e6:8.3f} {formula / 1e6:8.3f}   {ratio:.3f}")


def compared(
    what: str, alone: list[dict[str, Any]], together: list[dict[str, Any]]
) -> str:
    """A line: what one process takes, several, and how many times as much."""
    line = f"{what:24}"
    for kind, least in ((0, min), (0, statistics.median), (1, min)):
        one, several = (
            1e3 * least(each["times"][what][kind] for each in rounds)
            if what in rounds[0]["times"]
            else float("nan")
            for rounds in (alone, together)
        )
        line += f" {one:8.2f} {several:8.2f} {one / several:5.2f} x"
        line += " |" if kind == 0 else ""
    return line.replace("     nan", "        ").replace("  nan x", "       ")


def started(size: int) -> dict[str, Any]:
    """Run all measurements with some processes."""
    with tempfile.TemporaryDirectory() as folder:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        module = ["-m", "benchmarks.ranks", folder]
        subprocess.run(
            [sys.executable, *run, str(size), *module],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        result: dict[str, Any] = json.loads((Path(folder) / "0.json").read_text())
        return result


def work(folder: Path) -> None:
    """Measure, as one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"times": times(), "bytes": volumes()}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def part(total: int) -> Tensor:
    """The numbers of this rank's samples."""
    return torch.arange(total).tensor_split(dist.get_world_size())[dist.get_rank()]


def times() -> dict[str, tuple[float, float]]:
    """Seconds of what users wait for, by the clock and of the processor."""
    problem = make_problem(NET, num_samples=SAMPLES)
    X, y = problem.data
    own = part(len(y))
    data = [(X[i], y[i]) for i in own.split(32)]
    group = dist.group.WORLD
    risk = vl.EmpiricalRisk(problem.model, problem.loss, data, process_group=group)
    G = vl.GGN(risk)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(G.shape[0], COLUMNS, generator=generator)
    x = X[:, 0].contiguous()
    found = {"G @ x": fastest(lambda: G @ x, 40)}
    if risk.ranks.is_many:
        own = vl.GGN(vl.EmpiricalRisk(problem.model, problem.loss, data))
        found |= {
            "  of its samples": fastest(lambda: own @ x, 40),
            "  vote": fastest(lambda: vote(risk, x), 40),
            "  sum over ranks": fastest(lambda: risk.ranks.total(x.clone()), 40),
        }
    return found | {
        f"G @ X, {COLUMNS} columns": fastest(lambda: G @ X, 5),
        "gradient": fastest(risk.gradient, 10),
        "K": fastest(lambda: gram_of(G.factor), 3),
    }


def gram_of(V: vl.GGNFactor) -> Tensor:
    """Compute K once more; over several processes its rows."""
    if V.ranks.is_many:
        return own_gram_rows(V, V)
    return vl.linalg.to_dense(vl.GGNFactor.through(V.jacobian, V.output).gram)


def fastest(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    function()
    seconds, busy = [], []
    for _ in range(repeats):
        dist.barrier()
        start, begun = time.perf_counter(), time.process_time()
        function()
        seconds.append(time.perf_counter() - start)
        every = [0.0] * dist.get_world_size()
        dist.all_gather_object(every, time.process_time() - begun)
        busy.append(max(every))
    return min(seconds), min(busy)


def volumes() -> dict[str, tuple[float, float]]:
    """Bytes on the wire, and their formulas, summed over all ranks."""
    W = dist.get_world_size()
    if W == 1:
        return {}
    torch.manual_seed(0)
    layers = [(FEATURES, HIDDEN), (HIDDEN, FEATURES), (FEATURES, CLASSES)]
    modules = [m for i, o in layers for m in (nn.Linear(i, o), nn.ReLU())]
    net = nn.Sequential(*modules[:-1]).double()
    X = torch.randn(COUNT, FEATURES, dtype=torch.float64)
    y = torch.randint(CLASSES, (COUNT,))
    own = part(COUNT)
    risk = vl.EmpiricalRisk(
        net, nn.CrossEntropyLoss(), (X[own], y[own]), process_group=dist.group.WORLD
    )
    G = vl.GGN(risk)
    V, D, R, b, n = G.factor, G.shape[0], G.factor.width, 8, -(-COUNT // W)
    x = torch.randn(D, COLUMNS, dtype=torch.float64)
    z = torch.randn(COUNT * R, 1, dtype=torch.float64)
    ring, lists = 2 * (W - 1), W * (W - 1) * n * R * b
    # Of each layer the inputs, those of its bias (ones), and the columns' cotangents.
    factors = W * (W // 2) * n * sum(i + 1 + R * o for i, o in layers) * b
    mirrored = (COUNT * R) ** 2 * (1 - 1 / W) / 2 * b
    own_gram_rows(V, V)
    cases: dict[str, tuple[Callable[[], Any], float]] = {
        "a vote": (lambda: vote(risk), 8 * (6 + W) * ring),
        "G x": (lambda: G @ x[:, 0], ring * D * b),
        f"G X, {COLUMNS} columns": (lambda: G @ x, ring * COLUMNS * D * b),
        "gradient": (risk.gradient, ring * (D + 1) * b),
        "V z": (lambda: V @ z, ring * D * b),
        "Vt x": (lambda: V.T @ x[:, :1], lists),
        "K, in rows": (lambda: own_gram_rows(V, V), factors + mirrored),
    }
    idle = min(wire(lambda: None) for _ in range(3))
    found = {}
    for what, (function, formula) in cases.items():
        function()
        count = 100 if what == "a vote" else 1
        repeated = wire(lambda f=function, k=count: [f() for _ in range(k)])
        found[what] = ((repeated - idle) / count, formula)
    return found


def vote(risk: vl.EmpiricalRisk, *vectors: Tensor) -> None:
    with risk.ranks.together("nothing", *vectors):
        pass


def wire(function: Callable[[], Any]) -> int:
    dist.barrier()
    time.sleep(0.2)
    before = sent_bytes()
    dist.barrier()
    function()
    dist.barrier()
    time.sleep(0.2)
    after = sent_bytes()
    dist.barrier()
    return after - before


def sent_bytes() -> int:
    """What has gone through the loopback device."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.strip().partition(":")
        if name == "lo":
            return int(counters.split()[8])
    raise RuntimeError("There is no loopback device.")


if __name__ == "__main__":
    main()
