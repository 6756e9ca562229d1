"""All eigenvalues and the ten leading eigenpairs of the GGN, from net and data.

Everything is inside the timing: the operator is built anew in each run, so nothing is
kept from the run before. Of the Lanczos methods, which cannot find them all, the ten
largest eigenvalues are timed; ARPACK's vectors come with them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

import vivit_linop as vl
from benchmarks import peers
from benchmarks.measure import Ratio, Results, Run, Suite
from benchmarks.problems import Problem

LEADING, TOLERANCE = 10, 1e-4
# hessian-eigenthings' Lanczos does not restart; 40 is the first multiple of ten with
# which all ten have converged to the tolerance on the MLP.
LANCZOS_STEPS = 40

Pairs = tuple[Tensor, Tensor]


def rank(problem: Problem) -> int:
    """The most nonzero eigenvalues that cross-entropy allows."""
    return min(problem.num_params, problem.num_samples * (problem.num_classes - 1))


def leading(problem: Problem) -> int:
    """Ten, or what a small net has."""
    return min(LEADING, rank(problem))


# All eigenvalues ---------------------------------------------------------------------


def eigenvalues(problem: Problem) -> Run:
    return lambda: vl.GGN(problem.model, problem.loss, problem.data).eigvalsh()


def vivit_eigenvalues(problem: Problem) -> Run:
    return peers.vivit_run(problem, "EigvalshComputation")


def scipy_eigenvalues(problem: Problem) -> Run:
    def run() -> Tensor:
        G = peers.curvlinops_ggn(problem).to_scipy()
        start = peers.start_vector(G.shape[0])
        evals, _ = eigsh(G, k=leading(problem), tol=TOLERANCE, v0=start)
        return torch.from_numpy(np.sort(evals)).to(problem.device)

    return run


def eigenthings_eigenvalues(problem: Problem) -> Run:
    peers.eigenthings_ggn(problem)  # unavailable, if it is, before anything is timed
    import hessian_eigenthings

    def run() -> Tensor:
        result = hessian_eigenthings.lanczos(
            peers.eigenthings_ggn(problem),
            k=leading(problem),
            # One more for the null space: the steps after that would be noise.
            max_iter=min(LANCZOS_STEPS, rank(problem) + 1),
            tol=TOLERANCE,
            which="LA",
            seed=0,
        )
        return result.eigenvalues.flip(0)

    return run


# The ten leading eigenpairs ----------------------------------------------------------


def eigenpairs(problem: Problem) -> Run:
    def run() -> Pairs:
        G = vl.GGN(problem.model, problem.loss, problem.data)
        evals, evecs = G.eigh(k=leading(problem))
        return evals, evecs

    return run


def vivit_eigenpairs(problem: Problem) -> Run:
    run_vivit = peers.vivit_run(
        problem, "EighComputation", criterion=top(leading(problem))
    )

    def run() -> Pairs:
        evals, evecs = run_vivit()
        return evals, torch.cat([e.flatten(start_dim=1) for e in evecs], dim=1).T

    return run


def top(count: int) -> Callable[[Tensor], list[int]]:
    """ViViT's criterion for the largest, in ascending order."""
    return lambda evals: list(range(len(evals) - count, len(evals)))


# Agreement ---------------------------------------------------------------------------


def eigenvalue_difference(value: Tensor, reference: Tensor) -> float:
    """The largest error of those that both have, by the largest eigenvalue."""
    count = min(len(value), len(reference))
    value, reference = value.double()[-count:], reference.double()[-count:]
    return float((value - reference).abs().max() / reference.max())


def pair_difference(value: Pairs, reference: Pairs) -> float:
    """The relative difference of E Λ Eᵀ, in the Frobenius norm."""

    def product(left: Pairs, right: Pairs) -> Tensor:
        overlaps = left[1].double().T @ right[1].double()
        return left[0].double() @ overlaps.square() @ right[0].double()

    size = product(reference, reference)
    square = product(value, value) + size - 2 * product(value, reference)
    return float((square.clamp(min=0.0) / size).sqrt())


ALL, ALL_VIVIT = "all eigenvalues", "all eigenvalues, ViViT"
TEN_SCIPY, TEN_EIGENTHINGS = "10 eigenvalues, SciPy", "10 eigenvalues, eigenthings"
PAIRS, PAIRS_VIVIT = "10 eigenpairs", "10 eigenpairs, ViViT"


def agreement(problem: Problem, results: Results) -> dict[str, float]:
    found = {}
    for name in (ALL_VIVIT, TEN_SCIPY, TEN_EIGENTHINGS):
        if name in results:
            label = f"{ALL} | {name}"
            found[label] = eigenvalue_difference(results[ALL], results[name])
    if PAIRS_VIVIT in results:
        label = f"{PAIRS} | {PAIRS_VIVIT}"
        found[label] = pair_difference(results[PAIRS], results[PAIRS_VIVIT])
    found[f"{PAIRS} | {ALL}"] = eigenvalue_difference(results[PAIRS][0], results[ALL])
    return found


SUITE = Suite(
    "Spectra of the GGN, from net and data",
    {
        ALL: eigenvalues,
        ALL_VIVIT: vivit_eigenvalues,
        TEN_SCIPY: scipy_eigenvalues,
        TEN_EIGENTHINGS: eigenthings_eigenvalues,
        PAIRS: eigenpairs,
        PAIRS_VIVIT: vivit_eigenpairs,
    },
    nets=dict.fromkeys(["mlp", "3c3d", "2c2d", "digits", "resnet32", "allcnnc"]),
    ratios=[
        Ratio("SciPy's 10 / all of ours", TEN_SCIPY, ALL, {"mlp": 40, "3c3d": 5}),
        Ratio("eigenthings' 10 / all of ours", TEN_EIGENTHINGS, ALL),
        Ratio("ViViT / ours, all", ALL_VIVIT, ALL, {"mlp": 1.5, "3c3d": 7}),
        Ratio("ViViT / ours, pairs", PAIRS_VIVIT, PAIRS, {"mlp": 1.5, "3c3d": 7}),
    ],
    memory_ratios=[
        Ratio(
            "ours / ViViT, all eigenvalues",
            ALL,
            ALL_VIVIT,
            {"mlp": 1, "3c3d": 0.25},
            at_most=True,
        ),
        Ratio("ours / ViViT, pairs", PAIRS, PAIRS_VIVIT),
    ],
    agreement=agreement,
    from_scratch=True,
)
