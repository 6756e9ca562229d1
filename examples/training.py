"""
Curvature through training: sharpness, outliers, overlaps, signal and noise
===========================================================================

Gradient descent on scikit-learn's digits, with the ten largest eigenpairs of the GGN at
every step: ``risk.at()`` and ``G.eigh(k, start=…)`` make them from those of the step
before. The sharpness grows until it is 2/η, and stays there (Cohen et al. 2021,
arXiv:2103.00065); from then on the gradient lies along the leading eigenvectors
(Gur-Ari, Roberts & Dyer 2018, arXiv:1812.04754). With cross-entropy, C − 1 eigenvalues
stand out (Papyan 2020, arXiv:2008.11865), and few directions have a gradient that is
larger than its noise.

``python examples/training.py [--output FOLDER]``
"""

from __future__ import annotations

import matplotlib
import torch
from _digits import check, digits, folder, timed
from curvlinops import GGNLinearOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS, RATE, K, C, SHOWN = 190, 5.0, 10, 10, 40

# %%
# A net, and what the peers say of it
# -----------------------------------

output = folder(str(__doc__))
torch.set_num_threads(1)
X, y = digits(300)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, C))


def peer(net: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """The ten largest eigenvalues by curvlinops and ARPACK."""
    G = GGNLinearOperator(
        net, loss, list(net.parameters()), [data], check_deterministic=False
    )
    return torch.from_numpy(eigsh(G.to_scipy(), k=K, tol=1e-5)[0])


# %%
# At the edge of stability
# ------------------------
# Each step of the monitor is a risk at the new parameters, and pairs from those of
# the step before.


def descend(X: Tensor, y: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Gradient descent on squares: losses, sharpness times η/2, overlaps."""
    net, loss, data = make_net(), nn.MSELoss(), (X, nn.functional.one_hot(y).float())
    risk = vl.EmpiricalRisk(net, loss, data)
    pairs = vl.GGN(risk).eigh(k=K)
    losses, sharpness, overlaps = [], [], []
    seconds = 0.0
    for _ in range(STEPS):
        gradient = risk.gradient()
        along = pairs.eigenvectors.T @ gradient
        losses.append(risk.value().item())
        sharpness.append(0.5 * RATE * pairs.eigenvalues[-1].item())
        overlaps.append((along.norm() / gradient.norm()).square().item())
        risk.add_to_(net, -RATE * gradient)

        def monitor(before: vl.EmpiricalRisk = risk, start: object = pairs):
            now = before.at()
            return now, vl.GGN(now).eigh(k=K, start=start)

        (risk, pairs), elapsed = timed(monitor)
        seconds += elapsed
    gradients = sum(timed(risk.gradient)[1] for _ in range(20)) / 20
    print(f"{STEPS} steps of gradient descent, loss {losses[-1]:.3f}. A step of the ")
    print(f"monitor takes {seconds / STEPS / gradients:.1f} of its gradients.")
    exact, elapsed = timed(lambda: peer(net, loss, data))
    print(f"curvlinops and ARPACK take {elapsed / gradients:.0f}, for each step.")
    check("the eigenvalues that were followed", pairs.eigenvalues, exact, 0.02)
    return losses, sharpness, overlaps


losses, sharpness, overlaps = descend(X, y)
late = sharpness[STEPS // 2 :]
print(f"Sharpness in units of 2/η: {sharpness[0]:.2f}, in the end {late[-1]:.2f}")
if not (sharpness[0] < 0.95 and 0.9 < sum(late) / len(late) < 1.2):
    raise AssertionError("the sharpness is not at the edge of stability")

# %%
# C − 1 outliers
# --------------
# After a few steps on cross-entropy nine eigenvalues stand out, and the class means
# of gradients make most of them.

net, loss = make_net(), nn.CrossEntropyLoss()
risk = vl.EmpiricalRisk(net, loss, (X, y))
for _ in range(6):
    risk.add_to_(net, -0.4 * risk.gradient())
    risk = risk.at()
G = vl.GGN(risk)
evals, pairs = G.eigvalsh().flip(0), G.eigh(k=SHOWN)
gap = (evals[:SHOWN] / evals[1 : SHOWN + 1]).argmax().item() + 1
print(f"Cross-entropy: the largest gap is after {gap} eigenvalues, C − 1 = {C - 1}.")
if gap != C - 1:
    raise AssertionError("C − 1 eigenvalues do not stand out")
means, weights = vl.class_means(risk)
W = (means * weights.sqrt()).flatten(1)
of_means = torch.linalg.eigvalsh(W.T @ W).flip(0)
share = of_means[: C - 1].sum() / evals[: C - 1].sum()
print(f"The class means of gradients make {share:.0%} of these.")
check("the largest ones", evals[:K], peer(net, loss, (X, y)).flip(0), 1e-3)

# %%
# Signal and noise
# ----------------
# Each sample has a slope along each eigenvector; where their mean is larger than its
# standard error, a step along it is no guess.

slopes, _ = vl.directional_derivatives(risk, pairs)
projected = pairs.eigenvectors.T @ risk.gradient()
check("mean slopes and the gradient", slopes.mean(0), projected, 1e-3)
ratio = (slopes.mean(0).square() / (slopes.var(0) / len(X))).flip(0)
clear = int((ratio > 1).sum())
print(f"{clear} of {SHOWN} directions have a mean slope above its noise.")

# %%
# The picture
# -----------

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
axes[0].plot(sharpness, label="λ₁ η/2")
axes[0].plot(overlaps, label=f"|gradient|² in {K} eigenvectors", alpha=0.7)
axes[0].plot([loss / losses[0] for loss in losses], label="loss / first loss")
axes[0].axhline(1.0, color="0.5", linewidth=1)
axes[0].set(xlabel="step", title="At the edge of stability (squares)")
axes[0].legend()
rank = range(1, SHOWN + 1)
axes[1].semilogy(rank, evals[:SHOWN], ".", label="G")
axes[1].semilogy(rank[:C], of_means[:C], "x", label="class means")
axes[1].legend()
axes[1].axvline(C - 0.5, color="0.5", linewidth=1)
axes[1].set(xlabel="rank", title="Eigenvalues, and C − 1 (cross-entropy)")
axes[2].semilogy(rank, ratio, ".", color="tab:red")
axes[2].axhline(1.0, color="0.5", linewidth=1)
axes[2].set(xlabel="rank", title="Signal to noise of the mean slope")
figure.savefig(output / "training.png", dpi=150)
print(f"\nSaved {output / 'training.png'}.")
