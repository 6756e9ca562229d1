"""
A damped Newton step during a backward pass with BackPACK, as in ViViT
======================================================================

The Newton step in the span of the leading eigenvectors of the generalised Gauss-Newton
matrix (GGN), with a damping for each direction. It is checked against torch.autograd,
and against the same in the algebra of operators.

``python examples/vivit_damped_newton.py``
"""

from __future__ import annotations

import matplotlib
import torch
from _autograd import check, ggn, gradient
from backpack import backpack, extend
from torch import Tensor, nn

import vivit_linop as vl
from vivit_linop.vivit import DirectionalDampedNewtonComputation

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.manual_seed(0)
DAMPING = 1.0

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


def constant_damping(
    evals: Tensor, gram_evecs: Tensor, gammas: Tensor, lambdas: Tensor
) -> Tensor:
    """Return the same damping for all directions.

    A function is given what it needs for a damping that depends on the noise in
    gradients and curvatures: eigenvalues ``[K]``, eigenvectors of the Gram matrix
    ``[N·C, K]``, slopes and curvatures of the samples ``[N, K]``.
    """
    return DAMPING * torch.ones_like(evals)


# %%
# In the algebra; on the model as it is
# -------------------------------------

risk = vl.EmpiricalRisk(model, loss_function, (X, y))
pairs = vl.GGN(risk).eigh(select=select_top_k)
algebra = vl.damped_newton_step(risk, pairs, constant_damping)

# %%
# By torch.autograd
# -----------------

evals, evecs = torch.linalg.eigh(ggn(model, loss_function, X, y))
keep = select_top_k(evals)
evals, evecs = evals[keep], evecs[:, keep]
slopes = evecs.T @ gradient(model, loss_function, X, y)
reference = evecs @ (-slopes / (evals + DAMPING))

# %%
# In a backward pass with BackPACK
# --------------------------------

model, loss_function = extend(model), extend(loss_function)
loss = loss_function(model(X), y)

computation = DirectionalDampedNewtonComputation()
group = {
    "params": [p for p in model.parameters() if p.requires_grad],
    "criterion": select_top_k,
    "damping": constant_damping,
}
extensions = computation.get_extensions()
extension_hook = computation.get_extension_hook([group])

with backpack(*extensions, extension_hook=extension_hook):
    loss.backward()

newton_step = computation.get_result(group)
for param, part in zip(group["params"], newton_step, strict=True):
    print(f"parameter {list(param.shape)}, step {list(part.shape)}")

step = torch.cat([part.reshape(-1) for part in newton_step])
check("Steps by autograd", step, reference)
check("Steps in the algebra", step, algebra)

# %%
# The picture
# -----------
# The damping shortens the step; the loss falls beyond it.

sizes = torch.linspace(0, 2, 41)
with torch.no_grad():
    start = nn.utils.parameters_to_vector(model.parameters())
    values = []
    for size in sizes:
        nn.utils.vector_to_parameters(start + size * step, model.parameters())
        values.append(loss_function(model(X), y).item())
figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
ax.plot(sizes, values)
ax.axvline(1.0, color="0.6")
ax.set(xlabel="multiple of the step", title="The loss along the step")
