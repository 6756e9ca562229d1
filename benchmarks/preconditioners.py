"""(G + δ I)⁻¹ g by SciPy's ``cg``, with preconditioners and without.

The operator is ours in all cases, in float64, so that what differs are iterations and
what one of them costs. A preconditioner is built in the set-up, beside the
linearisation of the net that all of them have; it pays if the set-up and the run are
together shorter than those of ``cg`` alone, or if it is used for several solves.

On softmax regression KFAC pays, and so does the GGN of a quarter of the samples; in the
net with three layers only the latter does, and the diagonal of G takes more iterations
than none on both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from scipy.sparse.linalg import cg
from torch import Tensor, nn

import vivit_linop as vl
from benchmarks import peers
from benchmarks.inverses import gradient, largest_eigenvalue
from benchmarks.measure import Build, Ratio, Results, Run, Suite
from benchmarks.problems import Problem

TOLERANCE = 1e-6
DAMPING = 1e-3  # of λ_max
SHARE = 4  # the subset is one of so many samples

Preconditioner = Callable[[vl.EmpiricalRisk, float], vl.TorchLinearOperator | None]


@dataclass(frozen=True)
class Solution:
    """What ``cg`` has found, and after how many iterations."""

    x: Tensor
    iterations: int


_DAMPINGS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def damping(problem: Problem) -> float:
    """The value of δ, found once for a net."""
    if problem.model not in _DAMPINGS:
        _DAMPINGS[problem.model] = DAMPING * largest_eigenvalue(problem)
    return _DAMPINGS[problem.model]


def diagonal(risk: vl.EmpiricalRisk, delta: float) -> vl.TorchLinearOperator:
    return vl.Diagonal(vl.GGN(risk).diagonal() + delta).inv()


def kfac(risk: vl.EmpiricalRisk, delta: float) -> vl.TorchLinearOperator:
    K = vl.KFAC(risk, variant="exact", joint_bias=True)
    return (K + delta * vl.Identity(risk.num_params)).inv()


def ekfac(risk: vl.EmpiricalRisk, delta: float) -> vl.TorchLinearOperator:
    E = vl.EKFAC(risk, variant="exact", joint_bias=True)
    return (E + delta * vl.Identity(risk.num_params)).inv()


def subset(risk: vl.EmpiricalRisk, delta: float) -> vl.TorchLinearOperator:
    few = vl.GGN(risk.subset(range(max(1, risk.num_samples // SHARE))))
    return (few + delta * vl.Identity(risk.num_params)).inv()


def solver(build: Preconditioner) -> Build:
    def case(problem: Problem) -> Run:
        exact, delta = problem.to(torch.float64), damping(problem)
        risk = vl.EmpiricalRisk(exact.model, exact.loss, exact.data)
        A = vl.GGN(risk) + delta * vl.Identity(risk.num_params)
        b = risk.gradient().cpu().numpy()
        A @ b  # makes the linearisation
        M = build(risk, delta)

        def run() -> Solution:
            count = 0

            def callback(x: object) -> None:
                nonlocal count
                count += 1

            x, info = cg(A, b, M=M, rtol=TOLERANCE, maxiter=5000, callback=callback)
            if info != 0:
                raise RuntimeError(f"cg: no convergence for δ = {delta:.3g}.")
            return Solution(torch.from_numpy(x), count)

        return run

    return case


ALONE = "cg"
WITH: dict[str, Preconditioner] = {
    "cg, diagonal of G": diagonal,
    "cg, KFAC": kfac,
    "cg, EKFAC": ekfac,
    f"cg, G of a subset of N/{SHARE}": subset,
}


def residuals(problem: Problem, results: Results) -> dict[str, float]:
    """Relative residuals by curvlinops' GGN, in float64."""
    exact, delta = problem.to(torch.float64), damping(problem)
    G, g, found = peers.curvlinops_ggn(exact), gradient(exact), {}
    for name, solution in results.items():
        x = solution.x.to(g)
        error = (G @ x + delta * x - g).norm() / g.norm()
        found[f"residual, {name}"] = error.item()
    return found


SUITE = Suite(
    f"cg on (G + δ I) x = g, δ = {DAMPING:g} λ_max, to a residual of {TOLERANCE:g}",
    {ALONE: solver(lambda risk, delta: None)}
    | {name: solver(build) for name, build in WITH.items()},
    nets={"softmax": None, "small": None},
    ratios=[Ratio(f"cg / {name}", ALONE, name) for name in WITH],
    agreement=residuals,
    iterations=lambda results: {name: s.iterations for name, s in results.items()},
)
