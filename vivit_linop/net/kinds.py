"""From a recorded use and the cotangents at its output to columns of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vivit_linop.net.columns.khatri_rao import (
    DenseColumns,
    KhatriRaoColumns,
    LayerColumns,
    share_signal,
    squares_by_pairs,
)
from vivit_linop.net.columns.tables import TableColumns
from vivit_linop.net.layouts import Layout
from vivit_linop.net.recorder import Use
from vivit_linop.net.transposed import Call, TransposedConvolutionColumns
from vivit_linop.net.views import View

_OfTensor = Callable[[dict[str, Any], Tensor], Tensor]


def columns_of_use(
    use: Use, layout: Layout
) -> Callable[[Tensor], list[tuple[View, LayerColumns]]]:
    """Return what gives the columns of the parameters of one use.

    Args:
        use: The use.
        layout: Where the samples are in the tensors of the use.

    Returns:
        A function of cotangents at its output, ``[n, R, …]``, that returns the columns
        of each view of a parameter. What does not depend on cotangents is made once.
    """
    weight, bias = (use.arguments.get(role) for role in ("weight", "bias"))
    of_weight: Callable[[Tensor], LayerColumns] | None = None
    if isinstance(weight, View) and use.kind != "mul":
        inputs = layout(use.arguments["input"])
        of_weight = _columns_of_weight(use.kind, use.arguments, inputs)

    def columns(B: Tensor) -> list[tuple[View, LayerColumns]]:
        found: list[tuple[View, LayerColumns]] = []
        if isinstance(weight, View):
            part = of_weight(B) if of_weight else _mul(use, layout, B)
            found.append((weight, part))
        if isinstance(bias, View):
            if use.kind == "add":
                part = _add(use, layout, B)
            else:
                part = bias_columns(use.kind, use.arguments, B)
            found.append((bias, part))
        share_signal([part for _, part in found])
        return found

    return columns


def weight_columns(
    kind: str, arguments: dict[str, Any], X: Tensor, B: Tensor
) -> LayerColumns:
    """Return the columns of a weight.

    Args:
        kind: What the layer does with it, as in :class:`Use`.
        arguments: The layer's arguments by name.
        X: The layer's input, samples first.
        B: R cotangents at its output, ``[n, R, …]``.
    """
    return _columns_of_weight(kind, arguments, X)(B)


def _columns_of_weight(
    kind: str, arguments: dict[str, Any], X: Tensor
) -> Callable[[Tensor], LayerColumns]:
    if kind not in _FACTORS:
        return lambda B: _WEIGHTS[kind](arguments, X, B)
    of_inputs, of_cotangents = _FACTORS[kind]
    a = of_inputs(arguments, X)
    return lambda B: KhatriRaoColumns(a, of_cotangents(arguments, B))


def is_wide(use: Use, num_samples: int, width: int) -> bool:
    """Whether sums over columns are as cheap one column of each sample at a time.

    That is where the squares of its weight's entries are summed from formed columns,
    not from pairs of positions of all columns at once.

    Args:
        use: The use.
        num_samples: n.
        width: R.
    """
    if use.kind not in _FACTORS or not isinstance(use.arguments.get("weight"), View):
        return False
    outputs, inputs = use.arguments["weight_shape"][:2]
    inputs *= use.arguments["weight_shape"][2:].numel()
    positions = use.output_shape.numel() // (num_samples * outputs)
    outputs //= use.arguments.get("groups", 1)
    return not squares_by_pairs(inputs, outputs, positions, width)


def bias_columns(kind: str, arguments: dict[str, Any], B: Tensor) -> LayerColumns:
    """Return the columns of a bias, from cotangents ``[n, R, …]``."""
    n, R = B.shape[:2]
    if kind == "linear" and B.numel() == n * R * B.shape[-1]:
        # An input of ones; the cotangents are shared with the weight's columns.
        return KhatriRaoColumns(B.new_ones(n, 1, 1, 1), B.view(n, R, 1, -1, 1))
    trailing = kind in ("linear", "layer_norm")
    return DenseColumns(_sum_positions(B, arguments, trailing))


def entries_of_use(use: Use, num_samples: int, width: int) -> int:
    """Count the entries of what is needed for the columns of one sample.

    Args:
        use: The use.
        num_samples: n.
        width: R.
    """
    outputs = use.output_shape.numel() // num_samples
    # Signals as they are stacked, and those of one backward pass.
    entries = (width + 1) * outputs
    weight = use.arguments.get("weight")
    if not isinstance(weight, View) or not weight.shape.numel():
        return entries
    shape, groups = weight.shape, use.arguments.get("groups", 1)
    inputs = use.arguments["input"].numel() // num_samples
    match use.kind:
        case "linear" | "matvec" | "embedding":
            return entries + inputs
        case "conv":
            return entries + outputs // shape[0] * groups * shape[1:].numel()
        case "conv_transpose":
            positions = inputs // shape[0]
            return entries + inputs + width * positions * groups * shape[1:].numel()
        case _:  # the normalised input
            return entries + outputs


def overlapping(uses: Sequence[Use]) -> set[str]:
    """Return the parameters whose uses have factors that do not add up to factors."""
    forms: dict[str, set[tuple[int, int, bool]]] = {}
    for use in uses:
        for view in use.views:
            inputs_first = view.transposed != (use.kind in _INPUTS_FIRST)
            forms.setdefault(view.name, set()).add((*view.place, inputs_first))
    found = set()
    for name, parts in forms.items():
        ordered = sorted(parts)
        if any(right[0] < left[1] for left, right in pairwise(ordered)):
            found.add(name)
    return found


def _mul(use: Use, layout: Layout, B: Tensor) -> LayerColumns:
    """What a parameter is multiplied with multiplies the cotangents."""
    X = layout(use.arguments["input"].expand(use.output_shape))
    (view,) = use.views
    return _sum_broadcast(B * X.unsqueeze(1), view, layout)


def _add(use: Use, layout: Layout, B: Tensor) -> LayerColumns:
    (view,) = use.views
    return _sum_broadcast(use.arguments["factor"] * B, view, layout)


def _sum_broadcast(B: Tensor, view: View, layout: Layout) -> LayerColumns:
    """Sum over the axes along which a parameter has been repeated."""
    n, R = B.shape[:2]
    B = layout.aligned(B)
    axes = B.ndim - 2
    lengths = (1,) * (axes - len(view.shape)) + view.shape
    repeated = [2 + axis for axis in range(axes) if lengths[axis] == 1]
    if repeated:
        B = B.sum(repeated)
    return DenseColumns(B.reshape(n, R, -1))


def _linear_inputs(arguments: dict[str, Any], X: Tensor) -> Tensor:
    """``[n, …, in]``; without the last axis if in = 1."""
    return X.reshape(len(X), 1, -1, arguments["weight_shape"][1]).mT


def _linear_cotangents(arguments: dict[str, Any], B: Tensor) -> Tensor:
    """``[n, R, …, out]``; without the last axis if out = 1."""
    n, R = B.shape[:2]
    return B.reshape(n, R, 1, -1, arguments["weight_shape"][0]).mT


def _conv_inputs(arguments: dict[str, Any], X: Tensor) -> Tensor:
    """``[n, in, …]``."""
    patches = unfold(X, arguments)
    positions = patches.shape[len(arguments["weight_shape"]) :].numel()
    return patches.reshape(len(X), arguments.get("groups", 1), -1, positions)


def _conv_cotangents(arguments: dict[str, Any], B: Tensor) -> Tensor:
    """``[n, R, out, …]``."""
    n, R, out = B.shape[:3]
    groups = arguments.get("groups", 1)
    return B.reshape(n, R, groups, out // groups, -1)


def _conv_transpose(arguments: dict[str, Any], X: Tensor, B: Tensor) -> LayerColumns:
    """A transposed convolution exchanges the roles of input and output."""
    groups = arguments.get("groups", 1)
    n, R, channels = len(X), B.shape[1], X.shape[1]
    unfolded = unfold(B.flatten(0, 1), arguments)
    b = unfolded.reshape(n, R, groups, -1, X[0, 0].numel())
    a = X.reshape(n, groups, channels // groups, -1)
    return TransposedConvolutionColumns(a, b, [Call(arguments, X, B)])


def _embedding(arguments: dict[str, Any], X: Tensor, B: Tensor) -> LayerColumns:
    """A look-up is a product with a one-hot input."""
    rows = arguments["weight_shape"][0]
    n, R = B.shape[:2]
    index = X.reshape(n, -1).long()
    b = B.reshape(n, R, 1, -1, B.shape[-1]).mT
    number, padding = arguments.get("padding_idx"), None
    if number is not None:
        padding = index == number % rows
        b = b * ~padding[:, None, None, None]
    return TableColumns(index, b, rows, padding)


def _norm_weight(normalise: Callable[..., Tensor], trailing: bool) -> Any:
    """The weight of a norm multiplies what has been normalised."""

    def columns(arguments: dict[str, Any], X: Tensor, B: Tensor) -> LayerColumns:
        return DenseColumns(
            _sum_positions(
                B * normalise(X, arguments).unsqueeze(1), arguments, trailing
            )
        )

    return columns


def _sum_positions(B: Tensor, arguments: dict[str, Any], trailing: bool) -> Tensor:
    """Sum ``[n, R, …]`` over positions: channels are the last axes, or axis 2."""
    n, R = B.shape[:2]
    if trailing:
        axes = len(arguments.get("normalized_shape", (0,)))
        width = B.shape[B.ndim - axes :].numel()
        return B.reshape(n, R, -1, width).sum(2)
    return B.reshape(n, R, B.shape[2], -1).sum(3)


# Parameters of these are laid out with the axis of inputs before that of outputs.
_INPUTS_FIRST = {"embedding", "conv_transpose"}
# Inputs and cotangents in the form of columns, where each is made for itself …
_FACTORS: dict[str, tuple[_OfTensor, _OfTensor]] = {
    "linear": (_linear_inputs, _linear_cotangents),
    "matvec": (_linear_inputs, _linear_cotangents),
    "conv": (_conv_inputs, _conv_cotangents),
}
# … and the columns where not.
_WEIGHTS: dict[str, Callable[[dict[str, Any], Tensor, Tensor], LayerColumns]] = {
    "conv_transpose": _conv_transpose,
    "embedding": _embedding,
    "layer_norm": _norm_weight(
        lambda X, a: F.layer_norm(X, a["normalized_shape"], eps=a.get("eps", 1e-5)),
        trailing=True,
    ),
    "rms_norm": _norm_weight(
        lambda X, a: F.rms_norm(X, a["normalized_shape"], eps=a.get("eps")),
        trailing=True,
    ),
    "group_norm": _norm_weight(
        lambda X, a: F.group_norm(X, a["num_groups"], eps=a.get("eps", 1e-5)),
        trailing=False,
    ),
    "batch_norm": _norm_weight(
        lambda X, a: F.batch_norm(
            X, a["running_mean"], a["running_var"], eps=a.get("eps", 1e-5)
        ),
        trailing=False,
    ),
    "instance_norm": _norm_weight(
        lambda X, a: F.instance_norm(
            X,
            a.get("running_mean"),
            a.get("running_var"),
            use_input_stats=a.get("use_input_stats", True),
            eps=a.get("eps", 1e-5),
        ),
        trailing=False,
    ),
}


def unfold(X: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return the patches that a convolution sees, ``[n, in, *kernel, *positions]``.

    Args:
        X: ``[n, in, …]``, with any number of spatial axes.
        arguments: The convolution's.
    """
    kernel = arguments["weight_shape"][2:]
    dims = len(kernel)
    stride = _tuple(arguments.get("stride", 1), dims)
    dilation = _tuple(arguments.get("dilation", 1), dims)
    padding = arguments.get("padding", 0)
    pads: list[int] = []
    for axis in reversed(range(dims)):
        if padding == "same":
            total = dilation[axis] * (kernel[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            size = 0 if padding == "valid" else _tuple(padding, dims)[axis]
            pads += [size, size]
    X = F.pad(X, pads)
    for axis in range(dims):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        X = X.unfold(2 + axis, extent, stride[axis])[..., :: dilation[axis]]
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return X.permute(order)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)
