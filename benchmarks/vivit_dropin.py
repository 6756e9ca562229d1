"""The drop-in for ViViT and ViViT itself, inside BackPACK's backward pass.

A run is a forward pass and a backward pass with the computation, as in a script.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vivit_linop.vivit as dropin
from benchmarks import peers
from benchmarks.measure import Build, Ratio, Results, Run, Suite, difference
from benchmarks.problems import Problem
from benchmarks.spectra import leading, top


def dropin_run(problem: Problem, computation: str, **group: Any) -> Run:
    return peers.computation_run(getattr(dropin, computation), problem, **group)


def _damping(evals: Tensor, *_: Tensor) -> Tensor:
    return torch.ones_like(evals)


def _case(computation: str, original: bool) -> Build:
    run = peers.vivit_run if original else dropin_run

    def build(problem: Problem) -> Run:
        if computation == "EigvalshComputation":
            return run(problem, computation)
        criterion = top(leading(problem))
        return run(problem, computation, criterion=criterion, damping=_damping)

    return build


COMPUTATIONS = {
    "eigenvalues": "EigvalshComputation",
    "10 eigenpairs": "EighComputation",
    "γ and λ": "DirectionalDerivativesComputation",
    "damped Newton step": "DirectionalDampedNewtonComputation",
}


def agreement(problem: Problem, results: Results) -> dict[str, float]:
    return {
        label: difference(_numbers(results[label]), _numbers(results[theirs]))
        for label in COMPUTATIONS
        if (theirs := f"{label}, ViViT") in results
    } or {"eigenvalues | eigenpairs": _largest_difference(problem, results)}


def _largest_difference(problem: Problem, results: Results) -> float:
    evals = results["10 eigenpairs"][0]
    return difference(results["eigenvalues"][-leading(problem) :], evals)


def _numbers(result: Any) -> Tensor:
    """All numbers of a result, without the signs of eigenvectors."""
    if isinstance(result, Tensor):
        return result.abs().reshape(-1)
    return torch.cat([_numbers(part) for part in result])


def _ratios(aims: dict[str, dict[str, float]]) -> list[Ratio]:
    return [
        Ratio(f"ViViT / ours, {label}", f"{label}, ViViT", label, aims[label])
        for label in COMPUTATIONS
    ]


SUITE = Suite(
    "ViViT's computations in BackPACK's backward pass",
    {
        label + suffix: _case(computation, original)
        for label, computation in COMPUTATIONS.items()
        for suffix, original in (("", False), (", ViViT", True))
    },
    # ViViT forms V: at N = 128 most nets would take more than 10 GB.
    nets=dict.fromkeys(["mlp", "3c3d"], 64),
    ratios=_ratios(
        {
            "eigenvalues": {"mlp": 1.5, "tiny": 1.5, "3c3d": 3},
            "10 eigenpairs": {"mlp": 1.5, "tiny": 1.5, "3c3d": 0.9},
            "γ and λ": {"mlp": 50, "3c3d": 0.9},
            "damped Newton step": {"mlp": 50, "3c3d": 0.9},
        }
    ),
    memory_ratios=[
        Ratio(
            f"ours / ViViT, {label}",
            label,
            f"{label}, ViViT",
            {"3c3d": 0.5},
            at_most=True,
        )
        for label in COMPUTATIONS
    ],
    agreement=agreement,
    from_scratch=True,
)
