"""Recording how a net uses its parameters while it runs.

A ``TorchFunctionMode`` sees each call of a torch function. Calls whose dependence on a
parameter has a known structure (``linear``, convolutions, normalisations, embeddings,
matrix products, sums and products that broadcast) are recorded with their input and
with the place of their output in the graph. Every other call that is given a parameter,
or a view of it, marks it as opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vivit_linop.net.views import View, Views, functions, tensors
from vivit_linop.risk.model import Params

Arguments = dict[str, Any]


@dataclass
class Use:
    """One call of a torch function with parameters of the net.

    Attributes:
        kind: What the function does with them, as in ``_SIGNATURES``; after
            ``_REWRITES``.
        arguments: The call's arguments by name, tensors detached, parameters as views.
        output_shape: The shape of the result.
        edge: The place of the result in the graph, before anything is done to it.
    """

    kind: str
    arguments: Arguments
    output_shape: torch.Size
    edge: GradientEdge

    @property
    def views(self) -> list[View]:
        """The parameters that it uses, or what parts of them."""
        roles = (self.arguments.get(role) for role in ("weight", "bias"))
        return [view for view in roles if isinstance(view, View)]

    @property
    def names(self) -> list[str]:
        """The names of the parameters that it uses."""
        return [view.name for view in self.views]


_CONV = "conv", "input weight bias stride padding dilation groups"
_CONV_TRANSPOSE = (
    "conv_transpose",
    "input weight bias stride padding output_padding groups dilation",
)
# What a function does with its parameters, and the names of its arguments in order.
_SIGNATURES: dict[Callable[..., Any], tuple[str, str]] = {
    F.linear: ("linear", "input weight bias"),
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    F.conv_transpose1d: _CONV_TRANSPOSE,
    F.conv_transpose2d: _CONV_TRANSPOSE,
    F.conv_transpose3d: _CONV_TRANSPOSE,
    F.embedding: (
        "embedding",
        "input weight padding_idx max_norm norm_type scale_grad_by_freq",
    ),
    F.layer_norm: ("layer_norm", "input normalized_shape weight bias eps"),
    F.rms_norm: ("rms_norm", "input normalized_shape weight eps"),
    F.group_norm: ("group_norm", "input num_groups weight bias eps"),
    F.batch_norm: (
        "batch_norm",
        "input running_mean running_var weight bias training momentum eps",
    ),
    F.instance_norm: (
        "instance_norm",
        "input running_mean running_var weight bias use_input_stats momentum eps",
    ),
    **dict.fromkeys(functions("matmul __matmul__"), ("matmul", "input other")),
    **dict.fromkeys(functions("mm"), ("matmul", "input mat2")),
    **dict.fromkeys(functions("mv"), ("matmul", "input vec")),
    **dict.fromkeys(functions("addmm"), ("addmm", "input mat1 mat2 beta alpha")),
    **dict.fromkeys(functions("add add_ __add__ __radd__"), ("add", "input other")),
    **dict.fromkeys(functions("sub sub_ subtract __sub__"), ("sub", "input other")),
    **dict.fromkeys(functions("mul multiply __mul__ __rmul__"), ("mul", "input other")),
}


def _matmul(given: Arguments) -> tuple[str, Arguments] | None:
    """``x @ W`` is linear with Wᵀ, and ``x @ w`` with the matrix of one row wᵀ."""
    data, weight, *options = given.values()
    if options or not isinstance(weight, View) or len(weight.shape) > 2:
        return None
    if len(weight.shape) == 1:
        return "matvec", {"input": data, "weight": weight.as_row}
    return "linear", {"input": data, "weight": weight.mT}


def _addmm(given: Arguments) -> tuple[str, Arguments] | None:
    """``b + x @ W``, with one b for all rows."""
    bias, data, weight, *factors = given.values()
    if bias is None or weight is None or factors:
        return None
    outputs = weight.shape[1:]
    if bias.shape not in (outputs, (1, *outputs)):
        return None
    return "linear", {"input": data, "weight": weight.mT, "bias": bias}


def _add(sign: int) -> Callable[[Arguments], tuple[str, Arguments]]:
    def rewrite(given: Arguments) -> tuple[str, Arguments]:
        left, right = given["input"], given["other"]
        if isinstance(right, View):
            factor = sign * given.get("alpha", 1)
            return "add", {"input": left, "bias": right, "factor": factor}
        return "add", {"input": right, "bias": left, "factor": 1}

    return rewrite


def _mul(given: Arguments) -> tuple[str, Arguments]:
    left, right = given["input"], given["other"]
    if isinstance(right, View):
        return "mul", {"input": left, "weight": right}
    return "mul", {"input": right, "weight": left}


# Calls that are recorded as another kind, if at all.
_REWRITES: dict[str, Callable[[Arguments], tuple[str, Arguments] | None]] = {
    "matmul": _matmul,
    "addmm": _addmm,
    "add": _add(1),
    "sub": _add(-1),
    "mul": _mul,
}


@dataclass
class Recorder(TorchFunctionMode):
    """Records the uses of some parameters while it is active.

    Args:
        params: The parameters, by name.

    Attributes:
        uses: The recorded calls, in order.
        opaque: Names of parameters with a use that has no known structure.
    """

    params: Params
    uses: list[Use] = field(default_factory=list)
    opaque: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        # A parameter without entries has no columns, however it is used.
        self._views = Views({name: p for name, p in self.params.items() if p.numel()})
        self._dtype = next(iter(self.params.values())).dtype
        self._in_attention = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Arguments | None = None,
    ) -> Any:
        """Call the function, and record it if it is given parameters."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and not self._in_attention:
            return self._attention(func, args, kwargs)
        result = func(*args, **kwargs)
        names = self._views.names((args, kwargs))
        # What gives no tensor (shape, dtype, dim), or a constant, is no use.
        if not names or not any(t.requires_grad for t in tensors(result)):
            return result
        if self._views.follow(func, args, kwargs, result):
            return result
        use = self._structured(func, args, kwargs, result)
        if use is None or set(use.names) != names:
            self.opaque |= names
        else:
            self.uses.append(use)
        return result

    def _attention(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments
    ) -> Any:
        """Run attention so that the linear layers inside are seen.

        It asks whether a mode is active, and if so hands itself over as one call. A
        copy of it that does not ask is run under this mode. Should a version of torch
        ask in another way, the call comes back and is recorded as one.
        """
        if isinstance(func, FunctionType):
            unasked = {**func.__globals__, "has_torch_function": lambda _: False}
            func = FunctionType(
                func.__code__,
                unasked,
                argdefs=func.__defaults__,
                closure=func.__closure__,
            )
        self._in_attention = True
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            self._in_attention = False

    def _structured(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Arguments,
        result: Any,
    ) -> Use | None:
        if func not in _SIGNATURES or not isinstance(result, Tensor):
            return None
        kind, parameters = _SIGNATURES[func]
        names = parameters.split()
        # In the order of the names, also where they were given by name.
        given = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | kwargs
        given = {key: value for key, value in given.items() if value is not None}
        arguments = {key: self._freeze(value) for key, value in given.items()}
        if kind in _REWRITES:
            rewritten = _REWRITES[kind](arguments)
            if rewritten is None:
                return None
            kind, arguments = rewritten
        if arguments.get("scale_grad_by_freq"):
            raise ValueError(
                "model: calls F.embedding with scale_grad_by_freq=True, whose backward "
                "pass gives no derivatives; leave that out, the outputs are the same."
            )
        if not isinstance(arguments.get("input"), Tensor):
            return None
        # A norm over the batch, or an embedding that renormalises, mixes samples. In
        # other precisions or complex numbers a cotangent is not what it is here.
        if arguments.get("training") or arguments.get("max_norm") is not None:
            return None
        if result.dtype != self._dtype:
            return None
        weight = arguments.get("weight")
        if weight is not None and kind != "mul":
            arguments["weight_shape"] = weight.shape
        if not isinstance(weight, View):
            del arguments["input"]  # needed for the columns of weights only
        return Use(kind, arguments, result.shape, get_gradient_edge(result))

    def _freeze(self, value: Any) -> Any:
        """Detach data; parameters become views, or None if they have no such form."""
        if not isinstance(value, Tensor):
            return value
        return self._views[value] if value in self._views else value.detach()
