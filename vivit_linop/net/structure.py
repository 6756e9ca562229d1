"""How a net uses its parameters: uses, their variants, and which columns are trusted.

A :class:`Use` is one call of a layer; where the samples are in its tensors is its
:class:`Layout`. The uses of a run make a :class:`Variant`, and all that is known of a
net is its :class:`Structure`. A net is recorded on a few samples first. What is found
there is a guess for all others: columns are checked on every batch that they are made
for, and what fails is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.func import vmap

from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns, squares_by_pairs
from vivit_linop.net.columns.unfolded import UnfoldedInputs
from vivit_linop.net.kinds import Arguments, Kind, View

# A net that takes other ways on other samples may have this many; beyond, parameters
# whose layouts do not fit are opaque.
MOST_VARIANTS = 8

UseKey = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class Layout:
    """A place of the samples, in tensors that have an axis for them.

    Args:
        name: ``"first"`` or ``"second"`` for the axis of samples; ``"merged"`` or
            ``"merged second"`` where it is the slow or the fast part of the first axis;
            ``"single"`` where all is of one sample.
        num_samples: n.
    """

    name: str
    num_samples: int

    def __call__(self, tensor: Tensor) -> Tensor:
        """Bring a tensor into the form ``[n, …]``."""
        n = self.num_samples
        if self.name == "first":
            return tensor
        if self.name == "second":
            return tensor.transpose(0, 1)
        if self.name == "merged":
            return tensor.reshape(n, -1, *tensor.shape[1:])
        if self.name == "merged second":
            return tensor.reshape(-1, n, *tensor.shape[1:]).transpose(0, 1)
        return tensor.unsqueeze(0)

    def of_columns(self, tensors: Tensor) -> Tensor:
        """Bring R tensors, ``[R, …]``, into the form ``[n, R, …]``."""
        if self.name == "first":
            return tensors.transpose(0, 1)
        if self.name == "single":
            return tensors.unsqueeze(0)
        return vmap(self, out_dims=1)(tensors)

    def aligned(self, B: Tensor) -> Tensor:
        """Give cotangents ``[n, R, …]`` one axis again for each of the use's output.

        What is left of the axis of samples has length one where they fill it.
        """
        axis = {"first": 2, "second": 3}.get(self.name)
        return B if axis is None else B.unsqueeze(axis)


def fitting(
    layouts: Sequence[str], signal: Tensor, sample: int, num_samples: int
) -> Tensor:
    """Whether there is a signal of one sample; for each layout, whether all is there.

    Not read by the host.
    """
    flags = [signal.any()]
    for layout in layouts:
        by_sample = Layout(layout, num_samples)(signal)
        others = by_sample[:sample].any() | by_sample[sample + 1 :].any()
        flags.append(~others)
    return torch.stack(flags)


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

    def __init__(
        self, kind: Kind, arguments: Arguments, shape: torch.Size, edge: GradientEdge
    ) -> None:
        self.kind, self.arguments = kind, arguments
        self.output_shape, self.edge = shape, edge
        weight, bias = arguments.get("weight"), arguments.get("bias")
        self.weight = weight if isinstance(weight, View) else None
        self.bias = bias if isinstance(bias, View) else None
        self.views = [view for view in (self.weight, self.bias) if view is not None]
        self.names = [view.name for view in self.views]
        self.key: UseKey = (
            kind.name,
            None if self.weight is None else self.weight.name,
            None if self.bias is None else self.bias.name,
        )

    def columns(
        self, layout: Layout, width: int
    ) -> Callable[[Tensor], list[tuple[View, LayerColumns]]]:
        """Return what makes the columns of the views from cotangents ``[n, R, …]``.

        The layout says where samples are in input and output, the width how many
        cotangents each has in all calls. What does not depend on them is made once.
        """
        arguments, broadcast = self.arguments, self.kind.samples == "broadcast"
        of_weight: Callable[[Tensor], LayerColumns] | None = None

        def make(B: Tensor) -> list[tuple[View, LayerColumns]]:
            nonlocal of_weight
            found: list[tuple[View, LayerColumns]] = []
            if self.weight is not None and of_weight is None:
                inputs = arguments["input"]
                if broadcast:
                    inputs = layout(inputs.expand(self.output_shape)).unsqueeze(1)
                    inputs = layout.aligned(inputs).squeeze(1)
                else:
                    inputs = layout(inputs)
                of_weight = columns_of_weight(self.kind, arguments, inputs, width)
            if broadcast:
                B = layout.aligned(B)
            if self.weight is not None and of_weight is not None:
                found.append((self.weight, of_weight(B)))
            if self.bias is not None and self.kind.bias is not None:
                found.append((self.bias, self.kind.bias(arguments, B)))
            if len(found) == 2 and isinstance(found[0][1], KhatriRaoColumns):
                found[0][1].share_cotangents(found[1][1])
            return found

        return make

    def layouts(self, num_samples: int) -> list[str]:
        """Return the names of the layouts that it may have with n samples."""
        n, shape, samples = num_samples, self.output_shape, self.kind.samples
        axes = len(shape) - (samples in ("first", "leading"))
        found = ["first"] if axes > 0 and shape[0] == n else []
        if samples != "first":
            if n == 1:
                return ["single"]
            if axes > 1 and shape[1] == n:
                found.append("second")
            if axes > 0 and shape[0] % n == 0 and shape[0] > n:
                found += ["merged", "merged second"]
        if samples == "broadcast":
            # A parameter that has entries of its own for each sample is no such use.
            parameter = self.views[0].shape
            lengths = (1,) * (len(shape) - len(parameter)) + parameter
            found = [c for c in found if lengths[c == "second"] == 1]
        return found

    def is_wide(self, num_samples: int, width: int) -> bool:
        """Whether sums over columns are as cheap one column of each sample at a time.

        That is where the squares of its weight's entries are summed from formed
        columns, not from pairs of positions of all columns at once.
        """
        if self.kind.inputs is None or self.weight is None:
            return False
        shape = self.arguments["weight_shape"]
        positions = self.output_shape.numel() // (num_samples * shape[0])
        outputs = shape[0] // self.arguments.get("groups", 1)
        return not squares_by_pairs(shape[1:].numel(), outputs, positions, width)

    def is_smaller_formed(self, num_samples: int) -> bool:
        """Whether a column has fewer entries formed than its cotangent at the output.

        As of convolutions of large images. Rules that make the columns of a weight in
        a way of their own take all cotangents at once.
        """
        if self.weight is not None and self.kind.inputs is None:
            return False
        numel = sum(view.shape.numel() for view in self.views)
        return numel < self.output_shape.numel() // num_samples

    def entries(self, num_samples: int, width: int) -> int:
        """Count the entries of what is needed for R columns of one of n samples."""
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
    kind: Kind, arguments: Arguments, X: Tensor, width: int
) -> Callable[[Tensor], LayerColumns]:
    """Return what makes the columns of a weight from cotangents ``[n, R, …]``.

    X is the input in the form that the rules of the kind take. For several cotangents
    of each sample in all, inputs are made once; for one, when they are needed.
    """
    if kind.inputs is None or kind.cotangents is None:
        assert kind.weight is not None
        weight = kind.weight
        return lambda B: weight(arguments, X, B)
    cotangents, first = kind.cotangents, kind.inputs_first
    a: Tensor | UnfoldedInputs
    # On a GPU parts would take launches of their own.
    if kind.unfolds and width == 1 and X.is_cpu:
        channels = arguments["weight_shape"][1:].numel()
        a = UnfoldedInputs(X, partial(kind.inputs, arguments), channels)
    else:
        a = kind.inputs(arguments, X)
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


@dataclass
class Variant:
    """One way that a net takes: its uses, and where the samples are in each.

    Attributes:
        uses: The kind of each, with the names of weight and bias.
        layouts: For each, where its samples are; None where unknown.
        single: Whether it was found on one sample, where every axis is of that sample.
        together: Whether a sample's columns may be pulled back together; not where
            torch's rules for batches have failed, or were wrong.
    """

    uses: list[UseKey]
    layouts: list[str | None]
    single: bool
    together: bool = field(default=True, compare=False)

    def fits(self, uses: list[Use], num_samples: int) -> bool:
        """Whether it may be that of a run, as far as can be seen from outside."""
        if self.single != (num_samples == 1) or len(uses) != len(self.uses):
            return False
        for use, key, layout in zip(uses, self.uses, self.layouts, strict=True):
            if use.key != key:
                return False
            if layout is not None and layout not in use.layouts(num_samples):
                return False
        return True


@dataclass
class Structure:
    """What has been learnt of a net, on all batches so far.

    Attributes:
        variants: The ways that it takes, the one seen last first.
        opaque: Parameters whose columns need a vector–Jacobian product by sample.
        singly: Those of them for which samples cannot be vectorised.
        uses: What was used where it was looked for.
        certified: Whether columns were certified there.
        layers: Then those of each parameter, one a sample, without data.
    """

    variants: list[Variant] = field(default_factory=list)
    opaque: set[str] = field(default_factory=set)
    singly: set[str] = field(default_factory=set)
    uses: list[UseKey] = field(default_factory=list)
    certified: bool = False
    layers: dict[str, LayerColumns] = field(default_factory=dict)

    def fitting(self, uses: list[Use], num_samples: int) -> Variant | None:
        """Return a known variant that a run may be of."""
        for variant in self.variants:
            if variant.fits(uses, num_samples):
                return variant
        return None

    def learn(self, variant: Variant) -> None:
        """Take up a variant; where samples were not found, parameters are opaque."""
        others = [each for each in self.variants if each != variant]
        self.variants = [variant, *others[: MOST_VARIANTS - 1]]
        for (_, *used), layout in zip(variant.uses, variant.layouts, strict=True):
            if layout is None:
                self.opaque |= {name for name in used if name is not None}
