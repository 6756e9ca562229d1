"""The uses of parameters in one run of a net, and the columns that each gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.columns.joins import share_signal
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns, squares_by_pairs
from vivit_linop.net.kinds import Arguments, Kind
from vivit_linop.net.layouts import Layout, candidates
from vivit_linop.net.views import View

UseKey = tuple[str, str | None, str | None]


@dataclass
class Use:
    """One call of a torch function with parameters of the net.

    Attributes:
        kind: The kind of layer that the call is.
        arguments: The layer's arguments by name, tensors detached, parameters as views.
        output_shape: The shape of the result.
        edge: The place of the result in the graph, before anything is done to it.
        weight: The parameter, or part of one, that is its weight.
        bias: That which is its bias.
        views: Those of both that there are.
        names: The names of their parameters.
        key: The name of its kind, and those of weight and bias.
    """

    kind: Kind
    arguments: Arguments
    output_shape: torch.Size
    edge: GradientEdge
    weight: View | None = field(init=False)
    bias: View | None = field(init=False)
    views: list[View] = field(init=False)
    names: list[str] = field(init=False)
    key: UseKey = field(init=False)

    def __post_init__(self) -> None:
        """Look the parameters up."""
        weight, bias = self.arguments.get("weight"), self.arguments.get("bias")
        self.weight = weight if isinstance(weight, View) else None
        self.bias = bias if isinstance(bias, View) else None
        self.views, self.names = [], []
        for view in (self.weight, self.bias):
            if view is not None:
                self.views.append(view)
                self.names.append(view.name)
        self.key = (
            self.kind.name,
            None if self.weight is None else self.weight.name,
            None if self.bias is None else self.bias.name,
        )

    def columns(
        self, layout: Layout
    ) -> Callable[[Tensor], list[tuple[View, LayerColumns]]]:
        """Return what makes the columns of the views, from cotangents at the output.

        Args:
            layout: Where the samples are in input and output.

        Returns:
            A function of ``[n, R, …]``. What does not depend on cotangents is made
            once.
        """
        arguments, broadcast = self.arguments, self.kind.samples == "broadcast"
        of_weight = None
        if self.weight is not None:
            inputs = arguments["input"]
            if broadcast:
                inputs = layout(inputs.expand(self.output_shape)).unsqueeze(1)
                inputs = layout.aligned(inputs).squeeze(1)
            else:
                inputs = layout(inputs)
            of_weight = columns_of_weight(self.kind, arguments, inputs)

        def make(B: Tensor) -> list[tuple[View, LayerColumns]]:
            found: list[tuple[View, LayerColumns]] = []
            if broadcast:
                B = layout.aligned(B)
            if self.weight is not None and of_weight is not None:
                found.append((self.weight, of_weight(B)))
            if self.bias is not None and self.kind.bias is not None:
                found.append((self.bias, self.kind.bias(arguments, B)))
            if len(found) == 2:
                share_signal(found[0][1], found[1][1])
            return found

        return make

    def layouts(self, num_samples: int) -> list[str]:
        """Return the names of the layouts that it may have with n samples."""
        shapes = self.output_shape, num_samples, self.views[0].shape
        return candidates(self.kind.samples, *shapes)

    def is_wide(self, num_samples: int, width: int) -> bool:
        """Whether sums over columns are as cheap one column of each sample at a time.

        That is where the squares of its weight's entries are summed from formed
        columns, not from pairs of positions of all columns at once.

        Args:
            num_samples: n.
            width: R.
        """
        if self.kind.inputs is None or self.weight is None:
            return False
        shape = self.arguments["weight_shape"]
        positions = self.output_shape.numel() // (num_samples * shape[0])
        outputs = shape[0] // self.arguments.get("groups", 1)
        return not squares_by_pairs(shape[1:].numel(), outputs, positions, width)

    def entries(self, num_samples: int, width: int) -> int:
        """Count the entries of what is needed for the columns of one sample.

        Args:
            num_samples: n.
            width: R.
        """
        outputs = self.output_shape.numel() // num_samples
        # Signals as they are stacked, and those of one backward pass.
        entries = (width + 1) * outputs
        if self.weight is None or not self.weight.shape.numel():
            return entries
        kind, arguments = self.kind, self.arguments
        inputs = arguments["input"].numel() // num_samples
        if kind.entries is not None:
            return entries + kind.entries(arguments, inputs, width)
        if kind.inputs is None:
            return entries + inputs + outputs
        shape, groups = arguments["weight_shape"], arguments.get("groups", 1)
        return entries + outputs // shape[0] * groups * shape[1:].numel()


def columns_of_weight(
    kind: Kind, arguments: Arguments, X: Tensor
) -> Callable[[Tensor], LayerColumns]:
    """Return what makes the columns of a weight from cotangents ``[n, R, …]``.

    Args:
        kind: The layer's kind.
        arguments: Its arguments by name.
        X: Its input, in the form that the rules of the kind take.
    """
    if kind.inputs is None or kind.cotangents is None:
        assert kind.weight is not None
        weight = kind.weight
        return lambda B: weight(arguments, X, B)
    a, cotangents = kind.inputs(arguments, X), kind.cotangents
    first = kind.inputs_first
    return lambda B: KhatriRaoColumns(a, cotangents(arguments, B), first)


def overlapping(uses: Sequence[Use]) -> set[str]:
    """Return the parameters whose uses have factors that do not add up to factors."""
    forms: dict[str, set[tuple[int, int, bool]]] = {}
    for use in uses:
        for view in use.views:
            inputs_first = view.transposed != use.kind.inputs_first
            forms.setdefault(view.name, set()).add((*view.place, inputs_first))
    found = set()
    for name, parts in forms.items():
        ordered = sorted(parts)
        if any(right[0] < left[1] for left, right in pairwise(ordered)):
            found.add(name)
    return found
