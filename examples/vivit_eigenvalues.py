"""
GGN eigenvalues during a backward pass with BackPACK, as in ViViT
=================================================================

All eigenvalues of the generalised Gauss-Newton matrix (GGN) that can be nonzero, from
one backward pass. They are checked against torch.autograd, and against the same in the
algebra of operators.

``python examples/vivit_eigenvalues.py``
"""

from __future__ import annotations

import matplotlib
import torch
from _autograd import check, ggn
from backpack import backpack, extend
from torch import nn

import vivit_linop as vl
from vivit_linop.vivit import EigvalshComputation

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

# %%
# In the algebra, and by torch.autograd; on the model as it is
# ------------------------------------------------------------

algebra = vl.GGN(model, loss_function, (X, y)).eigvalsh()

reference = torch.linalg.eigvalsh(ggn(model, loss_function, X, y))

# %%
# In a backward pass with BackPACK
# --------------------------------

model, loss_function = extend(model), extend(loss_function)
loss = loss_function(model(X), y)

computation = EigvalshComputation()
# One group is one block: the GGN of all parameters.
group = {"params": [p for p in model.parameters() if p.requires_grad]}
extension = computation.get_extension()
extension_hook = computation.get_extension_hook([group])

with backpack(extension, extension_hook=extension_hook):
    loss.backward()

evals = whole = computation.get_result(group)

# The Gram matrix has N * D_OUT eigenvalues, the GGN has more: its others are zero.
print("eigenvalues:", *(f"{value:.5e}" for value in evals), sep="\n  ")
check("Eigenvalues by autograd", evals, reference[-len(evals) :])
check("Eigenvalues in the algebra", evals, algebra)

# %%
# The blocks of single parameters
# -------------------------------

groups = [{"params": [p]} for p in model.parameters()]
with backpack(
    computation.get_extension(), extension_hook=computation.get_extension_hook(groups)
):
    loss_function(model(X), y).backward()
sizes = [p.numel() for p in model.parameters()]
for group, place in zip(groups, torch.arange(sum(sizes)).split(sizes), strict=True):
    block = ggn(model, loss_function, X, y)[place][:, place]
    evals, reference = computation.get_result(group), torch.linalg.eigvalsh(block)
    both = min(len(evals), len(reference))
    check(f"Those of a block {list(block.shape)}", evals[-both:], reference[-both:])

# %%
# The picture
# -----------
# Both have the same eigenvalues.

figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
ax.semilogy(whole.flip(0).clamp(min=1e-9), "o", label="backward pass")
ax.semilogy(algebra.flip(0).clamp(min=1e-9), "+", markersize=12, label="algebra")
ax.set(xlabel="rank", title="Eigenvalues of the GGN")
ax.legend()
