"""The picture of the front page: ``python docs/_ext/front_picture.py``.

Three panels: what the algebra is about, a spectrum, a posterior.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TARGET = Path(__file__).parents[1] / "front.png"
INK, WARM, COLD = "#23303d", "#c2562d", "#2b6c8f"


def trained(net: nn.Module, X: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimizer.step()
    return net


def factors(ax: Axes) -> None:
    """Jᵀ, H, J and G of a net as pictures of their entries, by magnitude."""
    torch.manual_seed(3)
    X, y = torch.randn(6, 3), torch.randint(3, (6,))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    J, H, G = vl.Jacobian(risk), vl.LossHessian(risk), vl.GGN(risk)
    place = 0.0
    shown = [(G, "G", "="), (J.T, "Jᵀ", "·"), (H, "H", "·"), (J, "J", "")]
    for op, name, sign in shown:
        entries = op.to_dense().abs().sqrt().numpy()
        rows, columns = entries.shape
        top = 31 - rows
        extent = (place, place + columns, top, top + rows)
        ax.imshow(entries, cmap="Blues", extent=extent, vmax=0.9 * entries.max())
        ax.add_patch(plt.Rectangle((place, top), columns, rows, ec=INK, fc="none"))
        ax.text(place + columns / 2, 33, name, ha="center", color=INK, fontsize=13)
        place += columns + 6
        ax.text(place - 3, 15, sign, ha="center", va="center", color=INK, fontsize=15)
    ax.set(xlim=(-1, place - 5), ylim=(-1, 37))
    ax.axis("off")
    ax.set_title("Everything is an expression over J and H", color=INK, y=1.04)


def spectrum(ax: Axes) -> None:
    """All eigenvalues of a GGN on digits."""
    torch.manual_seed(0)
    digits = load_digits()
    X = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    trained(net, X[:1000], y[:1000], 60)
    G = vl.GGN(net, nn.CrossEntropyLoss(), (X[:128], y[:128]))
    values = G.eigh().eigenvalues.flip(0).numpy()
    rank = np.arange(1, len(values) + 1)
    ax.loglog(rank[9:], values[9:], ".", ms=4, color=COLD)
    ax.loglog(rank[:9], values[:9], "o", ms=6, color=WARM)
    ax.text(11, values[3], "C − 1 outliers", color=WARM, va="center")
    ax.set_xlabel("rank")
    ax.set_title("All eigenvalues, from a small Gram matrix", color=INK)


def posterior(ax: Axes) -> None:
    """How sure a net is, by its Laplace approximation."""
    torch.manual_seed(0)
    X, y = (torch.tensor(a) for a in make_moons(120, noise=0.12, random_state=1))
    net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 2)).double()
    trained(net, X, y, 300)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(reduction="sum"), (X, y))
    la = vl.Laplace(risk, prior_precision=0.3)
    x1, x2 = np.meshgrid(np.linspace(-2.4, 3.4, 110), np.linspace(-2.0, 2.4, 80))
    grid = torch.tensor(np.stack([x1.ravel(), x2.ravel()], axis=1))
    logits, covariance = la.predictive(grid)
    difference = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    deviation = (difference @ covariance @ difference).sqrt().reshape(x1.shape)
    levels = np.linspace(float(deviation.min()), float(deviation.max()), 24)
    ax.contourf(x1, x2, deviation, levels, cmap="YlGnBu_r")
    boundary = (logits @ difference).reshape(x1.shape)
    ax.contour(x1, x2, boundary, [0.0], colors="white", linewidths=1.5)
    for label, colour in ((0, WARM), (1, "#f2c14e")):
        chosen = X[y == label]
        ax.plot(*chosen.T, "o", ms=3.5, color=colour, mec=INK, mew=0.4)
    ax.set(xticks=[], yticks=[])
    ax.set_title("How unsure the net is, from (G + τ I)⁻¹", color=INK)


def main() -> None:
    plt.rcParams |= {"font.size": 10, "axes.spines.top": False}
    plt.rcParams |= {"axes.spines.right": False, "axes.titlesize": 11}
    widths = [1.75, 1, 1.1]
    figure = plt.figure(figsize=(13.5, 3.3), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=widths)
    for ax, panel in zip(axes, (factors, spectrum, posterior), strict=True):
        panel(ax)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
