"""What a model returns, as one tensor: of several outputs, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from vivit_linop.risk.containers import described, leaves, map_leaves
from vivit_linop.risk.ragged import joined_outputs


class OutputTree:
    """Several outputs of a sample, in the container that the model returns.

    Joined they are ``[n, C]``, with the entries of one output after those of another.

    Args:
        output: What the model returns: a container of tensors ``[n, …]``.

    Attributes:
        shapes: Of each tensor, for a sample.
    """

    def __init__(self, output: Any) -> None:
        self.shapes = [leaf.shape[1:] for leaf in leaves(output)]
        self._form = map_leaves(lambda leaf: torch.empty(0), output)

    def __repr__(self) -> str:
        """Say of what shapes outputs are."""
        shapes = iter(self.shapes)
        whole = map_leaves(lambda leaf: torch.empty(1, *next(shapes)), self._form)
        return described(whole)

    def join(self, output: Any) -> Tensor:
        """Put the tensors side by side.

        Raises:
            ValueError: If they are not those of this form.
        """
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
