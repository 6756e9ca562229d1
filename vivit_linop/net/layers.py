"""The table of layer kinds: what torch's layers do with their parameters.

One entry a kind (:class:`vivit_linop.net.kinds.Kind`): its calls, where samples may be,
and how the columns of its weight and bias are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit_linop.devices import fresh
from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.tables import TableColumns
from vivit_linop.net.columns.transposed import Call, TransposedConvolutionColumns
from vivit_linop.net.kinds import Arguments, Kind, Signature, View, functions, register

# Linear layers, and matrix products with parameters ------------------------------


def _read_product_with(axes: int) -> Callable[[Arguments], Arguments | None]:
    """``x @ W`` is linear with Wᵀ, and ``x @ w`` with the matrix of one row wᵀ."""

    def read(given: Arguments) -> Arguments | None:
        data, weight, *options = given.values()
        if options or not isinstance(weight, View) or len(weight.shape) != axes:
            return None
        return {"input": data, "weight": weight.mT}

    return read


def _read_addmm(given: Arguments) -> Arguments | None:
    """``b + x @ W``, with one b for all rows."""
    bias, data, weight, *factors = given.values()
    if bias is None or weight is None or factors:
        return None
    outputs = weight.shape[1:]
    if bias.shape not in (outputs, (1, *outputs)):
        return None
    return {"input": data, "weight": weight.mT, "bias": bias}


def _read_einsum(given: Arguments) -> Arguments | None:
    """``"…d,de->…e"``: axes of a matrix are the last ones of input and output."""
    equation = given.get("equation")
    if [*given] != ["equation", "input", "other"] or not isinstance(equation, str):
        return None
    _, data, weight = given.values()
    operands, _, output = equation.replace(" ", "").partition("->")
    of_data, _, of_weight = operands.partition(",")
    if isinstance(data, View):
        data, weight, of_data, of_weight = weight, data, of_weight, of_data
    if not isinstance(data, Tensor) or not isinstance(weight, View):
        return None
    for cut in range(1, len(of_weight)):
        left, right = of_weight[:cut], of_weight[cut:]
        shape = weight.shape[:cut].numel(), weight.shape[cut:].numel()
        matrix = replace(weight, shape=torch.Size(shape))
        for ins, outs, read in ((left, right, matrix.mT), (right, left, matrix)):
            rows = of_data.removesuffix(ins)
            axes = rows.replace("...", "") + of_weight
            if (rows + ins, rows + outs) == (of_data, output):
                if axes.isalpha() and len({*axes}) == len(axes):
                    return {"input": data, "weight": read}
    return None


def _read_bilinear(given: Arguments) -> Arguments | None:
    """Linear in the products of the entries of both inputs."""
    left, right, weight = given["input1"], given["input2"], given["weight"]
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    if isinstance(weight, View):
        shape = weight.shape[0], weight.shape[1:].numel()
        weight = replace(weight, shape=torch.Size(shape))
    products = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
    return {"input": products, "weight": weight, "bias": given.get("bias")}


def _linear_inputs(arguments: Arguments, X: Tensor) -> Tensor:
    """``[n, …, in]``; without the last axis if in = 1."""
    return X.reshape(len(X), 1, -1, arguments["weight_shape"][1]).mT


def _linear_cotangents(arguments: Arguments, B: Tensor) -> Tensor:
    """``[n, R, …, out]``; without the last axis if out = 1."""
    n, R = B.shape[:2]
    return B.reshape(n, R, 1, -1, arguments["weight_shape"][0]).mT


def _linear_bias(arguments: Arguments, B: Tensor) -> LayerColumns:
    n, R = B.shape[:2]
    if B.numel() == n * R * B.shape[-1]:
        # An input of ones; the cotangents are shared with the weight's columns.
        columns = KhatriRaoColumns(B.new_ones(n, 1, 1, 1), B.view(n, R, 1, -1, 1))
        columns.of_ones = True
        return columns
    return _sum_before_last(arguments, B)


def _sum_before_last(arguments: Arguments, B: Tensor) -> DenseColumns:
    """Sum ``[n, R, …]`` over positions, where channels are the last axes."""
    n, R = B.shape[:2]
    axes = len(arguments.get("normalized_shape", (0,)))
    width = B.shape[B.ndim - axes :].numel()
    return DenseColumns(B.reshape(n, R, -1, width).sum(2))


_MATRIX_PRODUCTS = (
    (functions("matmul __matmul__"), "input other"),
    (functions("mm"), "input mat2"),
    (functions("mv"), "input vec"),
)
LINEAR = Kind(
    name="linear",
    signatures=[
        Signature([F.linear], "input weight bias"),
        Signature(functions("addmm"), "input mat1 mat2 beta alpha", _read_addmm),
        *(Signature(*product, _read_product_with(2)) for product in _MATRIX_PRODUCTS),
        Signature([torch.einsum], "equation input other third", _read_einsum),
    ],
    samples="leading",
    inputs=_linear_inputs,
    cotangents=_linear_cotangents,
    bias=_linear_bias,
    nodes={"AddmmBackward0": (2, 0), "MmBackward0": (1, -1)},
)
MATVEC = Kind(
    name="matvec",
    signatures=[
        Signature(*product, _read_product_with(1)) for product in _MATRIX_PRODUCTS
    ],
    samples="anywhere",
    inputs=_linear_inputs,
    cotangents=_linear_cotangents,
)
BILINEAR = Kind(
    name="bilinear",
    signatures=[Signature([F.bilinear], "input1 input2 weight bias", _read_bilinear)],
    samples="leading",
    inputs=_linear_inputs,
    cotangents=_linear_cotangents,
    bias=_linear_bias,
)

# Convolutions --------------------------------------------------------------------


def unfold(X: Tensor, arguments: Arguments) -> Tensor:
    """Return the patches that a convolution sees, ``[n, in, *kernel, *positions]``.

    Of X ``[n, in, …]``, with any number of spatial axes.
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
    # Windows are copied faster of what lies in order; where there is no margin, torch
    # would copy all for it.
    X = F.pad(X, pads) if any(pads) else X
    X = X.contiguous()
    for axis in range(dims):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        X = X.unfold(2 + axis, extent, stride[axis])[..., :: dilation[axis]]
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return X.permute(order)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


def _conv_inputs(arguments: Arguments, X: Tensor) -> Tensor:
    """``[n, in, …]``."""
    patches = unfold(X, arguments)
    if not patches.is_contiguous():
        patches = fresh(patches, *patches.shape).copy_(patches)
    positions = patches.shape[len(arguments["weight_shape"]) :].numel()
    return patches.reshape(len(X), arguments.get("groups", 1), -1, positions)


def _conv_cotangents(arguments: Arguments, B: Tensor) -> Tensor:
    """``[n, R, out, …]``."""
    n, R, out = B.shape[:3]
    groups = arguments.get("groups", 1)
    return B.reshape(n, R, groups, out // groups, -1)


def _sum_after_channels(arguments: Arguments, B: Tensor) -> DenseColumns:
    """Sum ``[n, R, channels, …]`` over positions."""
    return DenseColumns(B.flatten(3).sum(3) if B.ndim > 3 else B)


def _read_batch(given: Arguments) -> Arguments | None:
    """Torch takes an image without an axis of samples, too."""
    data, weight = given["input"], given["weight"]
    # What is made of parameters in ways that are not followed is None.
    followed = data is not None and weight is not None
    return None if followed and len(data.shape) < len(weight.shape) else given


CONV = Kind(
    name="conv",
    signatures=[
        Signature(
            [F.conv1d, F.conv2d, F.conv3d],
            "input weight bias stride padding dilation groups",
            _read_batch,
        )
    ],
    inputs=_conv_inputs,
    cotangents=_conv_cotangents,
    bias=_sum_after_channels,
    unfolds=True,
    nodes={"ConvolutionBackward0": (1, 2)},
)


def _conv_transpose(arguments: Arguments, X: Tensor, B: Tensor) -> LayerColumns:
    """A transposed convolution exchanges the roles of input and output."""
    groups = arguments.get("groups", 1)
    n, R, channels = len(X), B.shape[1], X.shape[1]
    # Padding of the output may add positions that there are none of the input for.
    places: tuple[Any, ...] = (..., *map(slice, X.shape[2:]))
    unfolded = unfold(B.flatten(0, 1), arguments)[places]
    b = unfolded.reshape(n, R, groups, -1, X[0, 0].numel())
    a = X.reshape(n, groups, channels // groups, -1)
    return TransposedConvolutionColumns(a, b, [Call(arguments, X, B)])


def _conv_transpose_entries(arguments: Arguments, inputs: int, width: int) -> int:
    """The input, and what each of its positions reaches."""
    shape, groups = arguments["weight_shape"], arguments.get("groups", 1)
    return int(inputs + width * (inputs // shape[0]) * groups * shape[1:].numel())


CONV_TRANSPOSE = Kind(
    name="conv_transpose",
    signatures=[
        Signature(
            [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d],
            "input weight bias stride padding output_padding groups dilation",
            _read_batch,
        )
    ],
    weight=_conv_transpose,
    bias=_sum_after_channels,
    inputs_first=True,
    entries=_conv_transpose_entries,
)

# Embeddings ----------------------------------------------------------------------


def _read_embedding(given: Arguments) -> Arguments | None:
    """One that renormalises its rows mixes samples."""
    if given.get("scale_grad_by_freq"):
        raise ValueError(
            "model: calls F.embedding with scale_grad_by_freq=True, whose backward "
            "pass gives no derivatives; leave that out, the outputs are the same."
        )
    return None if given.get("max_norm") is not None else given


def _embedding(arguments: Arguments, X: Tensor, B: Tensor) -> LayerColumns:
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


EMBEDDING = Kind(
    name="embedding",
    signatures=[
        Signature(
            [F.embedding],
            "input weight padding_idx max_norm norm_type scale_grad_by_freq",
            _read_embedding,
        )
    ],
    samples="leading",
    weight=_embedding,
    nodes={"EmbeddingBackward0": (0, -1)},
    inputs_first=True,
)


_FACTORS = "per_sample_weights"


def _read_bags(given: Arguments) -> Arguments | None:
    """Sums and means of rows, as many look-ups for each bag as the longest one has."""
    X, offsets, weights = given["input"], given.get("offsets"), given.get(_FACTORS)
    known = weights if _FACTORS in given else X
    if not isinstance(given["weight"], View) or not isinstance(known, Tensor):
        return None
    no_sum = given.get("mode") == "max" or given.get("max_norm") is not None
    if no_sum or given.get("scale_grad_by_freq") or not X.numel():
        return None
    there = torch.ones_like(X, dtype=torch.bool)
    if (number := given.get("padding_idx")) is not None:
        there = X != number % given["weight"].shape[0]
    if offsets is not None:
        if not given.get("include_last_offset"):
            offsets = torch.cat([offsets, offsets.new_tensor([len(X)])])
        places = torch.arange(int(offsets.diff().max()), device=X.device)
        index = offsets[:-1, None] + places
        inside = index < offsets[1:, None]
        index = index.clamp(max=len(X) - 1)
        X, there = X[index], there[index] & inside
        weights = None if weights is None else weights[index]
    return given | {"input": X, "there": there, _FACTORS: weights}


def _bags(arguments: Arguments, X: Tensor, B: Tensor) -> LayerColumns:
    """The rows of each bag are looked up, with a share of what is pulled back to it."""
    there = arguments["there"]
    share = there.to(B)
    if arguments.get("mode", "mean") == "mean":
        share = share / share.sum(1, keepdim=True).clamp(min=1.0)
    if arguments[_FACTORS] is not None:
        share = share * arguments[_FACTORS]
    b = B[:, :, None, :, None] * share[:, None, None, None]
    return TableColumns(X.long(), b, arguments["weight_shape"][0], ~there)


EMBEDDING_BAG = Kind(
    name="embedding_bag",
    signatures=[
        Signature(
            [F.embedding_bag],
            "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse "
            f"{_FACTORS} include_last_offset padding_idx",
            _read_bags,
        )
    ],
    weight=_bags,
    inputs_first=True,
    entries=lambda of, inputs, width: inputs * (1 + width * of["weight_shape"][1]),
)

# Norms: a weight multiplies what has been normalised ------------------------------


def _norm(
    function: Callable[..., Tensor],
    arguments: str,
    normalised: Callable[[Arguments, Tensor], Tensor],
    **others: Any,
) -> Kind:
    """A norm with channels in the second axis, or in the last ones."""
    last = others.get("samples") == "leading"
    summed = _sum_before_last if last else _sum_after_channels

    def weight(arguments: Arguments, X: Tensor, B: Tensor) -> LayerColumns:
        return summed(arguments, B * normalised(arguments, X).unsqueeze(1))

    read = others.pop("read", None)
    return Kind(
        name=function.__name__,
        signatures=[Signature([function], arguments, read)],
        weight=weight,
        bias=summed,
        **others,
    )


LAYER_NORM = _norm(
    F.layer_norm,
    "input normalized_shape weight bias eps",
    lambda a, X: F.layer_norm(X, a["normalized_shape"], eps=a.get("eps", 1e-5)),
    samples="leading",
    nodes={"NativeLayerNormBackward0": (1, 2)},
)
RMS_NORM = _norm(
    F.rms_norm,
    "input normalized_shape weight eps",
    lambda a, X: F.rms_norm(X, a["normalized_shape"], eps=a.get("eps")),
    samples="leading",
)
GROUP_NORM = _norm(
    F.group_norm,
    "input num_groups weight bias eps",
    lambda a, X: F.group_norm(X, a["num_groups"], eps=a.get("eps", 1e-5)),
    nodes={"NativeGroupNormBackward0": (1, 2)},
)
BATCH_NORM = _norm(
    F.batch_norm,
    "input running_mean running_var weight bias training momentum eps",
    lambda a, X: F.batch_norm(
        X, a["running_mean"], a["running_var"], eps=a.get("eps", 1e-5)
    ),
    # One over the batch mixes samples.
    read=lambda given: None if given.get("training") else given,
    nodes={"NativeBatchNormBackward0": (1, 2)},
)
INSTANCE_NORM = _norm(
    F.instance_norm,
    "input running_mean running_var weight bias use_input_stats momentum eps",
    lambda a, X: F.instance_norm(
        X,
        a.get("running_mean"),
        a.get("running_var"),
        use_input_stats=a.get("use_input_stats", True),
        eps=a.get("eps", 1e-5),
    ),
)

# Sums and products that broadcast ------------------------------------------------


def _read_sum(sign: int) -> Callable[[Arguments], Arguments]:
    def read(given: Arguments) -> Arguments:
        left, right = given["input"], given["other"]
        if isinstance(right, View):
            factor = sign * given.get("alpha", 1)
            return {"input": left, "bias": right, "factor": factor}
        return {"input": right, "bias": left, "factor": 1}

    return read


def _read_product(given: Arguments) -> Arguments:
    left, right = given["input"], given["other"]
    if isinstance(right, View):
        return {"input": left, "weight": right}
    return {"input": right, "weight": left}


def _sum_repeated(B: Tensor, shape: tuple[int, ...]) -> DenseColumns:
    """Sum over the axes along which a parameter has been repeated."""
    lengths = (1,) * (B.ndim - 2 - len(shape)) + shape
    repeated = [axis for axis, length in enumerate(lengths, start=2) if length == 1]
    if repeated:
        B = B.sum(repeated)
    return DenseColumns(B.flatten(2) if B.ndim > 2 else B.unsqueeze(2))


ADD = Kind(
    name="add",
    signatures=[
        Signature(
            functions("add add_ __add__ __radd__"), "input other", _read_sum(sign=1)
        ),
        Signature(
            functions("sub sub_ subtract __sub__"), "input other", _read_sum(sign=-1)
        ),
    ],
    samples="broadcast",
    bias=lambda arguments, B: _sum_repeated(
        arguments["factor"] * B, arguments["bias_shape"]
    ),
)
MUL = Kind(
    name="mul",
    signatures=[
        Signature(
            functions("mul multiply __mul__ __rmul__"), "input other", _read_product
        )
    ],
    samples="broadcast",
    weight=lambda arguments, X, B: _sum_repeated(
        B * X.unsqueeze(1), arguments["weight_shape"]
    ),
)
PRELU = Kind(
    name="prelu",
    signatures=[Signature(functions("prelu"), "input weight")],
    samples="broadcast",
    # Channels are in the second axis, which samples and columns stand before.
    weight=lambda arguments, X, B: _sum_repeated(
        B * X.clamp(max=0.0).unsqueeze(1),
        (arguments["weight_shape"].numel(), *[1] * (B.ndim - 4)),
    ),
    nodes={"PreluKernelBackward0": (1, -1)},
)
# What is repeated for each sample, as a class token
EXPAND = Kind(
    name="expand",
    signatures=[
        Signature(
            functions("expand expand_as broadcast_to"),
            "input",
            lambda given: {"bias": given["input"]},
        )
    ],
    samples="broadcast",
    bias=lambda arguments, B: _sum_repeated(B, arguments["bias_shape"]),
)


for _kind in (
    *(LINEAR, MATVEC, BILINEAR, CONV, CONV_TRANSPOSE, EMBEDDING, EMBEDDING_BAG),
    *(LAYER_NORM, RMS_NORM, GROUP_NORM, BATCH_NORM, INSTANCE_NORM),
    *(ADD, MUL, PRELU, EXPAND),
):
    register(_kind)
