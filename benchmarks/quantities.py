"""BackPACK's quantities, by it and by our operators, from net and data.

BackPACK scales gradients of single samples by 1/N, and gives each parameter its own
norms; what is compared is brought to our scale, which costs little. Monte-Carlo
quantities are random, so only the exact ones are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import vivit_linop as vl
from benchmarks import peers
from benchmarks.measure import Build, Ratio, Run, Suite, differences
from benchmarks.problems import Problem

Of = Callable[[Problem], Tensor]
Read = Callable[[list[nn.Parameter], int], Tensor]


def ours(quantity: Of) -> Build:
    return lambda problem: lambda: quantity(problem)


def arguments(problem: Problem) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    return problem.model, problem.loss, problem.data


def gradients(problem: Problem) -> vl.PerSampleGradients:
    return vl.PerSampleGradients(*arguments(problem))


def kronecker_factors(problem: Problem, variant: str) -> Tensor:
    K = vl.KFAC(*arguments(problem), variant=variant, weight_sharing="backpack")
    factors = [f for block in K.blocks for f in getattr(block, "factors", ())]
    return torch.cat([factor.to_dense().reshape(-1) for factor in factors])


def backpack(
    extension: str, read: Callable[[list[nn.Parameter], int], Tensor]
) -> Build:
    def build(problem: Problem) -> Run:
        from backpack import extensions

        return peers.backpack_run(
            problem,
            getattr(extensions, extension)(),
            lambda params: read(params, problem.num_samples),
        )

    return build


def flat(savefield: str, power: int = 0) -> Read:
    """Read a savefield of all parameters, times a power of N."""

    def read(params: list[nn.Parameter], num_samples: int) -> Tensor:
        parts = [getattr(param, savefield).reshape(-1) for param in params]
        return torch.cat(parts) * num_samples**power

    return read


def norms(params: list[nn.Parameter], num_samples: int) -> Tensor:
    squares = torch.stack([param.batch_l2 for param in params]).sum(0)
    return squares * num_samples**2


def factors(savefield: str) -> Read:
    """Read the Kronecker factors of the weights; biases have an exact block."""

    def read(params: list[nn.Parameter], num_samples: int) -> Tensor:
        pairs = [getattr(param, savefield) for param in params if param.ndim > 1]
        return torch.cat([factor.reshape(-1) for pair in pairs for factor in pair])

    return read


# What, by us, by BackPACK, and the least ratio that is aimed at.
QUANTITIES: dict[str, tuple[Of, Build, float]] = {
    "diagonal of G": (
        lambda p: vl.GGN(*arguments(p)).diagonal(),
        backpack("DiagGGNExact", flat("diag_ggn_exact")),
        2.0,
    ),
    "diagonal of G, Monte-Carlo": (
        lambda p: vl.GGN(*arguments(p), mc_samples=1).diagonal(),
        backpack("DiagGGNMC", flat("diag_ggn_mc")),
        0.9,
    ),
    "squared gradient norms": (
        lambda p: gradients(p).squared_norms(),
        backpack("BatchL2Grad", norms),
        1.5,
    ),
    "second moments": (
        lambda p: gradients(p).second_moment(),
        backpack("SumGradSquared", flat("sum_grad_squared", 1)),
        0.9,
    ),
    "variances": (
        lambda p: gradients(p).variance(),
        backpack("Variance", flat("variance", 2)),
        0.9,
    ),
    "KFLR": (
        lambda p: kronecker_factors(p, "exact"),
        backpack("KFLR", factors("kflr")),
        2.0,
    ),
    "KFAC": (
        lambda p: kronecker_factors(p, "mc"),
        backpack("KFAC", factors("kfac")),
        0.9,
    ),
}
RANDOM = {"diagonal of G, Monte-Carlo", "KFAC"}


def theirs(name: str) -> str:
    return f"{name}, BackPACK"


CASES: dict[str, Build] = {}
for name, (quantity, peer, _) in QUANTITIES.items():
    CASES[name], CASES[theirs(name)] = ours(quantity), peer

SUITE = Suite(
    "BackPACK's quantities, from net and data",
    CASES,
    nets=dict.fromkeys(["mlp", "3c3d", "2c2d", "digits", "resnet32"]),
    ratios=[
        Ratio(f"BackPACK / ours, {name}", theirs(name), name, {"3c3d": aim})
        for name, (_, _, aim) in QUANTITIES.items()
    ],
    memory_ratios=[
        Ratio(
            f"ours / BackPACK, {name}", name, theirs(name), {"3c3d": 1.1}, at_most=True
        )
        for name in QUANTITIES
    ],
    agreement=differences(
        *((name, theirs(name)) for name in QUANTITIES if name not in RANDOM)
    ),
    from_scratch=True,
)
