"""Samples that lie one after the other in one tensor, and what says where each is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vivit_linop.risk.data.containers import leaves, map_leaves
from vivit_linop.risk.data.samples import Samples


class Bags(Samples):
    """Bags of tokens, one after the other in a tensor, and where each begins.

    What ``nn.EmbeddingBag`` takes as ``offsets``, with or without the end of the last.

    Args:
        place: Which tensor has the offsets.
        closed: Whether they end with the end of the last bag.
    """

    def __init__(self, place: int, closed: bool) -> None:
        self._place, self._closed = place, closed

    def fits(self, X: Any, n: int) -> bool:
        """Whether they begin at 0, do not decrease, and end within a tensor."""
        tensors = list(leaves(X))
        if self._place >= len(tensors):
            return False
        offsets = tensors[self._place]
        if offsets.ndim != 1 or not _is_index(offsets):
            return False
        if not len(offsets) or len(offsets) != n + self._closed:
            return False
        length = self._length(tensors)
        return (
            length is not None
            and int(offsets[0]) == 0
            and bool((offsets.diff() >= 0).all())
            and (not self._closed or int(offsets[-1]) == length)
        )

    def _length(self, tensors: Sequence[Tensor]) -> int | None:
        """How long all bags are together: as the first tensor that can hold them."""
        end = int(tensors[self._place][-1])
        others = [t for at, t in enumerate(tensors) if at != self._place and t.ndim]
        return next((len(t) for t in others if len(t) >= max(end, 1)), None)

    def number(self, X: Any) -> int:
        """As many as begin."""
        return len(list(leaves(X))[self._place]) - self._closed

    def take(self, X: Any, index: Tensor) -> Any:
        """Put some bags one after the other."""
        tensors = list(leaves(X))
        offsets, length = tensors[self._place], self._length(tensors)
        end = offsets.new_tensor([] if self._closed else [length])
        bounds = torch.cat([offsets, end])
        index = index.to(offsets.device)
        sizes = bounds.diff()[index]
        bags = bounds.unfold(0, 2, 1)[index].tolist()
        rows = torch.cat([torch.arange(*bag, device="cpu") for bag in bags])
        begins = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        own = begins if self._closed else begins[:-1]
        n, places = len(bounds) - 1, itertools.count()

        def part(tensor: Tensor) -> Tensor:
            if next(places) == self._place:
                return own.to(offsets)
            if tensor.ndim and len(tensor) == length:
                return tensor[rows.to(tensor.device)]
            return tensor[index] if tensor.ndim and len(tensor) == n else tensor

        return map_leaves(part, X)


class Graphs(Samples):
    """Graphs in one: features of all nodes, edges ``[2, E]``, and whose each node is.

    Tensors as long as there are nodes, edges or graphs belong to these; all others are
    shared.

    Args:
        place: Which tensor has the number of each node's graph.
        edges: Which has the edges.
        nodes_first: Of what are as many as nodes and as edges, whether it is of nodes.
    """

    def __init__(self, place: int, edges: int, nodes_first: bool = True) -> None:
        self._place, self._edges = place, edges
        self._nodes_first = nodes_first

    @classmethod
    def possible(cls, X: Any) -> Iterator[Graphs]:
        """Yield what may be, by the tensors of an input."""
        tensors = list(leaves(X))
        for at, edges in enumerate(tensors):
            if edges.ndim == 2 and len(edges) == 2 and _is_index(edges):
                for place, owner in enumerate(tensors):
                    if owner.ndim == 1 and _is_index(owner):
                        yield cls(place, at)
                        if len(owner) == edges.shape[1]:
                            yield cls(place, at, nodes_first=False)

    def fits(self, X: Any, n: int) -> bool:
        """Whether there are n graphs, and edges between nodes."""
        tensors = list(leaves(X))
        if max(self._place, self._edges) >= len(tensors):
            return False
        owner, edges = tensors[self._place], tensors[self._edges]
        return (
            owner.ndim == 1
            and _is_index(owner)
            and len(owner) >= n > 0
            and int(owner.min()) == 0
            and int(owner.max()) == n - 1
            and edges.ndim == 2
            and len(edges) == 2
            and _is_index(edges)
            and (not edges.numel() or int(edges.min()) >= 0)
            and (not edges.numel() or int(edges.max()) < len(owner))
        )

    def number(self, X: Any) -> int:
        """As many as nodes belong to."""
        owner = list(leaves(X))[self._place]
        return int(owner.max()) + 1 if owner.numel() else 0

    def nodes(self, X: Any) -> int:
        """How many nodes there are."""
        return len(list(leaves(X))[self._place])

    def take(self, X: Any, index: Tensor) -> Any:
        """Put some graphs into one, with new numbers of nodes."""
        tensors = list(leaves(X))
        owner, edges = tensors[self._place], tensors[self._edges]
        n, index = self.number(X), index.to(owner.device)
        nodes = [(owner == i).nonzero().squeeze(1) for i in index.tolist()]
        theirs = [(owner[edges[0]] == i).nonzero().squeeze(1) for i in index.tolist()]
        # Where a node of the first, second, … graph that is taken stands then.
        renumbered, start = [], 0
        for some, between in zip(nodes, theirs, strict=True):
            numbers = torch.full_like(owner, -1)
            numbers[some] = torch.arange(start, start + len(some), device=owner.device)
            renumbered.append(numbers[edges[:, between]])
            start += len(some)
        rows, of_edges = torch.cat(nodes), torch.cat(theirs)
        own = torch.cat(renumbered, dim=1)
        sizes = torch.tensor([len(some) for some in nodes], device=owner.device)
        taken = {n: index, edges.shape[1]: of_edges, len(owner): rows}
        if not self._nodes_first:
            taken[edges.shape[1]] = of_edges
        places = itertools.count()

        def part(tensor: Tensor) -> Tensor:
            place = next(places)
            if place == self._place:
                whole = torch.arange(len(index), device=owner.device)
                return whole.repeat_interleave(sizes).to(owner)
            if place == self._edges:
                return own.to(tensor)
            length = len(tensor) if tensor.ndim else -1
            return tensor[taken[length]] if length in taken else tensor

        return map_leaves(part, X)


def _is_index(tensor: Tensor) -> bool:
    """Whether a tensor may hold numbers of rows."""
    return tensor.dtype in (torch.int64, torch.int32)
