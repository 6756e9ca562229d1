"""Ten eigenpairs of the GGN by each route, from net and data, and by the plan's choice.

A route that the plan refuses here, or that fails, is left out with the reason.
"""

from __future__ import annotations

from torch import Tensor

import vivit_linop as vl
from benchmarks.measure import Build, Ratio, Results, Run, Suite
from benchmarks.problems import Problem
from benchmarks.spectra import eigenvalue_difference, leading

CHOSEN = "as chosen"
ROUTES = ("dense Gram", "Lanczos on K", "Lanczos on G", "ARPACK on K", "ARPACK on G")


def by(route: str | None) -> Build:
    def build(problem: Problem) -> Run:
        def run() -> Tensor:
            G = vl.GGN(problem.model, problem.loss, problem.data)
            pairs = G.eigh(k=leading(problem), route=route)
            _ = pairs.eigenvectors
            return pairs.eigenvalues

        return run

    return build


def agreement(_: Problem, results: Results) -> dict[str, float]:
    """The largest error of an eigenvalue, by the largest one."""
    return {
        f"{route} | {CHOSEN}": eigenvalue_difference(results[route], results[CHOSEN])
        for route in ROUTES
        if route in results and CHOSEN in results
    }


SUITE = Suite(
    "Ten eigenpairs of the GGN by each route, from net and data",
    {CHOSEN: by(None), **{route: by(route) for route in ROUTES}},
    nets=dict.fromkeys(["mlp", "3c3d"]),
    ratios=[Ratio(f"{route} / {CHOSEN}", route, CHOSEN) for route in ROUTES],
    agreement=agreement,
    from_scratch=True,
)
