"""Products with the GGN: ours, those of curvlinops, and the gradient as the unit.

What an operator makes once and keeps (our linearisation of the net) is made in the
set-up, outside of the timing; its time is a column of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

import vivit_linop as vl
from benchmarks import peers
from benchmarks.measure import Ratio, Run, Suite, differences
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


def curvlinops_ggn(problem: Problem) -> Run:
    G, x = peers.curvlinops_ggn(problem), problem.columns(1).squeeze(1)
    return lambda: G @ x


def curvlinops_ggn_columns(problem: Problem) -> Run:
    G, X = peers.curvlinops_ggn(problem), problem.columns(COLUMNS)
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
    nets=dict.fromkeys(["mlp", "3c3d", "2c2d", "digits", "resnet32", "allcnnc"]),
    ratios=[
        Ratio(
            "curvlinops / ours, 1 column",
            "G @ x, curvlinops",
            "G @ x",
            {"mlp": 3, "3c3d": 2.5},
        ),
        Ratio(
            "G @ x / gradient",
            "G @ x",
            "gradient",
            {"mlp": 1.25, "3c3d": 1.0},
            at_most=True,
        ),
        Ratio(
            f"curvlinops / ours, {COLUMNS} columns",
            f"G @ X, {COLUMNS} columns, curvlinops",
            f"G @ X, {COLUMNS} columns",
            {"mlp": 3, "3c3d": 3.5},
        ),
        Ratio(
            f"G @ X / gradient, {COLUMNS} columns",
            f"G @ X, {COLUMNS} columns",
            "gradient",
        ),
    ],
    agreement=differences(
        ("G @ x", "G @ x, curvlinops"),
        (f"G @ X, {COLUMNS} columns", f"G @ X, {COLUMNS} columns, curvlinops"),
    ),
)
