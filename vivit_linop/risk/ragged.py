"""Samples of one batch that have different numbers of outputs: batches of a shape each.

A net may return a list with a tensor for each sample, or the outputs of all samples one
after the other, item by item: those of the nodes of graphs, of the tokens of sentences.
Such a batch is cut into parts, in each of which all samples have outputs of one shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from vivit_linop.risk.containers import leaves, map_leaves
from vivit_linop.risk.data import some_targets


class RaggedOutputs(Exception):
    """A net's samples have outputs of different shapes.

    Args:
        outputs: Those of each sample; or of all, item by item.
    """

    def __init__(self, outputs: Sequence[Tensor] | Tensor) -> None:
        super().__init__("outputs of several shapes")
        self.outputs = outputs


class Part(NamedTuple):
    """Consecutive samples of a batch with outputs of one shape.

    Attributes:
        samples: Their numbers in the batch.
        items: Where outputs come item by item, the numbers of those of these samples;
            else None.
        all_items: How many items all samples of the batch have.
    """

    samples: Tensor
    items: Tensor | None = None
    all_items: int = 0

    def targets(self, y: Any) -> Any:
        """Return the targets of these samples, with a sample axis."""
        tensors = list(leaves(y))
        if self.items is not None and all(
            leaf.ndim and len(leaf) == self.all_items for leaf in tensors
        ):
            n = len(self.samples)
            own = some_targets(y, self.items)
            return map_leaves(lambda leaf: leaf.unflatten(0, (n, -1)), own)
        if isinstance(y, (list, tuple)) and len({leaf.shape for leaf in tensors}) > 1:
            return torch.stack([y[i] for i in self.samples.tolist()])
        return some_targets(y, self.samples)


def joined_outputs(outputs: Any) -> Tensor:
    """Put the outputs of samples into one tensor.

    Raises:
        RaggedOutputs: If they have several shapes.
    """
    outputs = list(outputs)
    if len({output.shape for output in outputs}) > 1:
        raise RaggedOutputs(outputs)
    return torch.stack(outputs)


def parts_by_shape(shapes: Sequence[torch.Size]) -> list[Part]:
    """Cut a batch by the shapes of its samples' outputs."""
    return [Part(torch.tensor(run, device="cpu")) for run in _runs(shapes)]


def parts_by_items(sizes: Sequence[int], order: Tensor | None = None) -> list[Part]:
    """Cut a batch by how many items its samples have.

    Args:
        sizes: How many.
        order: Where the items are, sample by sample; None if they come so.
    """
    ends = list(itertools.accumulate(sizes, initial=0))
    numbers, runs = order, [[i] for i in range(len(sizes))]
    if numbers is None:
        numbers, runs = torch.arange(ends[-1], device="cpu"), _runs(sizes)
    return [
        Part(
            torch.tensor(run, device="cpu"),
            numbers[ends[run[0]] : ends[run[-1] + 1]],
            ends[-1],
        )
        for run in runs
    ]


def orders_of_items(X: Any, sizes: Sequence[int]) -> Iterator[Tensor | None]:
    """Yield where items may be: sample by sample, or as in a packed sequence.

    Args:
        X: The input.
        sizes: How many items each sample has.
    """
    yield None
    for unit in leaves(X, lambda value: isinstance(value, PackedSequence)):
        if isinstance(unit, PackedSequence) and len(unit.data) == sum(sizes):
            # Its own indices, by which it is unpacked, lie where its data are.
            numbers = torch.arange(len(unit.data), device=unit.data.device)
            packed = unit._replace(data=numbers)
            yield torch.cat(unpack_sequence(packed)).cpu()


def _runs(keys: Sequence[Any]) -> list[list[int]]:
    """Cut numbers where their keys change."""
    runs = itertools.groupby(range(len(keys)), key=keys.__getitem__)
    return [list(run) for _, run in runs]
