"""
Every quantity of BackPACK's extensions, as an operator or one method of it
===========================================================================

On scikit-learn's digits, for a linear model side by side with BackPACK, with its
scalings, and for a residual net with layer norm that BackPACK cannot do. What is
defined by a recursion over registered layers (KFRA, the positive-curvature Hessian) is
BackPACK's own, carried into an operator; it is refused for the residual net.

``python examples/all_quantities.py [--output FOLDER]``
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from _digits import folder
from backpack import backpack, extend, extensions
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vivit_linop as vl

matplotlib.use("Agg")  # draws to files, so that no display is needed
import matplotlib.pyplot as plt

NUM_SAMPLES = 64
NUM_VECTORS = 3  # that blocks are multiplied with

# %%
# A net that BackPACK cannot extend
# ---------------------------------


class ResidualNet(nn.Module):
    """Layer norm, GELU and a skip connection: no rules of BackPACK for any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 8)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 8)
        self.last = nn.Linear(8, 10)

    def forward(self, X: Tensor) -> Tensor:
        hidden = self.first(X.flatten(1))
        hidden = hidden + nn.functional.gelu(self.inner(self.norm(hidden)))
        return self.last(hidden)


# %%
# Each quantity, here and there
# -----------------------------
# What is written on the left computes it here; the extension and its field are
# BackPACK’s.


@dataclass
class Quantity:
    """How it is computed here, and by BackPACK.

    Attributes:
        name: What it is.
        ours: A function of the risk that returns a tensor or an operator.
        extension: Makes BackPACK's extension, or None where it has none.
        theirs: From the parameters with BackPACK's results to what ``ours`` is, for a
            check; None where they cannot be compared (random, or other columns).
    """

    name: str
    ours: Callable[[vl.EmpiricalRisk], Any]
    extension: Callable[[], Any] | None = None
    theirs: Callable[[list[nn.Parameter], vl.EmpiricalRisk], Tensor] | None = None


def entries(field: str, leading: int = 0) -> Callable[..., Tensor]:
    """The entries of all parameters side by side, as BackPACK scales them."""

    def gather(parameters: list[nn.Parameter], risk: vl.EmpiricalRisk) -> Tensor:
        parts = [getattr(p, field).flatten(leading) for p in parameters]
        return torch.cat(parts, dim=leading)

    return gather


def dense(field: str) -> Callable[..., Tensor]:
    """The matrix of Kronecker factors."""

    def form(parameters: list[nn.Parameter], risk: vl.EmpiricalRisk) -> Tensor:
        return vl.from_backpack(parameters, field).to_dense()

    return form


def vectors(risk: vl.EmpiricalRisk) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(risk.num_params, NUM_VECTORS, generator=generator)


def products(field: str) -> Callable[..., Tensor]:
    def multiply(parameters: list[nn.Parameter], risk: vl.EmpiricalRisk) -> Tensor:
        parts = zip(parameters, risk.unflatten(vectors(risk)), strict=True)
        return risk.flatten([getattr(p, field)(part) for p, part in parts])

    return multiply


def with_r(function: Callable[[vl.EmpiricalRisk], Tensor], power: int = 1) -> Any:
    """BackPACK has r = 1/N in quantities of single samples."""
    return lambda risk: risk.reduction_factor**power * function(risk)


def quantities() -> list[Quantity]:
    U, G, H = vl.PerSampleGradients, vl.GGN, vl.Hessian
    by_parameter = "parameter"
    return [
        Quantity(
            "per-sample gradients",
            with_r(lambda risk: U(risk).to_dense().T),
            extensions.BatchGrad,
            entries("grad_batch", 1),
        ),
        Quantity(
            "variance",
            with_r(lambda risk: U(risk).variance(), 2),
            extensions.Variance,
            entries("variance"),
        ),
        Quantity(
            "second moment",
            lambda risk: risk.reduction_factor * U(risk).second_moment(),
            extensions.SumGradSquared,
            entries("sum_grad_squared"),
        ),
        Quantity(
            "squared norms",
            with_r(lambda risk: U(risk).squared_norms(by_parameter), 2),
            extensions.BatchL2Grad,
            lambda ps, risk: torch.stack([p.batch_l2 for p in ps], dim=1),
        ),
        Quantity(
            "covariance of gradients", lambda risk: U(risk).covariance().eigvalsh()
        ),
        Quantity(
            "centred Gram matrix",
            lambda risk: U(risk).covariance().gram.to_dense(),
        ),
        Quantity(
            "GGN diagonal",
            lambda risk: G(risk).diagonal(),
            extensions.DiagGGNExact,
            entries("diag_ggn_exact"),
        ),
        Quantity(
            "GGN diagonal, MC",
            lambda risk: G(risk, mc_samples=1).diagonal(),
            extensions.DiagGGNMC,
        ),
        Quantity(
            "GGN diagonals by sample",
            with_r(lambda risk: G(risk).sample_diagonals()),
            extensions.BatchDiagGGNExact,
            entries("diag_ggn_exact_batch", 1),
        ),
        Quantity(
            "GGN diagonals by sample, MC",
            with_r(lambda risk: G(risk, mc_samples=1).sample_diagonals()),
            extensions.BatchDiagGGNMC,
        ),
        Quantity(
            "square root of the GGN",
            lambda risk: vl.GGNFactor(risk).to_dense(),
            extensions.SqrtGGNExact,
        ),
        Quantity(
            "square root of the GGN, MC",
            lambda risk: vl.GGNFactor(risk, mc_samples=1).to_dense(),
            extensions.SqrtGGNMC,
        ),
        Quantity("KFAC", lambda risk: vl.KFAC(risk), extensions.KFAC),
        Quantity(
            "KFLR",
            lambda risk: vl.KFAC(risk, variant="exact"),
            extensions.KFLR,
            dense("kflr"),
        ),
        Quantity("KFAC, empirical", lambda risk: vl.KFAC(risk, variant="empirical")),
        Quantity("KFRA", lambda risk: vl.KFRA(risk), extensions.KFRA, dense("kfra")),
        Quantity(
            "EKFAC times vectors",
            lambda risk: vl.EKFAC(risk, variant="exact") @ vectors(risk),
        ),
        Quantity(
            "Hessian diagonal",
            lambda risk: H(risk).diagonal(),
            extensions.DiagHessian,
            entries("diag_h"),
        ),
        Quantity(
            "Hessian diagonal, estimated",
            lambda risk: vl.estimate_diagonal(H(risk), 50, seed=0).diagonal,
        ),
        Quantity(
            "Hessian diagonals by sample",
            with_r(lambda risk: H(risk).sample_diagonals()),
            extensions.BatchDiagHessian,
            entries("diag_h_batch", 1),
        ),
        Quantity(
            "Hessian blocks times vectors",
            lambda risk: H(risk).block_diagonal(by_parameter) @ vectors(risk),
            extensions.HMP,
            products("hmp"),
        ),
        Quantity(
            "GGN blocks times vectors",
            lambda risk: G(risk).block_diagonal(by_parameter) @ vectors(risk),
            extensions.GGNMP,
            products("ggnmp"),
        ),
        Quantity(
            "PCH (clip) times vectors",
            lambda risk: vl.PositiveCurvatureHessian(risk) @ vectors(risk),
            lambda: extensions.PCHMP("pchmp_clip", modify="clip"),
            products("pchmp_clip"),
        ),
        Quantity(
            "PCH (abs) times vectors",
            lambda risk: (
                vl.PositiveCurvatureHessian(risk, modify="abs") @ vectors(risk)
            ),
            lambda: extensions.PCHMP("pchmp_abs", modify="abs"),
            products("pchmp_abs"),
        ),
    ]


# %%
# Side by side
# ------------


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the time of a second call; of the first if that takes long."""
    for _ in range(2):
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        if seconds > 1.0:
            break
    return result, seconds


class Peer:
    """BackPACK on a copy of a model."""

    def __init__(self, net: nn.Module, loss: nn.Module, data: Any) -> None:
        self._net, self._loss = extend(copy.deepcopy(net)), extend(copy.deepcopy(loss))
        self._data = data

    def __call__(self, quantity: Quantity, risk: vl.EmpiricalRisk) -> Any:
        assert quantity.extension is not None
        X, y = self._data
        with warnings.catch_warnings(), backpack(quantity.extension()):
            warnings.simplefilter("ignore")
            self._loss(self._net(X), y).backward()
        parameters = list(self._net.parameters())
        return None if quantity.theirs is None else quantity.theirs(parameters, risk)


def tour(net: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, tuple[float, float]]:
    """Print all quantities; returns the times of ours and BackPACK's."""
    loss = nn.CrossEntropyLoss()
    risk, peer = vl.EmpiricalRisk(net, loss, data), Peer(net, loss, data)
    print(f"{risk.num_params} parameters, {risk.num_samples} digits")
    head = "quantity", "what it is", "ms", "BackPACK"
    print(f"  {head[0]:<28} {head[1]:<26} {head[2]:>9} {head[3]:>9}  relative error")
    times = {}
    for quantity in quantities():
        line = f"  {quantity.name:<28} "
        try:
            value, ours = timed(lambda q=quantity: q.ours(risk))
            what = (
                "x".join(map(str, value.shape))
                + f" {type(value).__name__.replace('Tensor', 'tensor')}"
            )
            line += f"{what:<26} {1e3 * ours:9.1f} "
        except ValueError as error:
            refusal = str(error).split(": ", 2)[-1]
            print(line + f"refused: {refusal[:70]}…")
            continue
        theirs = float("nan")
        if quantity.extension is None:
            line += f"{'–':>9}"
        else:
            try:
                expected, theirs = timed(lambda q=quantity: peer(q, risk))
                line += f"{1e3 * theirs:9.1f}"
                if expected is not None:
                    got = value if isinstance(value, Tensor) else value.to_dense()
                    error = (got - expected).norm() / expected.norm()
                    line += f"{error:16.1e}"
                    if error > 1e-4:
                        raise AssertionError(f"{quantity.name}: differs from BackPACK")
            except (NotImplementedError, AttributeError):
                line += f"{'cannot':>9}"
        print(line)
        times[quantity.name] = ours, theirs
    return times


def check_against_dense(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Check diagonals of what BackPACK cannot do against autograd of single entries."""
    risk = vl.EmpiricalRisk(copy.deepcopy(net).double(), nn.CrossEntropyLoss(), data)
    H = vl.Hessian(risk)
    print(f"\nWhat its Hessian's diagonal will cost, on {risk.num_samples} digits:")
    H.explain_diagonal()
    print("Checks in float64, relative errors:")
    by_samples = risk.reduction_factor * H.sample_diagonals().sum(0)
    error = (H.diagonal() - by_samples).norm() / by_samples.norm()
    print(f"  Hessian diagonal and the sum over samples: {error:.1e}")
    G = vl.GGN(risk)
    J, h = vl.Jacobian(risk).to_dense(), vl.LossHessian(risk).to_dense()
    expected = (J * (h @ J)).sum(0)
    other = (G.diagonal() - expected).norm() / expected.norm()
    print(f"  GGN diagonal and diag(Jᵀ H J): {other:.1e}")
    if not max(error, other) < 1e-10:
        raise AssertionError("diagonals differ from their dense references")


# %%
# On 64 and 4 digits
# ------------------

output = folder(str(__doc__))
start = time.perf_counter()
torch.set_num_threads(1)  # the models are too small for more
torch.manual_seed(0)
digits = load_digits()
X = torch.tensor(digits.images[:NUM_SAMPLES] / 16.0, dtype=torch.float32)
y = torch.tensor(digits.target[:NUM_SAMPLES])

print("A linear model: ", end="")
linear = tour(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (X, y))
print("\nA residual net: ", end="")
net = ResidualNet()
few = slice(4)  # a product with H for each sample and parameter takes its time
residual = tour(net, (X[few], y[few]))
check_against_dense(net, (X.double()[few], y[few]))

# %%
# The picture
# -----------

figure, ax = plt.subplots(figsize=(8, 7), layout="constrained")
names = list(linear)
place = torch.arange(len(names))
for values, label, shift in (
    ([1e3 * linear[n][0] for n in names], "linear model", -0.27),
    ([1e3 * linear[n][1] for n in names], "linear model, BackPACK", 0.0),
    (
        [1e3 * residual[n][0] if n in residual else float("nan") for n in names],
        "residual net, 4 digits",
        0.27,
    ),
):
    ax.barh(place + shift, values, height=0.25, label=label)
ax.set_yticks(place, names)
ax.invert_yaxis()
ax.set(xscale="log", xlabel="ms (log scale)", title=f"{NUM_SAMPLES} digits")
ax.legend()
picture = output / "all_quantities.png"
figure.savefig(picture, dpi=150)
print(f"\nSaved {picture}. All of this took {time.perf_counter() - start:.0f} s.")
