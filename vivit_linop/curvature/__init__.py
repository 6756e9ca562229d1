"""Curvature: operators made of a model, a loss and data."""

from vivit_linop.curvature import (  # noqa: F401  (register)
    block_sandwich,
    column_sums,
    routes,
    rules,
)
from vivit_linop.curvature.calibration import calibrate
from vivit_linop.curvature.fisher import EmpiricalFisher, PerSampleGradients
from vivit_linop.curvature.ggn import GGN, GGNFactor
from vivit_linop.curvature.hessian import Hessian
from vivit_linop.curvature.jacobian import Jacobian
from vivit_linop.curvature.kfac import EKFAC, KFAC
from vivit_linop.curvature.loss_hessian import LossHessian
from vivit_linop.curvature.plan import DeviceCosts
from vivit_linop.curvature.recursions import KFRA, PositiveCurvatureHessian

__all__ = [
    "EKFAC",
    "GGN",
    "KFAC",
    "KFRA",
    "DeviceCosts",
    "EmpiricalFisher",
    "GGNFactor",
    "Hessian",
    "Jacobian",
    "LossHessian",
    "PerSampleGradients",
    "PositiveCurvatureHessian",
    "calibrate",
]
