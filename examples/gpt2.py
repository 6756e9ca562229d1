"""
Curvature of a language model: a GPT-2 with tied weights, from its configuration
================================================================================

Its 50,257 outputs a token are too many for exact columns of the factor V, and the
library says so. Products with the exact GGN need none of them; one Monte-Carlo sample a
sequence gives a factor, its Gram eigenvalues and damped solves.

``python examples/gpt2.py [--output FOLDER]``
"""

# sphinx_gallery_thumbnail_path = "_static/gpt2.png"

import resource
import time
from typing import Any

import matplotlib
import torch
from _digits import folder
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEQUENCES, TOKENS, DAMPING = 8, 16, 1.0

# %%
# A language model on random tokens
# ---------------------------------


def next_tokens(model: nn.Module, X: Any) -> Tensor:
    """Logits with the vocabulary as axis 1, where torch's loss has the classes."""
    logits: Tensor = model(**X, use_cache=False).logits
    return logits.transpose(1, 2)


output = folder(str(__doc__))
torch.manual_seed(0)
config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=TOKENS)
net = GPT2LMHeadModel(config).eval()
tokens = torch.randint(config.vocab_size, (SEQUENCES, TOKENS))
target = tokens.roll(-1, 1)
target[:, -1] = -100  # nothing follows the last token

start = time.perf_counter()
risk = vl.EmpiricalRisk(
    net, nn.CrossEntropyLoss(), ({"input_ids": tokens}, target), predict=next_tokens
)
print(risk)
x = torch.randn(risk.num_params)

# %%
# Exact products
# --------------
# They need no columns of V; V itself does not fit, and says so.

exact = vl.GGN(risk) @ x
print(f"exact product: |G x| = {exact.norm():.4g}")
try:
    vl.GGNFactor(risk)
except MemoryError as error:
    print(f"exact factor:  {error}")

# %%
# One column a sequence
# ---------------------

G = vl.GGN(risk, mc_samples=1, generator=torch.Generator().manual_seed(0))
print(G, G.factor)
print("Gram eigenvalues:", *(f"{value:.4g}" for value in G.eigvalsh()))
damped = G + DAMPING * vl.Identity(risk.num_params)
gradient = risk.gradient()
step = damped.solve(gradient)
residual = (damped @ step - gradient).norm() / gradient.norm()
print(f"damped solve: |step| = {step.norm():.4g}, relative residual {residual:.1e}")
assert residual <= 1e-4, residual

peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{time.perf_counter() - start:.1f} s, peak memory {peak:.2f} GiB")

# %%
# The picture
# -----------

figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
ax.semilogy(range(1, SEQUENCES + 1), G.eigvalsh().flip(0), "o")
ax.set(xlabel="rank", ylabel="eigenvalue")
ax.set_title(f"A GPT-2 with {risk.num_params:,} parameters, Monte-Carlo GGN")
figure.savefig(output / "gpt2.png", dpi=150)
