"""
Mean and variance from one net: noise in the data, doubt in the model
======================================================================

A net returns a mean and a variance for each input and is trained with torch's
``GaussianNLLLoss``. That loss is not convex in the variance, so its generalised
Gauss-Newton matrix is indefinite; the Fisher matrix, by labels drawn from the net's own
distribution, is not. Its inverse is the covariance of a Laplace posterior. That says
where the net does not know; the variance says where labels are noisy.

``python examples/heteroscedastic.py``
"""

from __future__ import annotations

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PRIOR = 1.0  # the precision of all weights

# %%
# A net with two outputs
# ----------------------


class MeanAndVariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh()
        )
        self.mean, self.spread = nn.Linear(20, 1), nn.Linear(20, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return self.mean(hidden), softplus(self.spread(hidden)) + 1e-3


def noise(x: Tensor) -> Tensor:
    """The standard deviation of labels."""
    return 0.05 + 0.3 * torch.sigmoid(3 * x)


def check(what: str, found: float, expected: float, tolerance: float) -> None:
    print(f"  {what}: {found:.4g}, expected {expected:.4g}")
    if not abs(found / expected - 1) <= tolerance:
        raise AssertionError(what)


# %%
# Training
# --------
# There are no data between −0.5 and 0.5, and the noise grows from left to right.

torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.cat([torch.linspace(-2, -0.5, 150), torch.linspace(0.5, 2, 150)])[:, None]
y = (2 * x).sin() + noise(x) * torch.randn_like(x)  # none between -0.5 and 0.5
net, loss = MeanAndVariance(), nn.GaussianNLLLoss(reduction="sum")
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(1000):
    optimizer.zero_grad()
    penalty = sum(p.square().sum() for p in net.parameters())
    mean, variance = net(x)
    (loss(mean, y, variance) + PRIOR / 2 * penalty).backward()
    optimizer.step()

# %%
# Three matrices
# --------------
# G itself is indefinite. Its positive part and the Monte-Carlo Fisher matrix are not.

risk = vl.EmpiricalRisk(net, loss, (x, y))
G, D = vl.GGN(risk), risk.num_params
lowest, highest = G.eigvalsh()[[0, -1]].tolist()
print(f"{D} parameters. Eigenvalues of JᵀHJ: {lowest:.3g} to {highest:.3g}")
positive = vl.GGN(risk, positive_part=True)
fisher = vl.GGN(risk, mc_samples=200, generator=torch.Generator().manual_seed(1))

# In expectation over labels H is diag(1/v, 1/(2 v²)).
mean, variance = (part.detach() for part in net(x))
J = vl.Jacobian(risk)
expected = torch.cat([1 / variance, 1 / (2 * variance**2)], dim=1).reshape(-1)
exact = J.T @ vl.Diagonal(expected) @ J
print("Traces:")
check("drawn and exact Fisher matrix", fisher.trace(), exact.trace(), 0.05)
print(f"  JᵀHJ {G.trace():.4g}, of positive parts {positive.trace():.4g}")
kfac = vl.KFAC(risk, mc_samples=20)
print(f"  KFAC {kfac.trace():.4g}")

# %%
# Noise and doubt
# ---------------

# Variances of the means under N(θ, (F + τ I)⁻¹), also where there were no data.
at = torch.tensor([[-1.5], [0.0], [1.5], [4.0]])
posterior = (fisher + PRIOR * vl.Identity(D)).inv()
J_at = vl.Jacobian(vl.EmpiricalRisk(net, loss, (at, torch.zeros_like(at))))
doubt = (J_at @ posterior @ J_at.T).diagonal()[::2].sqrt()  # even rows: means
spread = net(at)[1].detach().sqrt().squeeze(1)
print("     x   labels' deviation   (true)   the mean's deviation")
for row in zip(at[:, 0], spread, noise(at)[:, 0], doubt, strict=True):
    print("{:6.1f}{:20.3f}{:9.3f}{:23.3f}".format(*map(float, row)))
check("deviation of labels at 1.5", float(spread[2]), float(noise(at)[2]), 0.3)
if not doubt[[1, 3]].min() > doubt[[0, 2]].max():
    raise AssertionError("the net does not doubt where it has seen nothing")

# %%
# The picture
# -----------
# Dark: what the net does not know. Light: that and the noise of labels.

line = torch.linspace(-4, 4, 161)[:, None]
J_line = vl.Jacobian(vl.EmpiricalRisk(net, loss, (line, torch.zeros_like(line))))
doubt = (J_line @ posterior @ J_line.T).diagonal()[::2]
mean, variance = (part.detach().squeeze(1) for part in net(line))
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for spread, alpha in ((doubt + variance, 0.2), (doubt, 0.4)):
    band = 2 * spread.sqrt()
    ax.fill_between(line[:, 0], mean - band, mean + band, color="C0", alpha=alpha)
ax.plot(x, y, ".", color="0.3", markersize=3)
ax.plot(line, mean, "C0")
ax.set(xlabel="x", ylim=(-4, 4), title="Mean, doubt in it, and noise: two deviations")
