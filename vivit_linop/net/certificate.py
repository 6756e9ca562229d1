"""What shows that columns are right: sums with random weights, or the graph itself.

With a random weight w for each column, Σ w_nr c_nr must be Jᵀ (B w), which is one
ordinary backward pass through the net on all samples of the columns. A weight of its
own for each sample *and* column makes wrong values seen as well as right values of the
wrong sample (Freivalds 1977: a product is checked by a random vector). Each parameter
is compared for itself, so that only those that fail have to be made in another way.

Weights are scaled so that all columns count alike, however small, and have magnitudes
between 1 and 2 before: none hides behind the others, and none behind its own weight.
What is tolerated is measured by one column, not by their sum, so that one wrong column
among very many is seen.

Columns are made of what one backward pass brings to the layers, sample by sample. That
it brings to a place what is of its sample alone is seen by the second pass, with
another weight for each sample. Where a graph has only nodes of torch's that do to each
sample what they would do to it alone, whatever the values are, it cannot be otherwise.
Which these are, and where they have the samples, stands at the end. Of others nothing
is said.

Such a graph also tells who has a parameter. Where these are calls of torch's layers
that have been recorded, with the inputs that the graph has, columns are what the rules
of these layers make of signals: once the rules have been certified on some samples,
those of all others need no sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from vivit_linop.devices import told, tolerated
from vivit_linop.graphs import saved_by
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.structure import Use
from vivit_linop.noise import BY_NOISE, Noise

# How often rounding is measured before a result is called wrong: where a few numbers
# cancel, most often nothing is left.
_ATTEMPTS = 64


class Certificate:
    """Random weights for columns, and what is tolerated where they are added up.

    Args:
        columns: The columns, by parameter.
        cotangents: B, ``[n, C, R]``, of which they are pulled back.

    Attributes:
        weights: w, ``[n, R]``.
        cotangent: B w, ``[n, C]``.
    """

    def __init__(
        self,
        columns: Mapping[str, LayerColumns],
        cotangents: Tensor,
    ) -> None:
        self._columns = columns
        n, _, R = cotangents.shape
        # One operation on those of all parameters is as fast as one on each.
        found = [part.sizes() for part in columns.values()]
        sizes = torch.stack(found) if found else cotangents.new_zeros(0, n, R)
        self.weights = _weights(sizes, norms(cotangents, 1))
        self.cotangent = torch.bmm(cotangents, self.weights.unsqueeze(2)).squeeze(2)
        # What a column has, in the mean, of a parameter.
        parts = (self.weights * sizes).flatten(1)
        self._shares = torch.linalg.vector_norm(parts, dim=1) / (n * R) ** 0.5

    def errors(
        self,
        gradients: Mapping[str, Tensor],
        lenient: Set[str] = frozenset(),
        noise: float = 0.0,
    ) -> dict[str, float]:
        """Return how far parameters' columns are off, in units of what is tolerated.

        Rounding errors of two ways to one sum grow with the root of the number of
        columns, and are those of all parameters where a parameter's own columns cancel.
        Ways to a single column differ by about ε^¾ at most if the net is well
        conditioned, by √ε otherwise.

        Args:
            gradients: By parameter, its part of Jᵀ B w; it may have no columns.
            lenient: For which of them the net may be ill-conditioned.
            noise: By how much rounding is known to change these gradients.
        """
        differences = list[Tensor]()
        for name, gradient in gradients.items():
            difference = gradient.reshape(-1)
            if name in self._columns:
                difference = self._columns[name].residual(self.weights, difference)
            differences.append(difference)
        # The host waits for all of them together.
        distances = torch.stack(torch._foreach_norm(differences))
        (*shares,), (*found,) = told([self._shares, distances])
        of = dict(zip(self._columns, shares, strict=True))
        eps, whole = torch.finfo(distances.dtype).eps, math.hypot(*shares)
        spread, errors = self.weights.numel() ** 0.5, dict[str, float]()
        for name, distance in zip(gradients, found, strict=True):
            share = of.get(name, 0.0)
            tolerated = 100 * eps**0.75 * share
            tolerated += spread * (10 * eps * share + eps**0.75 * whole)
            if name in lenient:
                tolerated = 10 * eps**0.5 * spread * (share + whole)
            tolerated += BY_NOISE * noise
            if distance == 0.0:
                errors[name] = 0.0
            else:
                errors[name] = distance / tolerated if tolerated else math.inf
        return errors


def roundings(
    pull_back: Callable[[dict[str, Tensor], Tensor], list[Tensor]],
    params: Mapping[str, Tensor],
    cotangent: Tensor,
    gradients: Sequence[Tensor],
) -> Iterator[list[float]]:
    """Yield by how much gradients change where all is off by units in the last place.

    Zero for those that are others at the same numbers, of which that tells nothing.
    """
    digits, stay = Noise(), list[bool]()
    for attempt in range(1 + _ATTEMPTS):
        off, found = digits.off if attempt else torch.clone, list[Tensor]()
        at = {name: off(p.detach()) for name, p in params.items()}
        # Whatever a net says to parameters that are no longer what they were.
        with tolerated(Exception):
            found = pull_back(at, off(cotangent))
        pairs = zip(found, gradients, strict=bool(found))
        changes = [float((again - once).norm()) for again, once in pairs]
        stay = stay or [change == 0.0 for change in changes]
        if not found or not any(stay):
            return
        yield [c if stays else 0.0 for c, stays in zip(changes, stay, strict=True)]


def _weights(sizes: Tensor, cotangents: Tensor) -> Tensor:
    """Random signs and magnitudes over the sizes of the columns, ``[n, R]``.

    Args:
        sizes: Of each parameter those of its columns, ``[P, n, R]``.
        cotangents: The norms of what is pulled back, ``[n, R]``.
    """
    drawn = _drawn(cotangents.shape, cotangents.dtype, cotangents.device)
    scale, eps = torch.zeros_like(cotangents), torch.finfo(cotangents.dtype)
    if len(sizes):
        # Squares of what is very large or very small are no numbers.
        scale = sizes.amax(0)
        unit = torch.where(scale > 0.0, scale, 1.0)
        scale = scale * norms(sizes / unit, 0)
    # A column that should not be as small as it is must not count for too much.
    pulled = torch.linalg.vector_norm(cotangents)
    gain = torch.linalg.vector_norm(scale) / pulled
    gain = torch.where(gain > 0.0, gain, 1.0)
    least = torch.where(pulled > 0.0, eps.eps**0.25 * gain * cotangents, 0.0)
    scale = torch.maximum(scale, least)
    return torch.where(scale > eps.tiny, drawn / scale, 0.0)


@lru_cache(maxsize=8)
def _drawn(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random signs and magnitudes between 1 and 2, which nobody writes into."""
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(
        2, *shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    return ((1.0 + draws[0]) * (draws[1] - 0.5).sign()).to(device, dtype)


def norms(tensor: Tensor, dim: int) -> Tensor:
    """Norms along an axis; torch's own are slow along any but the last."""
    return tensor.square().sum(dim).sqrt()


# Graphs that leave samples apart ----------------------------------------------------

# From a node, and the shape of what it gave, to the numbers of the inputs that have the
# samples of its first axis in their first axis; None where it does not do so. All other
# inputs must be parameters. A sample may have several rows of that axis, one after the
# other, as tokens have where a linear layer takes all of them together.
Rule = Callable[[Any, Sequence[int]], Sequence[int] | None]


_PARAMETER = "torch::autograd::AccumulateGrad"
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
# A leaf, and a node that has it as the input of this number.
Meeting = tuple[Tensor, Node, int]


def met_apart(output: Tensor, num_samples: int) -> list[Meeting] | None:
    """Return where the leaves of a graph come in, None where samples may meet in it.

    Else what is pulled back to a place of it is that of one sample. There must be no
    hooks in the graph of outputs ``[n, …]``.
    """
    if output.grad_fn is None or output.numel() == 0:
        return None
    met = list[Meeting]()
    nodes, seen = [(output.grad_fn, 0)], {(output.grad_fn, 0)}
    for node, number in nodes:
        shape = _shape(node, number)
        rule = _RULES.get(node.name())
        if rule is None or (number and node.name() not in _PARTS):
            return None
        if not shape or shape[0] == 0 or shape[0] % num_samples:
            return None
        try:
            inputs = rule(node, shape)
        except AttributeError:  # what nodes save is torch's own affair
            return None
        if inputs is None:
            return None
        for place, (following, its_number) in enumerate(node.next_functions):
            if following is None:
                continue
            if (leaf := _leaf(following)) is not None:
                met.append((leaf, node, place))
                continue
            if place not in inputs:
                return None
            if rule is _elementwise and _shape(following, its_number) != shape:
                return None  # one entry is repeated
            if (following, its_number) not in seen:
                seen.add((following, its_number))
                nodes.append((following, its_number))
    return met


def in_layers(
    met: Iterable[Meeting], uses: Iterable[Use], params: Mapping[str, Tensor]
) -> set[str]:
    """Return the parameters that recorded calls of torch's layers have, and no others.

    Leaves of the graph by name, where they come into it, show which others have them.
    """
    recorded = Counter(place for use in uses for place in _places(use))
    names = {id(leaf): name for name, leaf in params.items()}
    found = Counter((names.get(id(leaf), ""), node, at) for leaf, node, at in met)
    others = {place[0] for place in found if recorded[place] != found[place]}
    return set(params) - others


def _places(use: Use) -> Iterator[tuple[str, Node, int]]:
    """Yield where the graph has the parameters of a call that is torch's alone.

    That the graph has the call's tensors, as they were then, is seen from what it has
    saved.
    """
    node: Any = use.edge.node
    given = [each for each in use.arguments.values() if isinstance(each, Tensor)]
    if "AddmmBackward0" in use.kind.nodes and len(use.output_shape) > 2:
        # The rows of all positions are taken together, and the recorder may copy.
        while node.name() in ("CloneBackward0", *_VIEWS):
            ((node, _),) = node.next_functions
        given = [x.flatten(0, -2) for x in given]
    if (places := use.kind.nodes.get(node.name())) is None:
        return
    saved = [*saved_by(node)] if given else []
    if all(any(_is_same(each, own) for own in saved) for each in given):
        for view, place in zip((use.weight, use.bias), places, strict=True):
            if view is not None:
                yield view.name, node, place


def _is_same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same entries of one memory; wrappers have none."""
    where = left.data_ptr(), left.shape, left.stride()
    return where == (right.data_ptr(), right.shape, right.stride()) and where[0] != 0


def _shape(node: Node, number: int) -> tuple[int, ...]:
    """The shape of what a node gave; empty where torch does not say."""
    given: Any = getattr(node, "_input_metadata", None)
    return tuple(given[number].shape) if given else ()


def _leaf(node: Node) -> Tensor | None:
    """The parameter that ends here, or one step further for a view of all of it."""
    if node.name() in ("TBackward0", "ViewBackward0"):
        ((following, _),) = node.next_functions
        if following is None:
            return None
        node = following
    own: Any = node
    return own.variable if node.name() == _PARAMETER else None


def _signed(axes: int | Sequence[int], dims: int) -> list[int]:
    """Axes from the first; nodes have the negative ones as very large numbers."""
    axes = [axes] if isinstance(axes, int) else axes
    return [(axis - 2**64 if axis >= 2**63 else axis) % dims for axis in axes]


def _elementwise(node: Any, shape: Sequence[int]) -> Sequence[int]:
    return range(len(node.next_functions))


def _first(node: Any, shape: Sequence[int]) -> Sequence[int]:
    """Samples are in the first axis of its first input, as ``nn.Conv2d`` has them."""
    return [0] if len(shape) > 1 else []


def _view(node: Any, shape: Sequence[int]) -> Sequence[int]:
    """Entries stay in their order, so those of a sample stay together."""
    return [0]


def _unless(condition: Callable[[Any, int], bool]) -> Rule:
    """Samples stay in the first axis but under a condition on the node and its axes."""

    def rule(node: Any, shape: Sequence[int]) -> Sequence[int] | None:
        return None if condition(node, len(shape)) else [0]

    return rule


def _joined(node: Any, shape: Sequence[int]) -> Sequence[int] | None:
    apart = 0 not in _signed(node._saved_dim, len(shape))
    return range(len(node.next_functions)) if apart else None


def _squeezed(node: Any, dims: int) -> bool:
    return 0 in _signed(node._saved_dim, len(node._saved_self_sym_sizes))


def _sums_over_samples(node: Any, dims: int) -> bool:
    axes, before = node._saved_dim, len(node._saved_self_sym_sizes)
    return not axes or 0 in _signed(axes, before)


def _repeats_samples(node: Any, dims: int) -> bool:
    return len(node._saved_self_sym_sizes) < dims or node._saved_self_sym_sizes[0] == 1


_along_samples = _unless(lambda node, dims: 0 in _signed(node._saved_dim, dims))
_RULES: dict[str, Rule] = {
    "AddmmBackward0": lambda node, shape: [1],
    "BmmBackward0": lambda node, shape: [0, 1],
    "CatBackward0": _joined,
    "ConstantPadNdBackward0": _unless(
        lambda node, dims: len(node._saved_pad) >= 2 * dims
    ),
    "EmbeddingBackward0": lambda node, shape: [],
    "ExpandBackward0": _unless(_repeats_samples),
    "MeanBackward1": _unless(_sums_over_samples),
    "NativeBatchNormBackward0": _unless(lambda node, _: node._saved_training),
    "NativeLayerNormBackward0": _unless(
        lambda node, dims: len(node._saved_normalized_shape) >= dims
    ),
    "PermuteBackward0": _unless(
        lambda node, dims: _signed(node._saved_dims, dims)[0] != 0
    ),
    "SelectBackward0": _unless(_squeezed),
    "SqueezeBackward1": _unless(_squeezed),
    "StackBackward0": _joined,
    "SumBackward1": _unless(_sums_over_samples),
    "TransposeBackward0": _unless(
        lambda node, dims: 0 in _signed([node._saved_dim0, node._saved_dim1], dims)
    ),
    "UnbindBackward0": _unless(
        lambda node, dims: 0 in _signed(node._saved_dim, dims + 1)
    ),
    **dict.fromkeys(
        [
            *("ConvolutionBackward0", "MmBackward0", "NativeGroupNormBackward0"),
            "PreluKernelBackward0",
            *("AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0", "AvgPool3DBackward0"),
            *("MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0"),
            *("UpsampleBilinear2DBackward0", "UpsampleNearest2DBackward0"),
        ],
        _first,
    ),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(
        [
            *("LogSoftmaxBackward0", "SoftmaxBackward0", "SliceBackward0"),
            *("UnsqueezeBackward0", "SafeSoftmaxBackward0"),
            *("SplitBackward0", "SplitWithSizesBackward0"),
        ],
        _along_samples,
    ),
    **dict.fromkeys(
        [
            *("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0"),
            *("AbsBackward0", "AliasBackward0", "ClampBackward1", "CloneBackward0"),
            *("CosBackward0", "EluBackward0", "ErfBackward0", "ExpBackward0"),
            *("GeluBackward0", "MulBackward1", "RsqrtBackward0"),
            *("HardswishBackward0", "HardtanhBackward0", "LeakyReluBackward0"),
            *("LogBackward0", "MaskedFillBackward0", "MishBackward0", "NegBackward0"),
            *("PowBackward0", "ReluBackward0", "WhereBackward0"),
            *("SigmoidBackward0", "SiluBackward0", "SinBackward0", "SqrtBackward0"),
            *("SoftplusBackward0", "TanhBackward0", "ThresholdBackward0"),
        ],
        _elementwise,
    ),
}
# Nodes that give several results, each with the samples in its first axis.
_PARTS = {"SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0"}
