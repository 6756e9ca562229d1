"""What a model returns, as one tensor for samples with outputs of one shape.

Several outputs of a sample stand side by side. Samples may have outputs of several
shapes: a net may return a list with a tensor for each sample, or the outputs of all
samples one after the other, item by item: those of the nodes of graphs, of the tokens
of sentences. Such a batch is cut into parts, in each of which all have one shape.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from vivit_linop.risk.data.batches import some_targets
from vivit_linop.risk.data.containers import described, leaves, map_leaves

# Samples with outputs of several shapes ----------------------------------------------


class RaggedOutputs(Exception):
    """Outputs of a net have different shapes: by sample, or of all, item by item."""

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

    The order says where the items are, sample by sample; None if they come so.
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
    """Yield where items may be: sample by sample, or as in a packed sequence."""
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


# Several outputs of a sample ---------------------------------------------------------


class OutputTree:
    """Several outputs of a sample, in the container of ``[n, …]`` that a model returns.

    Joined they are ``[n, C]``, with the entries of one output after those of another.
    """

    def __init__(self, output: Any) -> None:
        self.shapes = [leaf.shape[1:] for leaf in leaves(output)]
        self._form = map_leaves(lambda leaf: torch.empty(0, device="cpu"), output)

    def __repr__(self) -> str:
        """Say of what shapes outputs are."""
        shapes = iter(self.shapes)
        return described(
            map_leaves(
                lambda leaf: torch.empty(1, *next(shapes), device="meta"), self._form
            )
        )

    def join(self, output: Any) -> Tensor:
        """Put the tensors side by side, which must be those of this form."""
        tensors = list(leaves(output))
        shapes = [leaf.shape[1:] for leaf in tensors]
        if shapes != self.shapes:
            raise ValueError(
                f"model: it returned {described(output)}, before {self!r} for a sample."
            )
        return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tensors], dim=1)

    def split(self, joined: Tensor) -> Any:
        """Return what the model has returned."""
        parts = joined.split([shape.numel() for shape in self.shapes], dim=1)
        tensors = (
            part.reshape(len(joined), *shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        )
        return map_leaves(lambda leaf: next(tensors), self._form)


class Returned:
    """The one tensor of outputs that is made of what a model returns.

    Attributes:
        tree: The form of several outputs, once the model has returned them.
    """

    def __init__(self) -> None:
        self.tree: OutputTree | None = None
        self._samples: int | None = None

    @contextlib.contextmanager
    def of_batch(self, samples: int) -> Iterator[None]:
        """Know how many samples there are: so many tensors in a list are one of each.

        A list of others then is one of several outputs.
        """
        self._samples = samples
        try:
            yield
        finally:
            self._samples = None

    def __call__(self, output: Any) -> Tensor:
        """Return the outputs of a model as a tensor.

        Args:
            output: What it returns: a tensor, an object whose ``.logits`` is one, a
                list of one for each sample, a nested tensor or a packed sequence of
                these, or a container of several with one sample axis.

        Raises:
            TypeError: If it is none of these.
            RaggedOutputs: If samples in a list have outputs of several shapes.
        """
        if not isinstance(output, Tensor):
            output = getattr(output, "logits", output)
        if isinstance(output, PackedSequence):
            output = output.data  # item by item
        if isinstance(output, Tensor):
            return joined_outputs(output.unbind()) if output.is_nested else output
        if self.tree is None:
            if self._is_by_sample(output):
                return joined_outputs(output)
            self.tree = _checked_tree(output)
        return self.tree.join(output)

    def _is_by_sample(self, output: Any) -> bool:
        """Whether it is a list with a tensor for each sample."""
        if type(output) is not list or not output:
            return False
        if not all(isinstance(part, Tensor) for part in output):
            return False
        n = self._samples
        return n in (None, len(output)) or any(
            part.ndim == 0 or len(part) != n for part in output
        )


def _checked_tree(output: Any) -> OutputTree:
    tensors = list(leaves(output))
    lengths = {len(leaf) if leaf.ndim else 0 for leaf in tensors}
    if len(lengths) != 1 or not all(t.is_floating_point() for t in tensors):
        raise TypeError(
            "model: must return a tensor, an object whose .logits is one, or a "
            "tuple of tensors that all have the samples along their first axis, "
            f"got {described(output)}. Say what to take with predict=, for example "
            "predict=lambda model, X: model(**X).last_hidden_state.mean(1)."
        )
    return OutputTree(output)
