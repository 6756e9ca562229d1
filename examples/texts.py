"""
Texts of many lengths: dynamic padding
======================================

Sentences come in batches that are padded to the longest of each, as collators of
language libraries do it: to other lengths in each batch, and padding must change
nothing. A network with attention says which of six descriptions in scikit-learn a
sentence is from. The sentences that its parameters depend on most are found by their
self-influence, gᵀ(G+τI)⁻¹g for the gradient g of a sentence.

``python examples/texts.py``
"""

from __future__ import annotations

import re
from collections import Counter

import matplotlib
import torch
from _digits import check, train
from sklearn import datasets
from torch import Tensor, nn

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SOURCES = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
PRIOR = 1.0  # the precision of all weights
Batch = tuple[dict[str, Tensor], Tensor]

# %%
# Sentences, and batches of them
# ------------------------------


def sentences() -> tuple[list[list[str]], Tensor]:
    """The words of each sentence, and the number of its source."""
    words, classes = [], []
    for number, name in enumerate(SOURCES):
        text = getattr(datasets, f"load_{name}")().DESCR.lower()
        for sentence in re.split(r"\.\s|\n\n", text):
            found = re.findall(r"[a-z]{2,}", sentence)
            if 4 <= len(found) <= 40:
                words.append(found)
                classes.append(number)
    return words, torch.tensor(classes)


def padded(rows: list[Tensor], classes: Tensor, size: int) -> list[Batch]:
    """Batches of sentences, with zeros up to the longest of each."""
    batches = []
    for start in range(0, len(rows), size):
        ids = nn.utils.rnn.pad_sequence(rows[start : start + size], batch_first=True)
        X = {"ids": ids, "mask": ids == 0}
        batches.append((X, classes[start : start + size]))
    return batches


# %%
# A network with attention
# ------------------------


class Classifier(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 12, padding_idx=0)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, len(SOURCES))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.embedding(ids)
        h = h + self.attention(h, h, h, key_padding_mask=mask, need_weights=False)[0]
        lengths = (~mask).sum(1, keepdim=True)
        return self.head(h.masked_fill(mask[..., None], 0.0).sum(1) / lengths)


# %%
# Training
# --------

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
words, classes = sentences()
counts = Counter(word for sentence in words for word in sentence)
known = {word: 2 + i for i, (word, _) in enumerate(counts.most_common(150))}
rows = [torch.tensor([known.get(word, 1) for word in s]) for s in words]
batches = padded(rows, classes, 16)
net, loss = Classifier(152), nn.CrossEntropyLoss(reduction="sum")


def total() -> Tensor:
    return torch.stack([loss(net(**X), y) for X, y in batches]).sum()


train(net, total, 60, decay=PRIOR / 10)

# %%
# Padding changes nothing
# -----------------------
# Rows of J are those of sentences, whatever they were padded to.

risk = vl.EmpiricalRisk(net, loss, batches)
lengths = sorted({X["ids"].shape[1] for X, _ in batches})
print(f"{risk}\n  padded to {lengths}")
G, U = vl.GGN(risk), vl.PerSampleGradients(risk)
alone = vl.EmpiricalRisk(net, loss, padded(rows, classes, 1))
vector = torch.randn(risk.num_params)
check("G x, padded and one by one", G @ vector, vl.GGN(alone) @ vector, 1e-9)
check(
    "slopes of sentences",
    U.T @ vector,
    vl.PerSampleGradients(alone).T @ vector,
    1e-9,
)

# %%
# Self-influence
# --------------

inverse = (G + PRIOR * vl.Identity(risk.num_params)).inv()
influence = (U.T @ inverse @ U).diagonal()
print("  most influential on themselves:")
for n in influence.argsort(descending=True)[:3].tolist():
    print(f"    {influence[n]:.3f} {SOURCES[classes[n]]}: {' '.join(words[n])[:48]}")
n = int(influence.argmax())
g = U @ torch.eye(len(rows))[n]
check("self-influence, by a solve", influence[n], g @ (inverse @ g), 1e-6)

# %%
# The picture
# -----------
# Short sentences, of a source with few, matter most.

figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for number, source in enumerate(SOURCES):
    of_source = classes == number
    lengths = [len(row) for row, own in zip(rows, of_source, strict=True) if own]
    ax.plot(lengths, influence[of_source], "o", alpha=0.6, label=source)
ax.set(xlabel="words", ylabel="self-influence", yscale="log")
ax.set_title("How much the net depends on each sentence")
ax.legend()
