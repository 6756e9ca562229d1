"""
GGN eigenpairs during a backward pass with BackPACK, as in ViViT
================================================================

Leading eigenvalues and eigenvectors of the generalised Gauss-Newton matrix (GGN), the
latter in the shapes of the parameters. They are checked against torch.autograd, and
against the same in the algebra of operators.

``python examples/vivit_eigenpairs.py``
"""

from __future__ import annotations

import matplotlib
import torch
from _autograd import check, ggn
from backpack import backpack, extend
from torch import Tensor, nn

import vivit_linop as vl
from vivit_linop.vivit import EighComputation

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
# In the algebra, and by torch.autograd; on the model as it is
# ------------------------------------------------------------

pairs = vl.GGN(model, loss_function, (X, y)).eigh(select=select_top_k)
algebra_evals, algebra_evecs = pairs

dense = ggn(model, loss_function, X, y)
reference = torch.linalg.eigvalsh(dense)

# %%
# In a backward pass with BackPACK
# --------------------------------

model, loss_function = extend(model), extend(loss_function)
loss = loss_function(model(X), y)

computation = EighComputation()
group = {
    "params": [p for p in model.parameters() if p.requires_grad],
    "criterion": select_top_k,
}
extension = computation.get_extension()
extension_hook = computation.get_extension_hook([group])

with backpack(extension, extension_hook=extension_hook):
    loss.backward()

evals, evecs = computation.get_result(group)
for param, vectors in zip(group["params"], evecs, strict=True):
    print(f"parameter {list(param.shape)}, eigenvectors {list(vectors.shape)}")

# Their columns, as long as all parameters together.
E = torch.cat([vectors.flatten(1) for vectors in evecs], dim=1).T

check("Eigenvalues by autograd", evals, reference[-len(evals) :])
check("Products G e = λ e", dense @ E, evals * E)
check("Inner products of orthonormal vectors", E.T @ E, torch.eye(len(evals)))
check("Eigenvalues in the algebra", evals, algebra_evals)
# Eigenvectors are unique up to their signs.
check("Eigenvectors in the algebra", (E * algebra_evecs).sum(0).abs(), torch.ones(4))

# %%
# The picture
# -----------
# Which parameters each of the directions moves.

figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
shown = ax.imshow(E.T.abs(), aspect="auto", cmap="Blues")
ax.set(xlabel="entry of the parameters", ylabel="eigenvector")
ax.set_title("Magnitudes of the leading eigenvectors")
figure.colorbar(shown)
