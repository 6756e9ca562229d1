"""
Directional derivatives during a backward pass with BackPACK, as in ViViT
=========================================================================

The slope γ and the curvature λ of the loss of each sample along the leading
eigenvectors of the generalised Gauss-Newton matrix (GGN). They are checked against
torch.autograd, and against the same in the algebra of operators.

``python examples/vivit_directional_derivatives.py``
"""

from __future__ import annotations

import matplotlib
import torch
from _autograd import check, ggn, gradient
from backpack import backpack, extend
from torch import Tensor, nn

import vivit_linop as vl
from vivit_linop.vivit import DirectionalDerivativesComputation

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.manual_seed(0)

# %%
# Data, model and loss
# --------------------

N, D_IN, D_HIDDEN, D_OUT = 4, 7, 5, 3
X, y = torch.rand(N, D_IN), torch.rand(N, D_OUT)
model = nn.Sequential(
    nn.Linear(D_IN, D_HIDDEN),
    nn.ReLU(),
    nn.Linear(D_HIDDEN, D_HIDDEN),
    nn.ReLU(),
    nn.Linear(D_HIDDEN, D_OUT),
)
loss_function = nn.MSELoss()


def select_top_k(evals: Tensor, k: int = 4) -> list[int]:
    """Return the indices of the k largest of ascending eigenvalues."""
    return list(range(len(evals) - k, len(evals)))


# %%
# In the algebra; on the model as it is
# -------------------------------------

risk = vl.EmpiricalRisk(model, loss_function, (X, y))
pairs = vl.GGN(risk).eigh(select=select_top_k)
algebra_gammas, algebra_lambdas = vl.directional_derivatives(risk, pairs)

# %%
# By torch.autograd: gradients and GGNs of single samples
# -------------------------------------------------------

evals, evecs = torch.linalg.eigh(ggn(model, loss_function, X, y))
keep = select_top_k(evals)
evals, evecs = evals[keep], evecs[:, keep]
samples = [(X[[n]], y[[n]]) for n in range(N)]
gradients = torch.stack([gradient(model, loss_function, *s) for s in samples])
ggns = torch.stack([ggn(model, loss_function, *s) for s in samples])
reference_gammas = gradients @ evecs
reference_lambdas = torch.einsum("ik,nij,jk->nk", evecs, ggns, evecs)

# %%
# In a backward pass with BackPACK
# --------------------------------

model, loss_function = extend(model), extend(loss_function)
loss = loss_function(model(X), y)

computation = DirectionalDerivativesComputation()
group = {
    "params": [p for p in model.parameters() if p.requires_grad],
    "criterion": select_top_k,
}
extensions = computation.get_extensions()
extension_hook = computation.get_extension_hook([group])

with backpack(*extensions, extension_hook=extension_hook):
    loss.backward()

gammas, lambdas = computation.get_result(group)
print("γ, sample by direction:", gammas, "λ:", lambdas, sep="\n")

# An eigenvector may point in the opposite direction, so signs of γ are free.
check("Slopes by autograd", gammas.abs(), reference_gammas.abs())
check("Curvatures by autograd", lambdas, reference_lambdas)
check("Means of the curvatures and eigenvalues", lambdas.mean(0), evals)
check("Slopes in the algebra", gammas.abs(), algebra_gammas.abs())
check("Curvatures in the algebra", lambdas, algebra_lambdas)

# %%
# The picture
# -----------
# A dot is a sample: its slope and its curvature along a direction.

figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
for k in range(gammas.shape[1]):
    ax.plot(gammas[:, k], lambdas[:, k], "o", label=f"λ = {evals[k]:.2g}")
ax.set(xlabel="slope γ", ylabel="curvature λ", title="Samples along each direction")
ax.legend(title="direction")
