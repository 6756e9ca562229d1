"""Matrix-free linear operators for curvature in PyTorch.

The generalised Gauss–Newton matrix G of a net and its low-rank factor V are SciPy
``LinearOperator``s with torch matvecs, and a small algebra turns expressions over them
into exact Gram eigenpairs, directional derivatives and damped inverses.
"""

from vivit_linop import linalg, testing
from vivit_linop.analysis import (
    LanczosSpectrum,
    Laplace,
    centered_gram,
    class_means,
    covariance,
    damped_newton_step,
    directional_derivatives,
    influence,
    log_marginal_likelihood,
    posterior_precision,
    predictive_covariance,
    projector,
    self_influence,
    trust_region_step,
)
from vivit_linop.curvature import (
    EKFAC,
    GGN,
    KFAC,
    KFRA,
    DeviceCosts,
    EmpiricalFisher,
    GGNFactor,
    Hessian,
    Jacobian,
    LossHessian,
    PerSampleGradients,
    PositiveCurvatureHessian,
    calibrate,
)
from vivit_linop.interop import from_backpack, from_curvlinops, from_scipy
from vivit_linop.linalg import estimate_diagonal, estimate_trace, led
from vivit_linop.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Eigenpairs,
    Identity,
    KhatriRao,
    Kronecker,
    RandomProjection,
    TorchLinearOperator,
    hstack,
    vstack,
)
from vivit_linop.risk import EmpiricalRisk, losses
from vivit_linop.risk.losses import Loss
from vivit_linop.saving import load, save

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "GGN",
    "KFAC",
    "KFRA",
    "BlockDiagonal",
    "Dense",
    "DeviceCosts",
    "Diagonal",
    "Eigenpairs",
    "EmpiricalFisher",
    "EmpiricalRisk",
    "GGNFactor",
    "Hessian",
    "Identity",
    "Jacobian",
    "KhatriRao",
    "Kronecker",
    "LanczosSpectrum",
    "Laplace",
    "Loss",
    "LossHessian",
    "PerSampleGradients",
    "PositiveCurvatureHessian",
    "RandomProjection",
    "TorchLinearOperator",
    "calibrate",
    "centered_gram",
    "class_means",
    "covariance",
    "damped_newton_step",
    "directional_derivatives",
    "estimate_diagonal",
    "estimate_trace",
    "from_backpack",
    "from_curvlinops",
    "from_scipy",
    "hstack",
    "influence",
    "led",
    "linalg",
    "load",
    "log_marginal_likelihood",
    "losses",
    "posterior_precision",
    "predictive_covariance",
    "projector",
    "save",
    "self_influence",
    "testing",
    "trust_region_step",
    "vstack",
]
