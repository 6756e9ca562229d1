"""Recording how a net uses its parameters while it runs.

A ``TorchFunctionMode`` sees each call of a torch function. Calls whose dependence on a
parameter has a known structure (``linear``, convolutions, normalisations, embeddings)
are recorded with their input and with the place of their output in the graph. Every
other call that is given a parameter marks it as opaque.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vivit_linop.risk.model import Params


@dataclass
class Use:
    """One call of a torch function with parameters of the net.

    Attributes:
        kind: What the function does with them, as in ``_SIGNATURES``.
        arguments: The call's arguments by name, tensors detached, parameters as names.
        output_shape: The shape of the result.
        edge: The place of the result in the graph, before anything is done to it.
    """

    kind: str
    arguments: dict[str, Any]
    output_shape: torch.Size
    edge: GradientEdge

    @property
    def names(self) -> list[str]:
        """The parameters that it uses."""
        return [
            self.arguments[role].name
            for role in ("weight", "bias")
            if isinstance(self.arguments.get(role), Named)
        ]


@dataclass(frozen=True)
class Named:
    """A parameter as an argument.

    Attributes:
        name: Its name.
    """

    name: str


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
    F.embedding: ("embedding", "input weight padding_idx max_norm"),
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
        self._names = {id(p): name for name, p in self.params.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, and record it if it is given parameters."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        names = set(self._find((args, kwargs)))
        # What gives no tensor (shape, dtype, dim), or a constant, is no use.
        if not names or not any(t.requires_grad for t in _tensors(result)):
            return result
        use = self._structured(func, args, kwargs, result)
        if use is None or set(use.names) != names:
            self.opaque |= names
        else:
            self.uses.append(use)
        return result

    def _structured(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Use | None:
        if func not in _SIGNATURES or not isinstance(result, Tensor):
            return None
        kind, parameters = _SIGNATURES[func]
        given = {**dict(zip(parameters.split(), args, strict=False)), **kwargs}
        data = given.get("input")
        if not isinstance(data, Tensor) or id(data) in self._names:
            return None
        # A norm over the batch, or an embedding that renormalises, mixes samples.
        if given.get("training") or given.get("max_norm") is not None:
            return None
        arguments = {key: self._freeze(value) for key, value in given.items()}
        if isinstance(given.get("weight"), Tensor):
            arguments["weight_shape"] = given["weight"].shape
        return Use(kind, arguments, result.shape, get_gradient_edge(result))

    def _freeze(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            return value.detach() if name is None else Named(name)
        return value

    def _find(self, tree: Any) -> Iterable[str]:
        for tensor in _tensors(tree):
            if id(tensor) in self._names:
                yield self._names[id(tensor)]


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _tensors(value)
