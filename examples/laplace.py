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
from typing import Any

import matplotlib
import torch
from _digits import check, digits, folder, installed, timed, train
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N, DECAY = 100, 1.0
STRUCTURES = {"full": "full", "kfac": "kron", "ekfac": None, "diag": "diag"}

# %%
# What it is compared with
# ------------------------
# A dense Hessian by automatic differentiation, and laplace-torch.


def dense_evidence(risk: vl.EmpiricalRisk, G: Tensor, tau: float) -> float:
    """log p(data) with a dense Hessian of the negative log-likelihood."""
    theta = risk.flatten(risk.params).double()
    fit = -risk.value().item() / risk.reduction_factor - 0.5 * tau * theta @ theta
    precision = G + tau * torch.eye(len(G), dtype=torch.float64)
    return float(fit + 0.5 * len(G) * math.log(tau) - 0.5 * precision.logdet())


def dense_ggn(net: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_n J_nᵀ H_n J_n and all J_n by autograd, in float64."""
    params = {name: p.detach().double() for name, p in net.named_parameters()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(net, params, (X.double(),))
        return result

    J = torch.cat(
        [j.flatten(2) for j in torch.func.jacrev(outputs)(params).values()], 2
    )
    p = outputs(params).softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return (H @ J).flatten(0, 1).T @ J.flatten(0, 1), J


def peer(net: nn.Module, data: TensorDataset, structure: str | None, tau: float) -> str:
    """laplace-torch on the same net: its evidence and its seconds."""
    laplace = structure and installed("laplace")
    if not laplace:
        return "–"

    def fit() -> Any:
        la = laplace.Laplace(
            net, "classification", "all", structure, prior_precision=tau
        )
        la.fit(DataLoader(data, batch_size=N))
        return la.log_marginal_likelihood()

    evidence, seconds = timed(fit)
    return f"{float(evidence):.2f}, {seconds:.2f} s"


def auroc(higher: Tensor, lower: Tensor) -> float:
    """How often a value of the first is larger than one of the second."""
    labels = [1] * len(higher) + [0] * len(lower)
    return float(roc_auc_score(labels, torch.cat([higher, lower])))


# %%
# A net on a hundred digits
# -------------------------

output = folder(str(__doc__))
torch.set_num_threads(1)
(X, y), (X_test, y_test) = digits(N), digits(400, skip=N)
# No digits: each pixel is from another picture.
generator = torch.Generator().manual_seed(0)
others = torch.randint(len(X_test), (300, 64), generator=generator)
no_digits = torch.gather(X_test, 0, others)
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
# deviation than a digit.

taus = torch.logspace(-2, 2, 30)
curves, found, spread = {}, {}, {}
print("                                   AUROC of")
print("structure      τ   evidence  seconds  no digits   errors   laplace-torch")
for name in [*STRUCTURES, "last_layer"]:

    def fit(name: str = name) -> vl.Laplace:
        la = vl.Laplace(risk, DECAY, name)
        la.optimize_prior()
        return la

    found[name], seconds = timed(fit)
    la, tau = found[name], float(found[name].prior_precision)
    curves[name] = [la.log_marginal_likelihood(t.item()).item() for t in taus]
    on_digits, on_others = la.predictive(X_test), la.predictive(no_digits)
    spread[name] = [
        each.covariance.diagonal(dim1=1, dim2=2).sum(1).sqrt()
        for each in (on_others, on_digits)
    ]
    doubt = -on_digits.probabilities().amax(1)
    line = f"{name:10}{tau:7.2f}{la.log_marginal_likelihood():11.2f}{seconds:9.2f}"
    line += f"{auroc(*spread[name]):11.3f}{auroc(doubt[wrong], doubt[~wrong]):9.3f}"
    peers = peer(net, TensorDataset(X, y), STRUCTURES.get(name), tau)
    print(f"{line}   {peers}")

# %%
# What the probabilities alone say
# --------------------------------

alone, alone_others = (
    -net(inputs).detach().softmax(1).amax(1) for inputs in (X_test, no_digits)
)
baseline = auroc(alone_others, alone)
errors = auroc(alone[wrong], alone[~wrong])
print(f"the net's own probabilities:          {baseline:10.3f}{errors:9.3f}")
if not auroc(*spread["full"]) > baseline:
    raise AssertionError("the posterior does not know what it has not seen")

# %%
# Checks against a dense matrix
# -----------------------------

la, (G, J) = found["full"], dense_ggn(net, X)
tau = float(la.prior_precision)
evidence = dense_evidence(risk, G, tau)
check("evidence and a dense matrix", la.log_marginal_likelihood(), evidence, 1e-4)
covariance = (G + tau * torch.eye(len(G), dtype=torch.float64)).inverse()
exact = J @ covariance @ J.mT
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
