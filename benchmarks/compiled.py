"""Products under ``torch.compile``: ours, and those of curvlinops.

curvlinops' products become one compiled graph each. Ours run as they are, beside what a
caller compiles: a kept linearisation and stored columns leave nothing to fuse. What is
compiled is so in the set-up, which takes up to minutes.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

import vivit_linop as vl
from benchmarks import peers
from benchmarks.measure import Build, Ratio, Run, Suite, differences
from benchmarks.problems import Problem, Unavailable
from benchmarks.products import COLUMNS

OURS, THEIRS = "ours", "curvlinops"
BACKEND = "inductor"


def product(problem: Problem, library: str, columns: int, compiled: bool) -> Run:
    """A product with G and as many columns, perhaps compiled."""
    X = problem.columns(columns)
    X = X.squeeze(1) if columns == 1 else X
    if library == OURS:
        G = vl.GGN(problem.model, problem.loss, problem.data)
    else:
        G = peers.curvlinops_ggn(problem)

    def multiply(vectors: Tensor) -> Tensor:
        return G @ vectors

    if not compiled:
        return lambda: multiply(X)
    require_compiler(problem.device)
    function = torch.compile(multiply, backend=BACKEND)
    return lambda: function(X)


def require_compiler(device: torch.device) -> None:
    """Compile something small, to see whether that is possible here."""
    try:
        small = torch.compile(lambda x: x.sin() + 1, backend=BACKEND)
        small(torch.ones(2, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise Unavailable(f"torch.compile fails here: {reason}") from error


def case(library: str, columns: int, compiled: bool) -> str:
    name = f"G @ X, {columns} columns" if columns > 1 else "G @ x"
    return f"{name}, {library}" + (", compiled" if compiled else "")


def cases() -> dict[str, Build]:
    """By name; of each size all that are compared."""
    chosen = itertools.product((1, COLUMNS), (OURS, THEIRS), (False, True))
    return {
        case(library, columns, compiled): functools.partial(
            product, library=library, columns=columns, compiled=compiled
        )
        for columns, library, compiled in chosen
    }


def ratios() -> list[Ratio]:
    found = []
    for columns in (1, COLUMNS):
        size = f"{columns} columns" if columns > 1 else "1 column"
        ours, theirs = (case(library, columns, False) for library in (OURS, THEIRS))
        found += [
            Ratio(f"curvlinops compiled / ours, {size}", f"{theirs}, compiled", ours),
            Ratio(f"ours compiled / ours, {size}", f"{ours}, compiled", ours),
            Ratio(f"curvlinops / compiled, {size}", theirs, f"{theirs}, compiled"),
        ]
    return found


SUITE = Suite(
    "Products with the GGN under torch.compile",
    cases(),
    nets=dict.fromkeys(["mlp", "3c3d"]),
    ratios=ratios(),
    agreement=differences(
        *[
            (case(OURS, columns, False), case(library, columns, True))
            for columns in (1, COLUMNS)
            for library in (OURS, THEIRS)
        ]
    ),
)
