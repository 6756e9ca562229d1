"""
Curvature of a convolutional net on scikit-learn's digits, start to finish
==========================================================================

Trains the net, takes its generalised Gauss-Newton matrix (GGN) G and the factor V of
G = V Vᵀ as linear operators, and puts them to use. What is computed is checked on the
way: against dense automatic differentiation, against SciPy's Lanczos solver on this
operator and on that of curvlinops, and against conjugate gradients.

``python examples/quickstart.py [--output FOLDER]``
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import curvlinops
import matplotlib
import numpy as np
import torch
from _digits import check, folder, timed
from scipy.sparse.linalg import cg, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

import vivit_linop as vl

matplotlib.use("Agg")  # draws to files, so that no display is needed
import matplotlib.pyplot as plt

Data = tuple[Tensor, Tensor]

NUM_TRAIN = 1500  # the other 297 images are held out
NUM_CURVATURE = 128  # training images that the curvature is taken on
K = 10  # leading eigenpairs
DAMPING = 1e-2
# Where eigsh stops, relative to each eigenvalue: about what float32 can give. Its
# default is float64 precision, which it would work for in vain.
LANCZOS_TOLERANCE = 1e-5

# %%
# Data, net and training
# ----------------------


def load_data() -> tuple[Data, Data]:
    """Return shuffled images [N, 1, 8, 8] with values in [0, 1] and their classes."""
    digits = load_digits()
    X = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(X))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return (X[train], y[train]), (X[test], y[test])


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(net: nn.Module, loss: nn.Module, data: Data, epochs: int = 5) -> None:
    X, y = data
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            loss(net(X[batch]), y[batch]).backward()
            optimizer.step()


# %%
# What the operators are compared with
# ------------------------------------


def dense_ggn_columns(net: nn.Module, data: Data, indices: Tensor) -> Tensor:
    """Return columns of G = (1/N) Σ_n J_nᵀ H_n J_n by dense autograd in float64."""
    X, y = data[0].double(), data[1]
    params = {name: p.detach().double() for name, p in net.named_parameters()}

    def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, params, (x.unsqueeze(0),)).squeeze(0)

    jacobians = vmap(jacrev(output), (None, 0))(params, X)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)  # [N, C, D]
    outputs = vmap(output, (None, 0))(params, X)
    H = vmap(hessian(nn.functional.cross_entropy))(outputs, y)  # [N, C, C]
    HJ = H @ J[:, :, indices]
    return J.flatten(0, 1).T @ HJ.flatten(0, 1) / len(X)


def leading_eigenpairs(
    net: nn.Module, loss: nn.Module, data: Data, k: int
) -> dict[str, Callable[[], tuple[np.ndarray, str]]]:
    """Three ways to the k largest eigenvalues, ascending, and their eigenvectors.

    Each starts from net, loss and data, so that its time has all of its set-up in it.
    """

    def ours() -> tuple[np.ndarray, str]:
        # Through the Gram matrix VᵀV: its dense eigenpairs, or ARPACK on VᵀV as an
        # operator, whichever a cost model expects to be cheaper.
        pairs = vl.GGN(net, loss, data).eigh(k=k)
        evals, _evecs = pairs
        return evals.numpy(), pairs.route

    def lanczos() -> tuple[np.ndarray, str]:
        G = vl.GGN(net, loss, data)
        return eigsh(G, k=k, tol=LANCZOS_TOLERANCE)[0], "ARPACK on G"

    def lanczos_curvlinops() -> tuple[np.ndarray, str]:
        # Its check for determinism takes extra passes over the data.
        G = curvlinops.GGNLinearOperator(
            net, loss, list(net.parameters()), [data], check_deterministic=False
        )
        return eigsh(G.to_scipy(), k=k, tol=LANCZOS_TOLERANCE)[0], "ARPACK on G"

    return {
        "G.eigh(k)": ours,
        "eigsh(G, k)": lanczos,
        "eigsh(curvlinops, k)": lanczos_curvlinops,
    }


# %%
# The picture
# -----------


def plot(
    path: Path,
    spectrum: Tensor,
    smallest: float,
    baseline: np.ndarray,
    gammas: Tensor,
    lambdas: Tensor,
) -> None:
    """Draw the spectrum, and slopes and curvatures of all images per direction.

    ``smallest`` is the smallest eigenvalue that is above rounding error.
    """
    figure = plt.figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplot_mosaic([["spectrum", "slopes"], ["spectrum", "curvatures"]])

    ax = axes["spectrum"]
    largest_first = spectrum.flip(0)
    rank = np.arange(1, len(spectrum) + 1)
    bottom = smallest / 30
    ax.loglog(rank, largest_first, ".", markersize=4, label="Gram matrix, all")
    ax.loglog(rank[:K], baseline[::-1], "o", mfc="none", label=f"Lanczos, first {K}")
    ax.axhspan(bottom, smallest, color="0.9", zorder=0)
    ax.text(1, smallest / 2, "within rounding error of float32", color="0.3", va="top")
    ax.set(ylim=(bottom, None), xlabel="rank k (log scale)")
    ax.set_ylabel("eigenvalue λ$_k$ (log scale)")
    ax.set_title(f"Spectrum of the GGN on {len(gammas)} digits")
    ax.legend()

    # Direction 1 is that of the largest eigenvalue. Each image gets one sideways
    # shift, so that the dots of a direction do not hide each other.
    gammas, lambdas = gammas.flip(1), lambdas.flip(1)
    directions = np.arange(1, K + 1)
    shifts = np.linspace(-0.3, 0.3, len(gammas))[:, None]
    dots = {"s": 6, "alpha": 0.4, "linewidths": 0}
    mean = {"color": "black", "marker": "_", "s": 250}

    ax = axes["slopes"]
    ax.axhline(0.0, color="0.7", linewidth=1)
    ax.scatter(directions + shifts, gammas, **dots, color="tab:red")
    ax.scatter(directions, gammas.mean(0), **mean)
    ax.set_yscale("symlog", linthresh=0.1)  # linear between the ticks ±0.1
    ax.set(ylabel="slope γ$_{nk}$ (symlog scale)", xticks=directions)
    ax.set_title("Along eigenvector k: dot = image n, bar = mean")

    ax = axes["curvatures"]
    ax.scatter(directions + shifts, lambdas, **dots, color="tab:blue")
    ax.scatter(directions, lambdas.mean(0), **mean)
    ax.set(ylabel="curvature λ$_{nk}$ (log scale)", yscale="log")
    ax.set(xlabel="direction k", xticks=directions)

    figure.savefig(path, dpi=150)


# %%
# The tour: a trained net
# -----------------------

output = folder(str(__doc__))
start = time.perf_counter()
# The net is too small for threads to help, and one thread that shares its cores
# with other programs is not slowed down by them as much as several are.
torch.set_num_threads(1)
torch.manual_seed(0)
data, test_data = load_data()
net, loss = make_net(), nn.CrossEntropyLoss()
_, seconds = timed(lambda: train(net, loss, data))
net.eval()
accuracy = (net(test_data[0]).argmax(1) == test_data[1]).float().mean()
print(
    f"Trained on {NUM_TRAIN} digits in {seconds:.1f} s. Of {len(test_data[0])} "
    f"others, {accuracy:.1%} are recognised."
)

# %%
# A risk and its operators
# ------------------------

# A model, a loss and data make a risk; operators are made from it.
subset = (data[0][:NUM_CURVATURE], data[1][:NUM_CURVATURE])
risk = vl.EmpiricalRisk(net, loss, subset)
G = vl.GGN(risk)
V = G.factor
print(f"\nOn {risk.num_samples} of the digits, with {risk.num_params} parameters:")
print(f"  G is {G.shape[0]} x {G.shape[1]}, in {G.torch_dtype}")
print(f"  V is {V.shape[0]} x {V.shape[1]}: {V.width} columns per digit")

print("\nColumns of G against dense autograd in float64:")
indices = torch.randperm(risk.num_params)[:20]
reference = dense_ggn_columns(net, subset, indices)
units = nn.functional.one_hot(indices, risk.num_params).float().T  # [D, 20]
check("G @ units", G @ units, reference, 1e-5)
check("V @ (V.T @ units)", V @ (V.T @ units), reference, 1e-5)

# %%
# The ten largest eigenvalues, in three ways
# ------------------------------------------

# The first use of torch.func imports a lot. Two digits take it out of the times.
few = (subset[0][:2], subset[1][:2])
for function in leading_eigenpairs(net, loss, few, 1).values():
    function()
ways = leading_eigenpairs(net, loss, subset, K)
results = {name: timed(function) for name, function in ways.items()}
evals = [evals for (evals, _), _ in results.values()]
print(f"\nThe {K} largest eigenvalues of G, with eigenvectors:")
print(" rank" + "".join(f"{name:>22}" for name in results))
for k in reversed(range(K)):
    print(f"{K - k:5}" + "".join(f"{column[k]:22.4f}" for column in evals))
print("  way" + "".join(f"{way:>22}" for (_, way), _ in results.values()))
print(" time" + "".join(f"{seconds:20.2f} s" for _, seconds in results.values()))
*others, baseline = evals
for name, column in zip(ways, others, strict=False):
    check(f"{name} and curvlinops", column, baseline, 1e-4)

# %%
# All eigenvalues
# ---------------

# G computes its Gram matrix once. All that follows is taken from it.
pairs, seconds = timed(G.eigh)
print(
    f"\nThe Gram matrix gives all of the spectrum, {V.shape[1]} eigenvalues, in "
    f"{seconds:.2f} s;\n{len(pairs)} of them are above rounding error."
)
check("the largest and curvlinops", pairs.eigenvalues[-K:], baseline, 1e-4)

# %%
# A damped system
# ---------------

print(f"\nThe damped system (G + δ I) x = g with δ = {DAMPING}:")
g = risk.gradient()
damped = G + DAMPING * vl.Identity(risk.num_params)
woodbury, seconds = timed(lambda: damped.inv() @ g)
print(f"  Woodbury, damped.inv() @ g: {seconds:.3f} s")
steps: list[np.ndarray] = []
(solution, info), seconds = timed(
    lambda: cg(damped, g.numpy(), rtol=1e-5, callback=steps.append)
)
print(f"  SciPy, cg(damped, g): {seconds:.3f} s, {len(steps)} products with G")
if info != 0:
    raise AssertionError(f"cg: has not converged, info={info}")
check("Woodbury and cg", woodbury, solution, 1e-3)

# %%
# Slopes and curvatures of single digits
# --------------------------------------

print("\nAlong the leading eigenvectors, mean over the digits:")
leading = G.eigh(k=K)
gammas, lambdas = vl.directional_derivatives(risk, leading)
slopes, curvatures = gammas.mean(0), lambdas.mean(0)
print(" rank            |slope|           curvature")
for k in reversed(range(K)):
    print(f"{K - k:5}{slopes[k].abs():19.4f}{curvatures[k]:20.4f}")
check("mean slope and projected gradient", slopes, leading.eigenvectors.T @ g, 1e-4)
check("mean curvature and eigenvalue", curvatures, leading.eigenvalues, 1e-4)

# %%
# The picture of all that
# -----------------------

picture = output / "quickstart.png"
smallest = pairs.eigenvalues[0].item()
plot(picture, G.eigvalsh(), smallest, baseline, gammas, lambdas)
print(f"\nSaved {picture}. All of this took {time.perf_counter() - start:.0f} s.")
