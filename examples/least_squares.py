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
from _digits import check, folder, timed
from scipy.optimize import curve_fit
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Params = dict[str, Tensor]
SQUARES = nn.MSELoss(reduction="sum")
STEPS, ADAM_STEPS = 40, 500

# %%
# Levenberg and Marquardt
# -----------------------
# A step is taken where the risk falls, and the damping follows how much of the
# predicted decrease was true.

output = folder(str(__doc__))
torch.set_num_threads(1)


def levenberg_marquardt(
    risk: vl.EmpiricalRisk, steps: int, damping: float = 1e-2
) -> tuple[vl.EmpiricalRisk, list[float]]:
    """Steps −(G + δ I)⁻¹ g; δ falls where the model of the risk is good."""
    losses = [risk.value().item()]
    for _ in range(steps):
        while True:
            step, predicted = vl.trust_region_step(risk, vl.GGN(risk), damping)
            trial = risk.at(vector(risk) + step)
            gain = (risk.value() - trial.value()) / predicted
            if gain > 0:
                break
            damping *= 4
            if damping > 1e6:  # at a minimum, but for rounding
                return risk, losses
        risk, damping = trial, damping * (0.2 if gain > 0.75 else 2.0)
        losses.append(risk.value().item())
    return risk, losses


def vector(risk: vl.EmpiricalRisk) -> Tensor:
    return risk.flatten(risk.params).detach()


# %%
# A curve
# -------
# Four parameters in a function of a dictionary: a model need not be a module.


def curve(params: Params, x: Tensor) -> Tensor:
    """A step from a to a + b, of steepness c, at d."""
    return params["a"] + params["b"] * torch.sigmoid(params["c"] * (x - params["d"]))


def fit_a_curve() -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Progression of diabetes by body mass index, 442 patients."""
    X, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(10 * X[:, 2:3]), torch.tensor(y / 100)[:, None]
    start = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 0.3}
    params = {name: torch.tensor([v]).double() for name, v in start.items()}

    def fit() -> vl.EmpiricalRisk:
        risk = vl.EmpiricalRisk(curve, SQUARES, (x, y), params)
        return levenberg_marquardt(risk, 15)[0]

    risk, seconds = timed(fit)
    pcov = vl.covariance(risk).matrix

    def numpy_curve(x: np.ndarray, a: float, b: float, c: float, d: float):
        return a + b / (1 + np.exp(-c * (x - d)))

    flat = x[:, 0].numpy(), y[:, 0].numpy()
    (popt, expected), peer = timed(
        lambda: curve_fit(
            numpy_curve, *flat, list(start.values()), ftol=1e-14, xtol=1e-14
        )
    )
    print(f"A curve with four parameters: {seconds:.2f} s, curve_fit {peer:.3f} s")
    check("the parameters and curve_fit's", vector(risk), popt, 1e-5)
    check("their covariance and pcov", pcov, expected, 1e-4)
    return *flat, vector(risk), pcov


x, y, theta, pcov = fit_a_curve()

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


def adam(x: Tensor) -> Residual:
    model = Residual()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(ADAM_STEPS):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


def solve() -> tuple[Residual, list[float]]:
    x = torch.linspace(-1, 1, 60).double()[:, None]
    model = Residual()
    risk = vl.EmpiricalRisk(model, SQUARES, (x, torch.zeros_like(x)))
    (found, losses), seconds = timed(lambda: levenberg_marquardt(risk, STEPS))
    other, others_seconds = timed(lambda: adam(x))
    risk.add_to_(model, vector(found) - vector(risk))
    truth = torch.sin(math.pi * x)
    errors = [(m.solution(x) - truth).abs().max().item() for m in (model, other)]
    print(f"The equation: {STEPS} damped steps, {seconds:.1f} s: error {errors[0]:.1e}")
    print(f"{ADAM_STEPS} of Adam, {others_seconds:.1f} s: error {errors[1]:.1e}")
    check("the solution and sin(π x)", model.solution(x).detach(), truth, 1e-3)
    if not errors[0] < errors[1]:
        raise AssertionError("Adam is nearer to the solution")
    return model, losses


model, losses = solve()

# %%
# The picture
# -----------

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
line = torch.linspace(x.min(), x.max(), 200).double()[:, None]
named = dict(zip("abcd", theta.split(1), strict=True))
J = torch.func.jacrev(lambda p: curve(p, line)[:, 0])(named)
J = torch.cat([j.flatten(1) for j in J.values()], dim=1)
spread = 2 * (J @ pcov * J).sum(1).sqrt()
center = curve(named, line)[:, 0]
axes[0].plot(x, y, ".", color="0.7", markersize=4)
axes[0].plot(line, center)
axes[0].fill_between(line[:, 0], center - spread, center + spread, alpha=0.3)
axes[0].set(xlabel="body mass index", title="A curve, ± two standard errors")
axes[1].semilogy(losses, ".-")
axes[1].set(xlabel="damped step", title="Σ residual² of the equation")
grid = torch.linspace(-1, 1, 200).double()[:, None]
axes[2].plot(grid, model.solution(grid).detach(), label="net")
axes[2].plot(grid, torch.sin(math.pi * grid), "--", label="sin(π x)")
axes[2].set(xlabel="x", title="The solution")
axes[2].legend()
figure.savefig(output / "least_squares.png", dpi=150)
print(f"\nSaved {output / 'least_squares.png'}.")
