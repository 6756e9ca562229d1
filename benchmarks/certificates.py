"""What it costs that columns certify themselves, beside what is made of them.

The check of all samples' columns together is timed alone: weights from the sizes of the
columns, their combination, and an ordinary backward pass.
"""

from __future__ import annotations

import vivit_linop as vl
from benchmarks.measure import Ratio, Results, Run, Suite
from benchmarks.problems import Problem
from benchmarks.products import gradient
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.modes import as_guest
from vivit_linop.net.capture import Capture
from vivit_linop.net.certified import CertifiedColumns

GRAM, ONE_COLUMN = "Gram matrix", "one Monte-Carlo column: norms"
CHECKS = {GRAM: "check of its columns", ONE_COLUMN: "check of one column a sample"}


def factor(problem: Problem, mc_samples: int = 0) -> vl.GGNFactor:
    return vl.GGNFactor(
        problem.model, problem.loss, problem.data, mc_samples=mc_samples
    )


def gram_matrix(problem: Problem) -> Run:
    risk = factor(problem).risk
    return lambda: vl.GGNFactor(risk).gram.matrix


def norms(problem: Problem) -> Run:
    risk = factor(problem).risk
    return lambda: vl.GGN(risk, mc_samples=1).trace()


def check(V: Pullback) -> Run:
    risk, names = V.risk, set(V.risk.params)
    X, y = next(risk.passes.batches())
    cotangents = V.cotangents(0)
    with as_guest(risk.device):
        certified = CertifiedColumns(risk, X, Capture(risk, X, len(y)))
        columns = certified.columns(cotangents, names)
    return lambda: certified.failing(columns, cotangents, names)


def failing(_: Problem, results: Results) -> dict[str, float]:
    """The numbers of parameters that fail."""
    return {f"{c}, failing": float(len(results[c])) for c in CHECKS.values()}


SUITE = Suite(
    "Columns that certify themselves",
    {
        "gradient": gradient,
        GRAM: gram_matrix,
        CHECKS[GRAM]: lambda problem: check(factor(problem)),
        ONE_COLUMN: norms,
        CHECKS[ONE_COLUMN]: lambda problem: check(factor(problem, mc_samples=1)),
    },
    nets=dict.fromkeys(["mlp", "3c3d"]),
    ratios=[
        Ratio(
            "check / Gram matrix",
            CHECKS[GRAM],
            GRAM,
            {"mlp": 0.2, "3c3d": 0.2},
            at_most=True,
        ),
        Ratio(
            "check / gradient, one column",
            CHECKS[ONE_COLUMN],
            "gradient",
            {"mlp": 1.0, "3c3d": 1.0},
            at_most=True,
        ),
    ],
    agreement=failing,
)
