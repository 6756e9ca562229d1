"""Slopes and curvatures along the ten leading eigenvectors, and damped Newton steps.

Everything is inside the timing, from net and data: the eigenpairs too, as in ViViT.
"""

from __future__ import annotations

import torch
from torch import Tensor

import vivit_linop as vl
from benchmarks import peers
from benchmarks.measure import Ratio, Results, Run, Suite, difference
from benchmarks.problems import Problem
from benchmarks.spectra import leading, top

DAMPING = 1.0


def derivatives(problem: Problem) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        risk = vl.EmpiricalRisk(problem.model, problem.loss, problem.data)
        pairs = vl.GGN(risk).eigh(k=leading(problem))
        return vl.directional_derivatives(risk, pairs)

    return run


def vivit_derivatives(problem: Problem) -> Run:
    return peers.vivit_run(
        problem, "DirectionalDerivativesComputation", criterion=top(leading(problem))
    )


def newton_step(problem: Problem) -> Run:
    def run() -> Tensor:
        risk = vl.EmpiricalRisk(problem.model, problem.loss, problem.data)
        pairs = vl.GGN(risk).eigh(k=leading(problem))
        return vl.damped_newton_step(risk, pairs, DAMPING)

    return run


def vivit_newton_step(problem: Problem) -> Run:
    run_vivit = peers.vivit_run(
        problem,
        "DirectionalDampedNewtonComputation",
        criterion=top(leading(problem)),
        damping=lambda evals, evecs, gammas, lambdas: torch.full_like(evals, DAMPING),
    )
    return lambda: torch.cat([part.reshape(-1) for part in run_vivit()])


SLOPES, SLOPES_VIVIT = "γ and λ, 10 directions", "γ and λ, ViViT"
STEP, STEP_VIVIT = "damped Newton step", "damped Newton step, ViViT"


def agreement(problem: Problem, results: Results) -> dict[str, float]:
    # Directions are orthonormal, so the step is as long as its coefficients.
    slopes, curvatures = (part.mean(0) for part in results[SLOPES])
    length = (slopes / (curvatures + DAMPING)).norm()
    found = {"step's length | from γ and λ": difference(results[STEP].norm(), length)}
    if SLOPES_VIVIT in results:
        (gammas, lambdas), (others, other_lambdas) = (
            results[name] for name in (SLOPES, SLOPES_VIVIT)
        )
        # The sign of an eigenvector is nobody's choice.
        found["|γ|, ours | ViViT"] = difference(gammas.abs(), others.abs())
        found["λ, ours | ViViT"] = difference(lambdas, other_lambdas)
    if STEP_VIVIT in results:
        found["step, ours | ViViT"] = difference(results[STEP], results[STEP_VIVIT])
    return found


SUITE = Suite(
    "Directional derivatives and Newton steps, from net and data",
    {
        SLOPES: derivatives,
        SLOPES_VIVIT: vivit_derivatives,
        STEP: newton_step,
        STEP_VIVIT: vivit_newton_step,
    },
    # ViViT forms V: at N = 128 most nets would take more than 10 GB.
    nets=dict.fromkeys(["mlp", "3c3d", "2c2d", "digits", "resnet32"], 64),
    ratios=[
        Ratio("ViViT / ours, γ and λ", SLOPES_VIVIT, SLOPES, {"mlp": 100, "3c3d": 10}),
        Ratio("ViViT / ours, step", STEP_VIVIT, STEP, {"mlp": 100, "3c3d": 12}),
    ],
    memory_ratios=[
        Ratio("ours / ViViT, γ and λ", SLOPES, SLOPES_VIVIT),
        Ratio("ours / ViViT, step", STEP, STEP_VIVIT),
    ],
    agreement=agreement,
    from_scratch=True,
)
