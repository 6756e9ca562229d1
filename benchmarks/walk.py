"""How far a reader walks to follow one call: ``python -m benchmarks walk``.

Python's profiler sees each call of a function of the package. What counts is how many
calls there are, of how many functions in how many files, how often a call stands in
another file than the one before, and how often the net runs. The numbers are exact, and
the same on every machine. ``--follow NAME`` prints the functions of one of the walks in
the order in which they are first called: a way to read the code. ``--shares`` says what
the walks are spent on.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import vivit_linop as vl
from benchmarks.lines import capability

PACKAGE = Path(vl.__file__).parent
Call = Callable[[], Any]


class Net(nn.Sequential):
    """A class of its own, so that the profiler can tell when the net runs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@dataclass(frozen=True)
class Walk:
    """What one call walked through, in the order of calls.

    Attributes:
        path: The file, the name and the line of each function.
        topics: What each call serves.
        runs: How often the net ran.
    """

    path: list[tuple[str, str, int]]
    topics: list[str]
    runs: int

    @property
    def calls(self) -> int:
        return len(self.path)

    @property
    def functions(self) -> int:
        return len(set(self.path))

    @property
    def files(self) -> int:
        return len({file for file, *_ in self.path})

    @property
    def moves(self) -> int:
        files = [file for file, *_ in self.path]
        return sum(a != b for a, b in pairwise(files))


@dataclass(frozen=True)
class Aim:
    """What a walk should take at most."""

    calls: int | None = None
    functions: int | None = None
    files: int | None = None
    moves: int | None = None
    runs: int | None = None


def problem() -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """A small net, its loss and its data."""
    torch.manual_seed(0)
    net = Net(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    return net, nn.CrossEntropyLoss(), (torch.rand(64, 20), torch.randint(5, (64,)))


def construction() -> Call:
    return lambda: vl.EmpiricalRisk(*problem())


def first_product() -> Call:
    G = vl.GGN(*problem())
    x = torch.rand(G.shape[1])
    return lambda: G @ x


def product() -> Call:
    G = vl.GGN(*problem())
    x = torch.rand(G.shape[1])
    for _ in range(2):  # what is kept is kept from the second product on
        G @ x
    return lambda: G @ x


def eigenpairs() -> Call:
    risk = vl.EmpiricalRisk(*problem())
    return lambda: vl.GGN(risk).eigh(k=10)


def solution() -> Call:
    risk = vl.EmpiricalRisk(*problem())
    g = risk.gradient()
    return lambda: (vl.GGN(risk) + 0.1 * vl.Identity(risk.num_params)).inv() @ g


WALKS: dict[str, tuple[Callable[[], Call], Aim]] = {
    "EmpiricalRisk": (construction, Aim()),
    "first G @ x": (first_product, Aim(functions=105, files=13, moves=100, runs=2)),
    "G @ x": (product, Aim(calls=30, files=7, moves=14)),
    "GGN(risk).eigh(k=10)": (eigenpairs, Aim(functions=145, files=15, moves=180)),
    "(G + δI).inv() @ g": (solution, Aim()),
}
COUNTS = "calls", "functions", "files", "moves", "runs"
OTHER = "what is computed"


# What calls of these functions, and all that these call, serve.
TOPICS = {
    "checks": """
        check_curvature certify_curvature certified_sqrt Risk.check_outputs
        CertifiedColumns.failing CertifiedColumns._learn Noise.__init__ Noise.__call__
        Noise.like Preparation._agree Preparation._probed checked_outputs check_loss
        independent_samples Passes.fingerprints
    """,
    "reading layers": """
        Recorder.__init__ Recorder.__torch_function__ Capture.find
        Capture.keep_sizes Structure.fitting Structure.learn Use.columns
        Use.columns.<locals>.make
    """,
    "running the private net": "FunctionalModel.__call__ FunctionalModel.first",
    "passing over data": """
        Passes.batches Cuts.applied iterate copied ByUnit.take
    """,
    "modes of torch": """
        ordinary_mode.__enter__ ordinary_mode.__exit__ as_guest recorded
    """,
    "counting costs": "_layer_costs FactorCost.of_layers choose columns_stay",
}
BEGINS = {name: topic for topic, names in TOPICS.items() for name in names.split()}


def follow(call: Call) -> Walk:
    """Call it, and say where it went."""
    path: list[tuple[str, str, int]] = []
    topics, inside = list[str](), [OTHER]
    runs = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal runs
        code = frame.f_code
        file = Path(code.co_filename)
        if event == "return" and file.is_relative_to(PACKAGE):
            inside.pop()
        if event != "call":
            return
        runs += code is Net.forward.__code__
        if file.is_relative_to(PACKAGE):
            name = str(file.relative_to(PACKAGE))
            path.append((name, code.co_qualname, code.co_firstlineno))
            inside.append(BEGINS.get(code.co_qualname, inside[-1]))
            topics.append(inside[-1])

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Walk(path, topics, runs)


def print_table() -> None:
    print(f"{'':22}" + "".join(f"{name:>16}" for name in COUNTS))
    for name, (prepare, aim) in WALKS.items():
        walk = follow(prepare())
        print(f"{name:22}", end="")
        for count in COUNTS:
            found, most = getattr(walk, count), getattr(aim, count)
            verdict = "" if most is None else f" (≤ {most})"
            print(f"{f'{found}{verdict}':>16}", end="")
        print()


def print_path(name: str) -> None:
    """Print each function where it is first called, under the file it stands in."""
    last = None
    for file, function, _ in dict.fromkeys(follow(WALKS[name][0]()).path):
        if file != last:
            print(file)
        print(f"    {function}")
        last = file


def print_shares() -> None:
    """Functions by what they were first called for, and moves to and inside of that."""
    topics = [*TOPICS, OTHER]
    print(f"{'functions, moves':22}" + "".join(f"{topic:>25}" for topic in topics))
    for name, (prepare, _) in WALKS.items():
        walk = follow(prepare())
        first: dict[tuple[str, str, int], str] = {}
        for place, topic in zip(walk.path, walk.topics, strict=True):
            first.setdefault(place, topic)
        functions = Counter(first.values())
        steps = zip(pairwise(walk.path), walk.topics[1:], strict=True)
        moves = Counter(topic for (a, b), topic in steps if a[0] != b[0])
        counts = [f"{functions[topic]}, {moves[topic]}" for topic in topics]
        print(f"{name:22}" + "".join(f"{count:>25}" for count in counts))


def print_capabilities() -> None:
    """Functions and files by what their files are for, as ``lines`` has them."""
    for name, (prepare, _) in WALKS.items():
        places = set(follow(prepare()).path)
        functions = Counter(capability(file) for file, *_ in places)
        files = Counter(map(capability, {file for file, *_ in places}))
        print(f"\n{name}: functions, files")
        for what, count in functions.most_common():
            print(f"    {what:80}{count:>5}, {files[what]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks walk")
    parser.add_argument("--follow", choices=WALKS, help="print the functions of one")
    parser.add_argument(
        "--shares", action="store_true", help="say what the walks are spent on"
    )
    options = parser.parse_args(arguments)
    if options.shares:
        print_shares()
        print_capabilities()
    elif options.follow is None:
        print_table()
    else:
        print_path(options.follow)


if __name__ == "__main__":
    main()
