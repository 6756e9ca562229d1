"""
Preconditioners for conjugate gradients on the damped GGN: which of them pay
============================================================================

Solves (G + δ I) x = g with SciPy's ``cg`` on scikit-learn's digits, for softmax
regression and for a net with three layers; without a preconditioner, with the GGN's own
diagonal, with KFAC (its damped inverse exact, or π-damped), and with the GGN of 128 of
the 512 samples, inverted exactly by Woodbury's identity. All of them go to ``cg`` as
they are, as ``A`` and as ``M=``.

KFAC pays where its blocks are good and the layers hardly interact, as in regression. In
deep nets what a block-diagonal leaves out decides, and the GGN of a subset pays.

``python examples/preconditioner.py [--output FOLDER]``
"""

from __future__ import annotations

import time
from collections.abc import Callable

import matplotlib
import numpy as np
import torch
from _digits import folder
from scipy.sparse.linalg import cg
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vivit_linop as vl

matplotlib.use("Agg")  # draws to files, so that no display is needed
import matplotlib.pyplot as plt

NUM_SAMPLES = 512
NUM_SUBSET = 128
DAMPINGS = (1e-1, 1e-2)
TOLERANCE = 1e-6

# %%
# Two nets on digits
# ------------------


def load_data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    X = torch.tensor(digits.images / 16.0).unsqueeze(1)
    order = torch.randperm(len(X))
    return X[order], torch.tensor(digits.target)[order]


def make_nets() -> dict[str, nn.Module]:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU()]
    layers += [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    return {
        "softmax regression": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(),
        "net with three layers": nn.Sequential(*layers).double(),
    }


def train(net: nn.Module, loss: nn.Module, X: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            loss(net(X[batch]), y[batch]).backward()
            optimizer.step()


# %%
# Conjugate gradients
# -------------------
# SciPy’s solver, with the iterates, for one damping and one preconditioner after the
# other; residuals at the smallest damping.


def solve(
    A: vl.TorchLinearOperator, b: np.ndarray, M: vl.TorchLinearOperator | None
) -> tuple[list[np.ndarray], float]:
    """Return the iterates of ``cg`` and its time."""
    iterates: list[np.ndarray] = []
    start = time.perf_counter()
    _, info = cg(
        A,
        b,
        M=M,
        rtol=TOLERANCE,
        maxiter=5000,
        callback=lambda x: iterates.append(x.copy()),
    )
    seconds = time.perf_counter() - start
    if info != 0:
        raise AssertionError(f"cg: has not converged, info={info}")
    return iterates, seconds


def residuals(
    A: vl.TorchLinearOperator, b: np.ndarray, iterates: list[np.ndarray]
) -> np.ndarray:
    """Return the residual of each iterate, relative to ``b``."""
    found = np.linalg.norm(A @ np.stack(iterates, 1) - b[:, None], axis=0)
    return found / np.linalg.norm(b)


def timed(
    what: str, build: Callable[[], vl.TorchLinearOperator | Tensor]
) -> vl.TorchLinearOperator | Tensor:
    start = time.perf_counter()
    result = build()
    print(f"  {what}: {time.perf_counter() - start:.2f} s")
    return result


def compare(risk: vl.EmpiricalRisk) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the residuals at the smallest damping, and all numbers of iterations."""
    G, g, D = vl.GGN(risk), risk.gradient().numpy(), risk.num_params
    G @ g  # makes the linearisation
    print(" built once, for all dampings:")
    diagonal = timed("G.diagonal()", G.diagonal)
    K = timed("KFAC", lambda: vl.KFAC(risk, variant="exact", joint_bias=True))
    part = vl.GGN(risk.subset(range(NUM_SUBSET)))
    timed(f"Gram matrix of {NUM_SUBSET} samples", part.gram.to_dense)
    preconditioners: dict[str, Callable[[float], vl.TorchLinearOperator | None]] = {
        "none": lambda delta: None,
        "diagonal": lambda delta: vl.Diagonal(diagonal + delta).inv(),
        "KFAC, π-damped": lambda delta: K.pi_damped(delta).inv(),
        "KFAC": lambda delta: (K + delta * vl.Identity(D)).inv(),
        "GGN of a subset": lambda delta: (part + delta * vl.Identity(D)).inv(),
    }
    print(f" iterations to a residual of {TOLERANCE:.0e}, and seconds:")
    print("   delta" + "".join(f"{name:>18}" for name in preconditioners))
    counts = []
    for delta in DAMPINGS:
        A, iterates = G + delta * vl.Identity(D), {}
        line = f"{delta:8.0e}"
        for name, build in preconditioners.items():
            iterates[name], seconds = solve(A, g, build(delta))
            line += f"{len(iterates[name]):8d}{seconds:8.2f} s"
        print(line)
        counts.append([len(each) for each in iterates.values()])
    curves = {name: residuals(A, g, each) for name, each in iterates.items()}
    return curves, np.array(counts)


# %%
# Which of them pay
# -----------------

output = folder(str(__doc__))
start = time.perf_counter()
torch.set_num_threads(1)  # small products
torch.manual_seed(0)
X, y = load_data()
loss = nn.CrossEntropyLoss()
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
iterations = []
for ax, (name, net) in zip(axes, make_nets().items(), strict=True):
    train(net, loss, X, y, epochs=5)
    risk = vl.EmpiricalRisk(net.eval(), loss, (X[:NUM_SAMPLES], y[:NUM_SAMPLES]))
    print(f"\n{name}, {risk.num_params} parameters, {risk.num_samples} samples")
    curves, counts = compare(risk)
    iterations.append(counts)
    for kind, curve in curves.items():
        ax.loglog(np.arange(1, len(curve) + 1), curve, label=kind)
    ax.set(xlabel="iteration of cg", ylabel="relative residual")
    ax.set_title(f"{name}, δ = {DAMPINGS[-1]:g}")

# %%
# The picture
# -----------

regression, deep = iterations
if not (regression[:, 3] < regression[:, 0]).all():
    raise AssertionError("KFAC has not paid for softmax regression")
if not (deep[:, 4] < deep[:, 0]).all():
    raise AssertionError("the GGN of a subset has not paid for the net")
axes[0].legend(title="preconditioner")
picture = output / "preconditioner.png"
figure.savefig(picture, dpi=150)
print(f"\nSaved {picture}. All of this took {time.perf_counter() - start:.0f} s.")
