"""
Graphs: how sure a graph network is
===================================

Each digit is a graph: its pixels with ink are nodes, neighbours are joined. So graphs
have different numbers of nodes, and a batch of them is one large graph with a third
tensor that says whose each node is; ``EmpiricalRisk`` finds the graphs in it. (A
``Batch`` of torch_geometric is taken as it is.) The damped inverse of the GGN is the
covariance of a Laplace posterior: the network doubts where nodes are wired at random. A
second network says for each node how much ink it has, by its neighbours: then each
graph has as many outputs as nodes.

``python examples/graphs.py``
"""

from __future__ import annotations

import matplotlib
import torch
from _digits import check, train
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vivit_linop as vl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Graph = tuple[Tensor, Tensor]  # features of nodes, edges
PRIOR = 1.0  # the precision of all weights

# %%
# Digits as graphs
# ----------------


def graph_of(image: Tensor) -> Graph:
    """Ink and place of each pixel that has some; edges between neighbours."""
    row, column = (image > 0.2).nonzero(as_tuple=True)
    far = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    x = torch.stack([image[row, column], row / 3.5 - 1.0, column / 3.5 - 1.0], dim=1)
    return x, (far == 1).nonzero().T


def batched(graphs: list[Graph]) -> tuple[Tensor, Tensor, Tensor]:
    """One graph of all: its nodes, its edges, and the number of each node's graph."""
    sizes = torch.tensor([len(x) for x, _ in graphs])
    starts = sizes.cumsum(0) - sizes
    edges = [e + start for (_, e), start in zip(graphs, starts, strict=True)]
    owner = torch.arange(len(graphs)).repeat_interleave(sizes)
    return torch.cat([x for x, _ in graphs]), torch.cat(edges, dim=1), owner


# %%
# A graph network
# ---------------


class GraphNet(nn.Module):
    """Two rounds of messages; for each node, or for graphs their mean."""

    def __init__(self, inputs: int, outputs: int, nodes: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * inputs, 12), nn.Linear(24, 12)
        self.last, self.nodes = nn.Linear(12, outputs), nodes

    def forward(self, x: Tensor, edges: Tensor, owner: Tensor) -> Tensor:
        counts = torch.bincount(edges[1], minlength=len(x)).clamp(min=1)[:, None]
        for layer in (self.first, self.second):
            neighbours = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
            x = torch.tanh(layer(torch.cat([x, neighbours / counts], dim=1)))
        if not self.nodes:
            sizes = torch.bincount(owner)[:, None]
            zeros = x.new_zeros(len(sizes), x.shape[1])
            x = zeros.index_add(0, owner, x) / sizes
        return self.last(x)


# %%
# Training
# --------

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
order = torch.randperm(1797)
images = torch.tensor(load_digits().images / 16.0)[order]
classes = torch.tensor(load_digits().target)[order]
graphs = [graph_of(image) for image in images[:140]]
X, y = batched(graphs[:100]), classes[:100]
net, loss = GraphNet(3, 10), nn.CrossEntropyLoss(reduction="sum")
train(net, lambda: loss(net(*X), y), 300, decay=PRIOR / 10)

# %%
# Doubt
# -----
# The risk has found 100 graphs in one batch.

risk = vl.EmpiricalRisk(net, loss, (X, y))
print(risk)
identity = vl.Identity(risk.num_params)
posterior = (vl.GGN(risk) + PRIOR * identity).inv()
known = graphs[100:]
wild = [(x, torch.randint(len(x), e.shape)) for x, e in known]
doubts = []
for name, some in (("test digits", known), ("wired at random", wild)):
    J = vl.Jacobian(net, batched(some))
    doubts.append((J @ posterior @ J.T).diagonal().mean().sqrt().item())
    print(f"  deviation of a logit, {name}: {doubts[-1]:.3f}")
if not doubts[0] < doubts[1]:
    raise AssertionError("the network is as sure of graphs that make no sense")
vector = torch.randn(risk.num_params)
alone = [(batched([g]), y[i : i + 1]) for i, g in enumerate(graphs[:100])]
one_by_one = vl.GGN(net, loss, alone) @ vector
check("G x, graphs together and alone", vl.GGN(risk) @ vector, one_by_one, 1e-9)

# %%
# As many outputs as nodes
# ------------------------

x, edges, owner = batched(graphs[:60])
ink = GraphNet(2, 1, nodes=True)
data = (x[:, 1:], edges, owner), x[:, :1]
train(ink, lambda: nn.functional.mse_loss(ink(*data[0]), data[1]), 200)
of_nodes = vl.EmpiricalRisk(ink, nn.MSELoss(), data)
print(of_nodes)
pairs = vl.GGN(of_nodes).eigh(k=3)
_, lambdas = vl.directional_derivatives(of_nodes, pairs)
most = int(lambdas[:, -1].argmax())
share = float(lambdas[most, -1] / lambdas[:, -1].sum())
print(f"  {share:.0%} of the largest eigenvalue come from a {classes[most]}")
check("eigenvalues, by graph", lambdas.mean(0), pairs.eigenvalues, 1e-9)

# %%
# The picture
# -----------
# A digit, and the same nodes wired at random.

figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
names = ("a digit", "wired at random")
for ax, (nodes, e), doubt, name in zip(
    axes, (known[0], wild[0]), doubts, names, strict=True
):
    ax.plot(nodes[e, 2], -nodes[e, 1], color="0.8", linewidth=0.7)
    ax.scatter(nodes[:, 2], -nodes[:, 1], c=nodes[:, 0], cmap="Blues", ec="0.3")
    ax.set(title=f"{name}: deviation {doubt:.2f}", xticks=[], yticks=[], aspect="equal")
