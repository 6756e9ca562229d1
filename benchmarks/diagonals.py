"""Diagonals and norms of single samples, against BackPACK, from net and data.

BackPACK scales gradients of single samples by 1/N, and gives each parameter its own
norms; what is compared is brought to our scale, which costs little.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import vivit_linop as vl
from benchmarks import peers
from benchmarks.measure import Ratio, Run, Suite, differences
from benchmarks.problems import Problem


def ggn_diagonal(problem: Problem) -> Run:
    return lambda: vl.GGN(problem.model, problem.loss, problem.data).diagonal()


def backpack_ggn_diagonal(problem: Problem) -> Run:
    from backpack.extensions import DiagGGNExact

    return peers.backpack_run(problem, DiagGGNExact(), flat("diag_ggn_exact"))


def second_moment(problem: Problem) -> Run:
    """The mean of the squared gradients of single samples: the Fisher's diagonal."""

    def run() -> Tensor:
        F = vl.EmpiricalFisher(problem.model, problem.loss, problem.data)
        return F.diagonal()

    return run


def backpack_second_moment(problem: Problem) -> Run:
    from backpack.extensions import SumGradSquared

    read = flat("sum_grad_squared")
    run = peers.backpack_run(problem, SumGradSquared(), read)
    return lambda: run() * problem.num_samples  # (g/N)², summed


def gradient_norms(problem: Problem) -> Run:
    def run() -> Tensor:
        U = vl.PerSampleGradients(problem.model, problem.loss, problem.data)
        return (U.T @ U).to_dense().diagonal().sqrt()

    return run


def backpack_gradient_norms(problem: Problem) -> Run:
    from backpack.extensions import BatchL2Grad

    def read(params: list[nn.Parameter]) -> Tensor:
        squares = torch.stack([param.batch_l2 for param in params]).sum(0)
        return squares.sqrt() * problem.num_samples

    return peers.backpack_run(problem, BatchL2Grad(), read)


def flat(savefield: str) -> Callable[[list[nn.Parameter]], Tensor]:
    def read(params: list[nn.Parameter]) -> Tensor:
        return torch.cat([getattr(param, savefield).reshape(-1) for param in params])

    return read


PAIRS = [
    (kind, f"{kind}, BackPACK")
    for kind in ("diagonal of G", "second moments of gradients", "gradient norms")
]

SUITE = Suite(
    "Diagonals and norms of single samples, from net and data",
    {
        PAIRS[0][0]: ggn_diagonal,
        PAIRS[0][1]: backpack_ggn_diagonal,
        PAIRS[1][0]: second_moment,
        PAIRS[1][1]: backpack_second_moment,
        PAIRS[2][0]: gradient_norms,
        PAIRS[2][1]: backpack_gradient_norms,
    },
    nets=dict.fromkeys(["mlp", "3c3d", "2c2d", "digits", "resnet32"]),
    ratios=[Ratio(f"BackPACK / ours, {ours}", peer, ours) for ours, peer in PAIRS],
    agreement=differences(*PAIRS),
    from_scratch=True,
)
