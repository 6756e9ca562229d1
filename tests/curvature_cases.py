"""Operators of the market's risks, each with its dense matrix."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vivit_linop as vl
from tests import comparing
from tests.cases import Problem, dense, problem

FEW = [
    "mlp_ce_mean",
    "mlp_mse_sum",
    "bce_saturated",
    "ce_everything",
    "ce_sequence",
    "coupled_function_loss",
    "uneven_batches",
    "more_columns_than_parameters",
    "repeated_samples",
    "callable_model",
    "cnn",
    "tokens",
    "control_flow",
]


def risk_of(case: Problem, **options: Any) -> vl.EmpiricalRisk:
    arguments, own = case.arguments()
    return vl.EmpiricalRisk(*arguments, **own, **options)


@functools.cache
def risk(name: str, dtype: torch.dtype = torch.float64) -> vl.EmpiricalRisk:
    return risk_of(problem(name, dtype))


def fresh(name: str, **options: Any) -> vl.EmpiricalRisk:
    return risk_of(problem(name), **options)


def close(
    got: Tensor, expected: Tensor, rtol: float = 1e-12, scale: Any = None
) -> bool:
    return comparing.close(got, expected, rtol, scale)


def build(symbol: str, of: vl.EmpiricalRisk, name: str) -> tuple[Any, Tensor]:
    """An operator and its matrix."""
    truth = dense(name)
    if symbol in "SV":
        # S is unique up to rotation only, so S Sᵀ is checked and S itself is taken
        # as dense blocks, which its products do not form.
        S = vl.LossHessian(of).sqrt()
        root = S.to_dense().double()
        if symbol == "S":
            return S, root
        V = vl.GGNFactor(of)
        assert torch.equal(V.output.to_dense().double(), root)
        return V, truth.J.T @ root
    constructors: dict[str, tuple[Callable[..., Any], str]] = {
        "J": (vl.Jacobian, "J"),
        "H": (vl.LossHessian, "H"),
        "G": (vl.GGN, "G"),
        "U": (vl.PerSampleGradients, "U"),
        "F": (vl.EmpiricalFisher, "F"),
        "Hess": (vl.Hessian, "hessian"),
    }
    constructor, matrix = constructors[symbol]
    return constructor(of), getattr(truth, matrix)


def check_products(op: Any, matrix: Tensor, rtol: float) -> None:
    """One and several columns, from both sides; what check_operator begins with."""
    generator = torch.Generator().manual_seed(1)
    for A, M in ((op, matrix), (op.T, matrix.T)):
        for columns in (1, 3):
            x = torch.randn(
                M.shape[1], columns, generator=generator, dtype=op.torch_dtype
            )
            x = x.squeeze(1) if columns == 1 else x
            scale = M.norm() * x.norm()
            assert close(A @ x, M @ x.double(), rtol, scale), (A, columns)


def check_pairs(pairs: Any, G: Tensor, tolerance: float = 1e-10) -> None:
    evals, evecs = pairs
    lambda_max = torch.linalg.matrix_norm(G, 2)
    unit = torch.eye(len(evals), dtype=torch.float64)
    assert evals.isfinite().all() and evecs.isfinite().all()
    assert ((evecs.T @ evecs - unit).abs() <= tolerance).all()
    residuals = (G @ evecs - evals * evecs).norm(dim=0)
    assert (residuals <= tolerance * lambda_max).all(), residuals / lambda_max


def blocks_of(G: Tensor, sizes: list[int], groups: list[list[int]]) -> list[Tensor]:
    places = torch.arange(len(G)).split(sizes)
    result = []
    for group in groups:
        index = torch.cat([places[i] for i in group])
        result.append(G[index][:, index])
    return result
