"""
A Laplace approximation: prior by the evidence, and what a net does not know
============================================================================

The posterior of a net's parameters on scikit-learn's digits is taken to be
N(θ, (G/r + τ I)⁻¹) with the GGN G, or with KFAC, EKFAC, a diagonal, or the last layer's
GGN in its place (MacKay 1992; Daxberger et al. 2021, arXiv:2106.14806). The prior
precision τ is the one of the largest evidence. The variance of the outputs then tells
digits from pictures that are none, better than the net's own probabilities do.
laplace-torch's evidence and seconds stand beside, if it is installed.

``python examples/laplace.py [--output FOLDER]``
"""

from __future__ import annotations

import math

import matplotlib
import torch
from _autograd import cross_entropy_ggn, jacobians
from _digits import check, digits, folder, installed, timed, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N, DECAY = 100, 1.0
# And what laplace-torch calls them.
STRUCTURES = {
    "full": "full",
    "kfac": "kron",
    "ekfac": None,
    "diag": "diag",
    "last_layer": None,
}

# %%
# A net on a hundred digits
# -------------------------

output = folder(str(__doc__))
torch.set_num_threads(1)
(X, y), (X_test, y_test) = digits(N), digits(400, skip=N)
# No digits: each pixel is from another picture.
generator = torch.Generator().manual_seed(0)
others = torch.randint(len(X_test), (300, 64), generator=generator)
pictures = torch.gather(X_test, 0, others), X_test
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
loss = nn.CrossEntropyLoss()
train(net, lambda: loss(net(X), y), 200, decay=DECAY / N)
risk = vl.EmpiricalRisk(net, loss, (X, y))
wrong = net(X_test).argmax(1) != y_test

# %%
# Five structures, each with its own prior
# ----------------------------------------
# The area under the ROC curve says how often a picture that is no digit has a larger
# deviation than a digit. laplace-torch has its evidence at the same prior.


def auroc(higher: Tensor, lower: Tensor) -> float:
    """How often a value of the first is larger than one of the second."""
    return (higher[:, None] > lower).double().mean().item()


def fitted(structure: str) -> vl.Laplace:
    la = vl.Laplace(risk, DECAY, structure)
    la.optimize_prior()
    return la


def peer(structure: str, tau: float) -> float:
    """The evidence by laplace-torch."""
    kind = "classification", "all", structure
    la = torch_laplace.Laplace(net, *kind, prior_precision=tau)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=N))
    return float(la.log_marginal_likelihood())


taus, torch_laplace = torch.logspace(-2, 2, 30), installed("laplace")
curves, found, spread = {}, {}, {}
print("                                   AUROC of")
print("structure      τ   evidence  seconds  no digits   errors   laplace-torch")
for name, theirs in STRUCTURES.items():
    la, seconds = timed(lambda name=name: fitted(name))
    found[name], tau = la, la.prior_precision.item()
    curves[name] = [la.log_marginal_likelihood(t.item()).item() for t in taus]
    predicted = [la.predictive(inputs) for inputs in pictures]
    spread[name] = [p.covariance.diagonal(0, 1, 2).sum(1).sqrt() for p in predicted]
    doubt = -predicted[1].probabilities().amax(1)
    print(
        f"{name:10}{tau:7.2f}{la.log_marginal_likelihood():11.2f}{seconds:9.2f}"
        f"{auroc(*spread[name]):11.3f}{auroc(doubt[wrong], doubt[~wrong]):9.3f}",
        end="   ",
    )
    if theirs and torch_laplace:
        evidence, seconds = timed(lambda s=theirs, t=tau: peer(s, t))
        print(f"{evidence:.2f}, {seconds:.2f} s", end="")
    print()

# %%
# What the probabilities alone say
# --------------------------------

alone_others, alone = (-net(x).softmax(1).amax(1) for x in pictures)
baseline = auroc(alone_others, alone)
errors = auroc(alone[wrong], alone[~wrong])
print(f"the net's own probabilities:          {baseline:10.3f}{errors:9.3f}")
if not auroc(*spread["full"]) > baseline:
    raise AssertionError("the posterior does not know what it has not seen")

# %%
# Checks against a dense matrix
# -----------------------------
# Evidence is log p(data, θ) and a Gaussian integral.

la, J = found["full"], jacobians(net, X)
tau, theta, D = la.prior_precision.item(), risk.flatten(risk.params), risk.num_params
precision = cross_entropy_ggn(net, X) + tau * torch.eye(D).double()
fit = N * risk.value() + 0.5 * tau * theta.square().sum()
evidence = -fit + 0.5 * D * math.log(tau) - 0.5 * precision.logdet()
check("evidence and a dense matrix", la.log_marginal_likelihood(), evidence, 1e-4)
exact = J @ precision.inverse() @ J.mT
check("covariances of outputs", la.predictive(X).covariance, exact, 1e-3)

# %%
# The picture
# -----------

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, values in curves.items():
    axes[0].semilogx(taus, values, label=name)
    axes[0].plot(float(found[name].prior_precision), max(values), "k.")
axes[0].set(xlabel="prior precision τ", title="Evidence")
axes[0].legend()
for label, values in zip(["no digits", "digits"], spread["full"], strict=True):
    axes[1].hist(values, bins=30, alpha=0.6, density=True, label=label)
axes[1].set(xlabel="deviation of the outputs", title="What it does not know")
axes[1].legend()
figure.savefig(output / "laplace.png", dpi=150)
print(f"\nSaved {output / 'laplace.png'}.")
