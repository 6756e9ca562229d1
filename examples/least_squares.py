"""
Nonlinear least squares: Levenberg–Marquardt, parameter covariance, a small PINN
================================================================================

With Σ r², G is 2 JᵀJ, and a damped step with it is that of Levenberg and Marquardt:
``vl.trust_region_step``. A curve is fitted by such steps, and ``vl.covariance`` is the
``pcov`` of SciPy's ``curve_fit``. Then a net solves u'' = −π² sin(π x), u(±1) = 0, as
residuals of its own derivatives: a physics-informed net. A few damped steps get further
than very many of Adam.

``python examples/least_squares.py [--output FOLDER]``
"""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import torch
from _digits import check, folder, timed, train
from scipy.optimize import curve_fit
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Fit = tuple[vl.EmpiricalRisk, list[float]]  # and its values, step by step
SQUARES = nn.MSELoss(reduction="sum")
STEPS, ADAM_STEPS, TIGHT = 40, 500, {"ftol": 1e-14, "xtol": 1e-14}

# %%
# Levenberg and Marquardt
# -----------------------
# A step is taken where the risk falls, and the damping follows how much of the
# predicted decrease was true.

output = folder(str(__doc__))
torch.set_num_threads(1)


def levenberg_marquardt(risk: vl.EmpiricalRisk, steps: int) -> Fit:
    """Steps −(G + δ I)⁻¹ g; δ falls where the model of the risk is good."""
    losses, damping = [risk.value().item()], 1e-2
    while len(losses) <= steps and damping < 1e6:  # else a minimum, but for rounding
        step, predicted = vl.trust_region_step(risk, vl.GGN(risk), damping)
        trial = risk.at(vector(risk) + step)
        gain = ((risk.value() - trial.value()) / predicted).item()
        damping *= 4.0 if gain <= 0 else 0.2 if gain > 0.75 else 2.0
        if gain > 0:
            risk = trial
            losses.append(risk.value().item())
    return risk, losses


def vector(risk: vl.EmpiricalRisk) -> Tensor:
    return risk.flatten(risk.params).detach()


# %%
# A curve
# -------
# Four parameters in a function of a dictionary: a model need not be a module.


def curve(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """A step from a to a + b, of steepness c, at d."""
    return params["a"] + params["b"] * torch.sigmoid(params["c"] * (x - params["d"]))


def numpy_curve(x: np.ndarray, a: float, b: float, c: float, d: float) -> np.ndarray:
    return a + b / (1 + np.exp(-c * (x - d)))


# Progression of diabetes by body mass index, 442 patients.
X, y = load_diabetes(return_X_y=True)
x, y = 10 * X[:, 2], y / 100
guess = [1.0, 2.0, 3.0, 0.3]
params = dict(zip("abcd", torch.tensor(guess).double().split(1), strict=True))
data = torch.tensor(x)[:, None], torch.tensor(y)[:, None]
risk = vl.EmpiricalRisk(curve, SQUARES, data, params)
(fitted, _), seconds = timed(lambda: levenberg_marquardt(risk, 15))
pcov = vl.covariance(fitted).matrix
(popt, expected), peer = timed(lambda: curve_fit(numpy_curve, x, y, guess, **TIGHT))
print(f"A curve with four parameters: {seconds:.2f} s, curve_fit {peer:.3f} s")
check("the parameters and curve_fit's", vector(fitted), popt, 1e-5)
check("their covariance and pcov", pcov, expected, 1e-4)

# %%
# A physics-informed net
# ----------------------
# The residual has second derivatives of the net in x, and the GGN takes derivatives
# of these.


class Residual(nn.Module):
    """u'' + π² sin(π x) for u = (1 − x²) net(x), which is zero at ±1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()

    def solution(self, x: Tensor) -> Tensor:
        return (1 - x.square()) * self.net(x)

    def forward(self, x: Tensor) -> Tensor:
        def u(t: Tensor) -> Tensor:
            return self.solution(t[None, None]).squeeze()

        second = torch.func.vmap(torch.func.grad(torch.func.grad(u)))(x[:, 0])
        return second[:, None] + math.pi**2 * torch.sin(math.pi * x)


grid = torch.linspace(-1, 1, 60).double()[:, None]
model, other = Residual(), Residual()
risk = vl.EmpiricalRisk(model, SQUARES, (grid, torch.zeros_like(grid)))
(solved, losses), seconds = timed(lambda: levenberg_marquardt(risk, STEPS))
vector_to_parameters(vector(solved), model.parameters())
_, adams = timed(
    lambda: train(other, lambda: other(grid).square().sum(), ADAM_STEPS, last_rate=1e-2)
)
truth = torch.sin(math.pi * grid)
errors = [(m.solution(grid) - truth).abs().max().item() for m in (model, other)]
print(f"The equation: {STEPS} damped steps, {seconds:.1f} s: error {errors[0]:.1e}")
print(f"{ADAM_STEPS} of Adam, {adams:.1f} s: error {errors[1]:.1e}")
check("the solution and sin(π x)", model.solution(grid).detach(), truth, 1e-3)

# %%
# The picture
# -----------

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
line = torch.linspace(x.min(), x.max(), 200).double()[:, None]
J = vl.Jacobian(curve, line, params=fitted.params)
spread = 2 * vl.predictive_covariance(J, vl.Dense(pcov), diagonal=True)[:, 0].sqrt()
center = curve(fitted.params, line)[:, 0].detach()
axes[0].plot(x, y, ".", color="0.7", markersize=4)
axes[0].plot(line, center)
axes[0].fill_between(line[:, 0], center - spread, center + spread, alpha=0.3)
axes[0].set(xlabel="body mass index", title="A curve, ± two standard errors")
axes[1].semilogy(losses, ".-")
axes[1].set(xlabel="damped step", title="Σ residual² of the equation")
axes[2].plot(grid, model.solution(grid).detach(), label="net")
axes[2].plot(grid, truth, "--", label="sin(π x)")
axes[2].set(xlabel="x", title="The solution")
axes[2].legend()
figure.savefig(output / "least_squares.png", dpi=150)
print(f"\nSaved {output / 'least_squares.png'}.")
