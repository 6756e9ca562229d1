"""Matrix-free linear operators for curvature in PyTorch.

The generalised Gauss–Newton matrix G of a net and its low-rank factor V are SciPy
``LinearOperator``s with torch matvecs, and a small algebra turns expressions over them
into exact Gram eigenpairs, directional derivatives and damped inverses.
"""

from vivit_linop import linalg, testing
from vivit_linop.analysis import damped_newton_step, directional_derivatives
from vivit_linop.curvature import (
    GGN,
    EmpiricalFisher,
    GGNFactor,
    Hessian,
    Jacobian,
    LossHessian,
    PerSampleGradients,
)
from vivit_linop.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Identity,
    KhatriRao,
    Kronecker,
    TorchLinearOperator,
)
from vivit_linop.risk import EmpiricalRisk
from vivit_linop.saving import load, save

__version__ = "0.1.0"

__all__ = [
    "GGN",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "EmpiricalFisher",
    "EmpiricalRisk",
    "GGNFactor",
    "Hessian",
    "Identity",
    "Jacobian",
    "KhatriRao",
    "Kronecker",
    "LossHessian",
    "PerSampleGradients",
    "TorchLinearOperator",
    "damped_newton_step",
    "directional_derivatives",
    "linalg",
    "load",
    "save",
    "testing",
]
