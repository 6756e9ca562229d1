"""Curvature at every step of training: the ten largest eigenpairs of the GGN.

Each run takes a step of gradient descent, which is not part of the monitor's cost but
of all cases', and so is the gradient that it takes. A risk that is made anew validates
the model and the data; ``risk.at()`` does not, and its eigenpairs start from those of
the step before. At the edge of stability, where pairs move by more, the steps are those
that training has taken before: there and back again.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

from torch import Tensor

import vivit_linop as vl
from benchmarks.measure import Ratio, Results, Run, Suite, difference
from benchmarks.problems import Problem
from benchmarks.products import gradient

PAIRS, RATE, BEGUN = 10, 0.02, 30
AT, MADE = "risk.at()", "EmpiricalRisk(…)"
FOLLOWED, ANEW = "eigh(k, start=…) at risk.at()", "eigh(k) of a new risk"
# Where the largest eigenvalue times the rate is about 2, with the steps that are taken.
EDGE, EDGE_RATE, EDGE_STEPS = "eigh(k, start=…) at the edge", 0.1, range(90, 120)


class Training:
    """A copy of a problem's model, some steps after its start."""

    def __init__(self, problem: Problem) -> None:
        self.model, self._problem = copy.deepcopy(problem.model), problem
        self.risk = self.anew()
        for _ in range(BEGUN):
            self._step = -RATE * self.risk.gradient()
            self.step()
            self.now()

    def anew(self) -> vl.EmpiricalRisk:
        return vl.EmpiricalRisk(self.model, self._problem.loss, self._problem.data)

    def step(self) -> None:
        self.risk.add_to_(self.model, self._step)
        self._step = -self._step  # and back: all rounds see the same

    def now(self) -> vl.EmpiricalRisk:
        self.risk = self.risk.at()
        return self.risk


def at(problem: Problem) -> Run:
    training = Training(problem)

    def run() -> Tensor:
        training.step()
        return training.now().value()

    return run


def made(problem: Problem) -> Run:
    training = Training(problem)

    def run() -> Tensor:
        training.step()
        return training.anew().value()

    return run


def followed(problem: Problem) -> Run:
    training = Training(problem)
    pairs: list[Any] = [vl.GGN(training.risk).eigh(PAIRS)]

    def run() -> tuple[Tensor, Any]:
        training.step()
        pairs[0] = vl.GGN(training.now()).eigh(PAIRS, start=pairs[0])
        return pairs[0].eigenvalues, training.risk

    return run


def at_the_edge(problem: Problem) -> Run:
    training, thetas = Training(problem), []
    for count in range(EDGE_STEPS.stop - BEGUN):
        risk = training.risk
        risk.add_to_(training.model, -EDGE_RATE * risk.gradient())
        if count + BEGUN >= EDGE_STEPS.start:
            thetas.append(risk.flatten(risk.params))
        training.now()
    there_and_back = itertools.cycle([*thetas, *thetas[-2:0:-1]])
    pairs: list[Any] = [vl.GGN(training.risk).eigh(PAIRS)]

    def run() -> tuple[Tensor, Any]:
        risk = training.risk.at(next(there_and_back))
        pairs[0] = vl.GGN(risk).eigh(PAIRS, start=pairs[0])
        return pairs[0], risk

    return run


def anew(problem: Problem) -> Run:
    training = Training(problem)

    def run() -> tuple[Tensor, Any]:
        training.step()
        G = vl.GGN(training.anew())
        return G.eigh(PAIRS).eigenvalues, G.risk

    return run


def agreement(_: Problem, results: Results) -> dict[str, float]:
    """Of values, gradients, and eigenvalues where the block iteration goes on."""
    (_, risk), (evals, fresh) = results[FOLLOWED], results[ANEW]
    edge, there = results[EDGE]
    G, exact_there = vl.GGN(there), vl.GGN(there).eigh(PAIRS).eigenvalues
    edge = G.eigh(PAIRS, start=edge, tol=1e-6).eigenvalues
    G = vl.GGN(risk)
    exact = G.eigh(PAIRS, start=G.eigh(PAIRS), tol=1e-6).eigenvalues
    return {
        f"value, {AT} | {MADE}": difference(results[AT], results[MADE]),
        f"gradient, {AT} | {MADE}": difference(risk.gradient(), fresh.gradient()),
        "eigenvalues, start=… with tol=1e-6 | without": difference(exact, evals),
        "eigenvalues at the edge, with tol=1e-6 | exact": difference(edge, exact_there),
    }


SUITE = Suite(
    "Ten eigenpairs of the GGN at a step of training",
    {
        **{"gradient": gradient, AT: at, MADE: made, FOLLOWED: followed, ANEW: anew},
        EDGE: at_the_edge,
    },
    nets={"digits-mlp": None},
    ratios=[
        Ratio(f"{AT} / gradient", AT, "gradient", {"digits-mlp": 1.2}, at_most=True),
        Ratio(f"{MADE} / gradient", MADE, "gradient"),
        Ratio(
            "start=… / gradient",
            FOLLOWED,
            "gradient",
            {"digits-mlp": 10.0},
            at_most=True,
        ),
        Ratio(
            "start=… at the edge / gradient",
            EDGE,
            "gradient",
            {"digits-mlp": 10.0},
            at_most=True,
        ),
        Ratio("anew / gradient", ANEW, "gradient"),
    ],
    agreement=agreement,
)
