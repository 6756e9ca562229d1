"""Whether backward passes leave samples apart: told from the nodes of a graph.

Columns are made of what one backward pass brings to the layers, sample by sample. That
it brings to a place what is of its sample alone is seen by a second pass, with another
weight for each sample. Where a graph has only nodes of torch's that do to each sample
what they would do to it alone, whatever the values are, it cannot be otherwise. Which
these are, and where they have the samples, stands here. Of others nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

# From a node, and the shape of what it gave, to the numbers of the inputs that have the
# samples of its first axis in their first axis; None where it does not do so. All other
# inputs must be parameters.
Rule = Callable[[Any, Sequence[int]], Sequence[int] | None]

_PARAMETER = "torch::autograd::AccumulateGrad"


def stay_apart(output: Tensor, num_samples: int) -> bool:
    """Whether what is pulled back to a place of the graph is that of one sample.

    Args:
        output: ``[n, …]``, with its graph. There must be no hooks in it.
        num_samples: n.
    """
    if output.grad_fn is None or output.numel() == 0:
        return False
    nodes, seen = [(output.grad_fn, 0)], {output.grad_fn}
    for node, number in nodes:
        shape = _shape(node, number)
        rule = _RULES.get(node.name())
        if rule is None or number or shape[:1] != (num_samples,):
            return False
        try:
            inputs = rule(node, shape)
        except AttributeError:  # what nodes save is torch's own affair
            return False
        if inputs is None:
            return False
        for place, (following, its_number) in enumerate(node.next_functions):
            if following is None or _is_parameter(following):
                continue
            if place not in inputs:
                return False
            if rule is _elementwise and _shape(following, its_number) != shape:
                return False  # one entry is repeated
            if following not in seen:
                seen.add(following)
                nodes.append((following, its_number))
            elif its_number:
                return False
    return True


def _shape(node: Node, number: int) -> tuple[int, ...]:
    """The shape of what a node gave; empty where torch does not say."""
    given: Any = getattr(node, "_input_metadata", None)
    return tuple(given[number].shape) if given else ()


def _is_parameter(node: Node) -> bool:
    """Whether a gradient ends here, or one step further for a transposed matrix."""
    if node.name() == "TBackward0":
        ((following, _),) = node.next_functions
        return following is not None and following.name() == _PARAMETER
    return node.name() == _PARAMETER


def _signed(axes: int | Sequence[int], dims: int) -> list[int]:
    """Axes from the first; nodes have the negative ones as very large numbers."""
    axes = [axes] if isinstance(axes, int) else axes
    return [(axis - 2**64 if axis >= 2**63 else axis) % dims for axis in axes]


def _elementwise(node: Any, shape: Sequence[int]) -> Sequence[int]:
    return range(len(node.next_functions))


def _first(node: Any, shape: Sequence[int]) -> Sequence[int]:
    """Samples are in the first axis of its first input, as ``nn.Conv2d`` has them."""
    return [0] if len(shape) > 1 else []


def _second(node: Any, shape: Sequence[int]) -> Sequence[int]:
    return [1]


def _view(node: Any, shape: Sequence[int]) -> Sequence[int] | None:
    """Entries stay in their order, so those of a sample stay together."""
    before = node._saved_self_sym_sizes
    return [0] if before and before[0] == shape[0] else None


def _unless(condition: Callable[[Any, int], bool]) -> Rule:
    """Samples stay in the first axis but under a condition on the node and its axes."""

    def rule(node: Any, shape: Sequence[int]) -> Sequence[int] | None:
        return None if condition(node, len(shape)) else [0]

    return rule


def _sums_over_samples(node: Any, dims: int) -> bool:
    axes, before = node._saved_dim, len(node._saved_self_sym_sizes)
    return not axes or 0 in _signed(axes, before)


_along_samples = _unless(lambda node, dims: 0 in _signed(node._saved_dim, dims))
_RULES: dict[str, Rule] = {
    "AddmmBackward0": _second,
    "ConstantPadNdBackward0": _unless(
        lambda node, dims: len(node._saved_pad) >= 2 * dims
    ),
    "MeanBackward1": _unless(_sums_over_samples),
    "NativeBatchNormBackward0": _unless(lambda node, _: node._saved_training),
    "NativeLayerNormBackward0": _unless(
        lambda node, dims: len(node._saved_normalized_shape) >= dims
    ),
    "SumBackward1": _unless(_sums_over_samples),
    **dict.fromkeys(
        [
            *("AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0", "MmBackward0"),
            *("ConvolutionBackward0", "MaxPool2DWithIndicesBackward0"),
        ],
        _first,
    ),
    **dict.fromkeys(["ViewBackward0", "UnsafeViewBackward0"], _view),
    **dict.fromkeys(
        ["LogSoftmaxBackward0", "SoftmaxBackward0", "SliceBackward0"], _along_samples
    ),
    **dict.fromkeys(
        [
            *("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0"),
            *("AliasBackward0", "CloneBackward0", "CosBackward0", "EluBackward0"),
            *("ExpBackward0", "GeluBackward0", "HardtanhBackward0"),
            *("LeakyReluBackward0", "NegBackward0", "PowBackward0", "ReluBackward0"),
            *("SigmoidBackward0", "SiluBackward0", "SinBackward0", "SqrtBackward0"),
            *("SoftplusBackward0", "TanhBackward0", "ThresholdBackward0"),
        ],
        _elementwise,
    ),
}
