"""Inverses of all kinds of curvature of a risk, each with its dense matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

import vivit_linop as vl
from tests.cases import dense

DELTA = 0.1

Curvature = Callable[[vl.EmpiricalRisk], vl.TorchLinearOperator]

# Those whose matrix is made of the operator's own entries approximate.
EXACT: dict[str, tuple[Curvature, Callable[[str], Tensor]]] = {
    "ggn": (vl.GGN, lambda name: dense(name).G),
    "fisher": (vl.EmpiricalFisher, lambda name: dense(name).F),
}
APPROXIMATE: dict[str, Curvature] = {
    "kfac": lambda of: vl.KFAC(of, variant="exact"),
    "ekfac": lambda of: vl.EKFAC(of, variant="exact"),
    "diagonal": lambda of: vl.Diagonal(vl.GGN(of).diagonal()),
    "block-diagonal": lambda of: vl.GGN(of).block_diagonal("parameter"),
}
KINDS = [*EXACT, *APPROXIMATE, "scaled", "identity", "pi-damped", "dense"]


def inverse(kind: str, of: vl.EmpiricalRisk) -> vl.TorchLinearOperator:
    """(A + δ I)⁻¹, or another self-adjoint operator."""
    unit = vl.Identity(of.num_params, of.dtype, of.device)
    if kind == "identity":
        return unit
    if kind == "scaled":
        return 3 * (vl.GGN(of) + DELTA * unit).inv()
    if kind == "pi-damped":
        return vl.KFAC(of, variant="exact").pi_damped(DELTA).inv()
    if kind == "dense":
        return vl.Dense(inverse("ggn", of).to_dense())
    make = EXACT[kind][0] if kind in EXACT else APPROXIMATE[kind]
    return (make(of) + DELTA * unit).inv()


def matrix(kind: str, name: str, exact: vl.EmpiricalRisk) -> Tensor:
    """Its matrix, from the dense matrices of the problem where these define it."""
    unit = torch.eye(dense(name).D, dtype=torch.float64)
    if kind in EXACT:
        return torch.linalg.inv(EXACT[kind][1](name) + DELTA * unit)
    if kind in ("scaled", "dense"):
        return (3 if kind == "scaled" else 1) * matrix("ggn", name, exact)
    if kind in APPROXIMATE:
        return torch.linalg.inv(APPROXIMATE[kind](exact).to_dense() + DELTA * unit)
    return inverse(kind, exact).to_dense()
