"""
Pruning by the inverse curvature, and elastic weight consolidation
==================================================================

Which weights can go? To second order, setting weight i to zero and letting the others
make up for it costs θᵢ²/(2 [A⁻¹]ᵢᵢ) (optimal brain surgeon; Hassibi & Stork 1993), with
A = G + δ I. Woodbury's identity has A⁻¹ for all weights of a net, and the surgery of
many weights at once is a small solve with a submatrix of A⁻¹.

And which weights must stay? Those that an old task's curvature F is large for: a new
task is learnt with the penalty ½ c (θ − θ₀)ᵀ F (θ − θ₀) (elastic weight consolidation;
Kirkpatrick et al. 2017, arXiv:1612.00796), with the diagonal of F or all of it.

``python examples/pruning_and_ewc.py [--output FOLDER]``
"""

from __future__ import annotations

import copy

import matplotlib
import torch
from _autograd import cross_entropy_ggn
from _digits import check, digits, folder, timed, train
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHARES = [0.3, 0.5, 0.6, 0.7, 0.8]
DAMPING = 1e-3

# %%
# A net on 400 digits
# -------------------

output = folder(str(__doc__))
torch.set_num_threads(1)
X, y = digits(400)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


# %%
# Pruning
# -------
# The inverse is an operator. Its diagonal says what each weight is worth; columns of
# it say how the others make up for those that go.


net, loss = make_net(), nn.CrossEntropyLoss()
train(net, lambda: loss(net(X), y), 150, decay=1e-3)
risk = vl.EmpiricalRisk(net, loss, (X, y))
theta, D = risk.flatten(risk.params), risk.num_params
S = (vl.GGN(risk) + DAMPING * vl.Identity(D)).inv()
variances, seconds = timed(S.diagonal)
print(f"The diagonal of (G + δ I)⁻¹, D = {D}: {seconds:.2f} s")
dense = cross_entropy_ggn(net, X) / len(X) + DAMPING * torch.eye(D).double()
check("it and a dense inverse", variances, dense.inverse().diagonal(), 1e-3)


def after(vector: Tensor, gone: Tensor) -> float:
    """The loss at a vector whose entries in some places are zero."""
    return risk.at(vector.index_fill(0, gone, 0.0)).value().item()


losses: dict[str, list[float]] = {"magnitude": [], "curvature": [], "surgery": []}
for count in (int(share * D) for share in SHARES):
    losses["magnitude"].append(after(theta, theta.square().argsort()[:count]))
    gone = (theta.square() / variances).argsort()[:count]
    losses["curvature"].append(after(theta, gone))
    # The others move by −S E (Eᵀ S E)⁻¹ θ_gone, with the unit columns E.
    S_gone = S @ torch.eye(D)[:, gone]
    step = -S_gone @ torch.linalg.solve(S_gone[gone], theta[gone])
    losses["surgery"].append(after(theta + step, gone))
print(f"loss {risk.value():.3f}; without a share of the weights:")
for name, row in losses.items():
    print(f"  {name:10}" + "".join(f"{value:8.3f}" for value in row))
if not all(s < c < m for m, c, s in zip(*losses.values(), strict=True) if m > 0.2):
    raise AssertionError("curvature does not choose better than magnitude")

# %%
# Elastic weight consolidation
# ----------------------------
# The penalty is a product with F, any operator; gradients flow through it. The digits
# 0–4 are learnt first, then 5–9.

old, new = ((X[half], y[half]) for half in (y < 5, y >= 5))
learner = make_net()
train(learner, lambda: loss(learner(old[0]), old[1]), 150, decay=1e-3)
risk = vl.EmpiricalRisk(learner, loss, old)
theta, G = risk.flatten(risk.params), vl.GGN(risk)
exact = cross_entropy_ggn(learner, old[0]).diagonal() / len(old[0])
check("the diagonal and autograd", G.diagonal(), exact, 1e-4)


def learnt(F: vl.TorchLinearOperator) -> list[float]:
    """Accuracies on the old and on the new task, which is learnt with a penalty."""
    net = copy.deepcopy(learner)

    def objective() -> Tensor:
        d = parameters_to_vector(net.parameters()) - theta
        return loss(net(new[0]), new[1]) + 50 * d @ (F @ d)

    train(net, objective, 150, decay=1e-3)
    return [(net(X).argmax(1) == y).double().mean().item() for X, y in (old, new)]


penalties = {"none": 0.0 * G, "diagonal": vl.Diagonal(G.diagonal()), "GGN": G}
accuracies = {name: learnt(F) for name, F in penalties.items()}
print("Accuracy on the digits 0–4, and on 5–9 learnt afterwards; penalty:")
for name, (before, afterwards) in accuracies.items():
    print(f"  {name:10}{before:8.1%}{afterwards:8.1%}")
both = [sum(pair) for pair in accuracies.values()]
if not both == sorted(both):
    raise AssertionError("the curvature does not keep what was learnt")

# %%
# The picture
# -----------
# Weights that curvature chooses may go in larger numbers; surgery brings most of the
# rest back.

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, row in losses.items():
    axes[0].semilogy(SHARES, row, "o-", label=name)
axes[0].set(xlabel="share of weights that are zero", title="Loss after pruning")
axes[0].legend()
for offset, pair in enumerate(accuracies.values()):
    axes[1].bar([offset - 0.2, offset + 0.2], pair, 0.4, color=["C0", "C1"])
axes[1].set_xticks(range(len(accuracies)), accuracies)
axes[1].set(xlabel="penalty", title="Accuracy: old task (blue), new task (orange)")
figure.savefig(output / "pruning_and_ewc.png", dpi=150)
print(f"\nSaved {output / 'pruning_and_ewc.png'}.")
