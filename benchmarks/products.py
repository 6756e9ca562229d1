"""Products with the GGN: ours, those of curvlinops, and the gradient as the unit."""

from __future__ import annotations

import curvlinops
import torch
from torch import Tensor

import vivit_linop as vl
from benchmarks.measure import Ratio, Run, Suite
from benchmarks.problems import Problem

COLUMNS = 10


def gradient(problem: Problem) -> Run:
    X, y = problem.data

    def run() -> Tensor:
        loss = problem.loss(problem.model(X), y)
        gradients = torch.autograd.grad(loss, problem.params)
        return torch.cat([g.reshape(-1) for g in gradients])

    return run


def ggn(problem: Problem) -> Run:
    G = vl.GGN(problem.model, problem.loss, problem.data)
    x = problem.columns(1).squeeze(1)
    return lambda: G @ x


def ggn_columns(problem: Problem) -> Run:
    G = vl.GGN(problem.model, problem.loss, problem.data)
    X = problem.columns(COLUMNS)
    return lambda: G @ X


def _curvlinops(problem: Problem) -> curvlinops.GGNLinearOperator:
    return curvlinops.GGNLinearOperator(
        problem.model,
        problem.loss,
        problem.params,
        [problem.data],
        check_deterministic=False,
    )


def curvlinops_ggn(problem: Problem) -> Run:
    G, x = _curvlinops(problem), problem.columns(1).squeeze(1)
    return lambda: G @ x


def curvlinops_ggn_columns(problem: Problem) -> Run:
    G, X = _curvlinops(problem), problem.columns(COLUMNS)
    return lambda: G @ X


SUITE = Suite(
    "Products with the GGN",
    {
        "gradient": gradient,
        "G @ x": ggn,
        "G @ x, curvlinops": curvlinops_ggn,
        f"G @ X, {COLUMNS} columns": ggn_columns,
        f"G @ X, {COLUMNS} columns, curvlinops": curvlinops_ggn_columns,
    },
    ratios=[
        Ratio("G @ x / gradient", "G @ x", "gradient", "at most 1.5"),
        Ratio(
            "curvlinops / ours, 1 column", "G @ x, curvlinops", "G @ x", "at least 2"
        ),
        Ratio(
            f"curvlinops / ours, {COLUMNS} columns",
            f"G @ X, {COLUMNS} columns, curvlinops",
            f"G @ X, {COLUMNS} columns",
            "at least 2",
        ),
        Ratio(
            f"G @ X / gradient, {COLUMNS} columns",
            f"G @ X, {COLUMNS} columns",
            "gradient",
        ),
    ],
    same=[
        ("G @ x", "G @ x, curvlinops"),
        (f"G @ X, {COLUMNS} columns", f"G @ X, {COLUMNS} columns, curvlinops"),
    ],
)
