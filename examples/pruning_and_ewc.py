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

import matplotlib
import torch
from _digits import check, digits, folder, timed, train
from torch import Tensor, nn

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


def prune(X: Tensor, y: Tensor) -> dict[str, list[float]]:
    net, loss = make_net(), nn.CrossEntropyLoss()
    train(net, lambda: loss(net(X), y), 150, decay=1e-3)
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    theta, D = risk.flatten(risk.params), risk.num_params
    S = (vl.GGN(risk) + DAMPING * vl.Identity(D)).inv()
    variances, seconds = timed(S.diagonal)
    print(f"The diagonal of (G + δ I)⁻¹, D = {D}: {seconds:.2f} s")
    dense = vl.GGN(risk).to_dense().double() + DAMPING * torch.eye(D).double()
    check("it and a dense inverse", variances, dense.inverse().diagonal(), 1e-3)

    saliency = {
        "magnitude": theta.square(),
        "curvature": theta.square() / variances,
    }
    losses: dict[str, list[float]] = {name: [] for name in (*saliency, "surgery")}
    for share in SHARES:
        for name, values in saliency.items():
            gone = values.argsort()[: int(share * D)]
            losses[name].append(risk.at(theta.index_fill(0, gone, 0.0)).value().item())
        # The others move by −S E (Eᵀ S E)⁻¹ θ_gone, with the unit columns E.
        S_gone = S @ torch.eye(D)[:, gone]
        step = -S_gone @ torch.linalg.solve(S_gone[gone], theta[gone])
        moved = (theta + step).index_fill(0, gone, 0.0)
        losses["surgery"].append(risk.at(moved).value().item())
    print(f"loss {risk.value():.3f}; without a share of the weights:")
    for name, row in losses.items():
        print(f"  {name:10}" + "".join(f"{value:8.3f}" for value in row))
    if not all(s < c < m for m, c, s in zip(*losses.values(), strict=True) if m > 0.2):
        raise AssertionError("curvature does not choose better than magnitude")
    return losses


losses = prune(X, y)

# %%
# Elastic weight consolidation
# ----------------------------
# The penalty is a product with F, any operator; gradients flow through it.


def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return (net(data[0]).argmax(1) == data[1]).float().mean().item()


def consolidate(X: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Learn the digits 0–4, then 5–9; accuracies on both."""
    old, new = ((X[y < 5], y[y < 5]), (X[y >= 5], y[y >= 5]))
    loss = nn.CrossEntropyLoss()
    found: dict[str, list[float]] = {}
    for penalty in ("none", "diagonal", "GGN"):
        net = make_net()
        train(net, lambda net=net: loss(net(old[0]), old[1]), 150, decay=1e-3)
        risk = vl.EmpiricalRisk(net, loss, old)
        G, theta = vl.GGN(risk), risk.flatten(risk.params)
        F = {
            "none": 0.0 * vl.Identity(risk.num_params),
            "diagonal": vl.Diagonal(G.diagonal()),
            "GGN": G,
        }[penalty]

        def objective(net=net, F=F, risk=risk, theta=theta) -> Tensor:
            d = torch.cat([p.reshape(-1) for p in net.parameters()]) - theta
            return loss(net(new[0]), new[1]) + 50 * d @ (F @ d)

        train(net, objective, 150, decay=1e-3)
        found[penalty] = [accuracy(net, old), accuracy(net, new)]
        print(f"  {penalty:10}{found[penalty][0]:8.1%}{found[penalty][1]:8.1%}")
    by_sample = torch.func.vmap(
        torch.func.jacrev(lambda p, x: torch.func.functional_call(net, p, (x,))),
        (None, 0),
    )
    params = dict(zip(risk.params, risk.unflatten(theta), strict=True))
    J = torch.cat([j.flatten(2) for j in by_sample(params, old[0]).values()], dim=2)
    p = risk.outputs[0].softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("ncd,nck,nkd->d", J, H, J) / len(p)
    check("the diagonal and autograd", G.diagonal(), exact, 1e-4)
    both = [sum(pair) for pair in found.values()]
    if not both == sorted(both):
        raise AssertionError("the curvature does not keep what was learnt")
    return found


print("Accuracy on the digits 0–4, and on 5–9 learnt afterwards; penalty:")
accuracies = consolidate(X, y)

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
