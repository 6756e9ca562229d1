"""
Nonlinear least squares: Levenberg–Marquardt, parameter covariance, a small PINN
================================================================================

With ½ Σ r², G is the JᵀJ of Gauss–Newton. A curve is fitted by damped Gauss–Newton
steps, and its parameters get the covariance of SciPy's ``curve_fit`` (``pcov``). Then a
net solves u'' = −π² sin(π x), u(±1) = 0, as residuals of its own derivatives: a
physics-informed net. Damped steps get much further than Adam in the same time.

    python examples/least_squares.py [--output FOLDER]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import matplotlib
import numpy as np
import torch
from _digits import check, folder, timed
from scipy.optimize import curve_fit
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Params = dict[str, Tensor]


def half_squares(residual: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (residual - target).square().sum()


def levenberg_marquardt(
    risk: vl.EmpiricalRisk, params: object, steps: int, damping: float = 1e-2
) -> tuple[vl.EmpiricalRisk, list[float]]:
    """Steps −(G + δ I)⁻¹ g; δ falls after a step that descends, and rises otherwise."""
    losses = [risk.value().item()]
    unit = vl.Identity(risk.num_params)
    for _ in range(steps):
        G, g = vl.GGN(risk), risk.gradient()
        while True:
            trial = risk.at(vector(risk) - (G + damping * unit).inv() @ g)
            if trial.value() <= risk.value():
                risk, damping = trial, max(damping / 5, 1e-12)
                break
            damping *= 4
            if damping > 1e6:
                return risk, losses
        losses.append(risk.value().item())
    return risk, losses


def vector(risk: vl.EmpiricalRisk) -> Tensor:
    return risk.flatten(risk.params).detach()
