"""Recording how a net uses its parameters while it runs.

A ``TorchFunctionMode`` sees each call of a torch function. Calls that are of a known
kind of layer (:mod:`vivit_linop.net.kinds`) are recorded with their input and with the
place of their output in the graph. Every other call that is given a parameter, or a
view of it, marks it as opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vivit_linop.net.kinds import Arguments, Kind, readings
from vivit_linop.net.uses import Use
from vivit_linop.net.views import View, Views, tensors
from vivit_linop.risk.model import Params

_HAS_GRAPH = attrgetter("requires_grad")


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
        if not names or not any(map(_HAS_GRAPH, tensors(result))):
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
        if not isinstance(result, Tensor) or result.dtype != self._dtype:
            return None  # else a cotangent is not what it is here
        for signature, kind in readings(func):
            # In the order of their names, also where they came by name.
            names = signature.arguments.split()
            passed = dict.fromkeys(names) | dict(zip(names, args, strict=False))
            given = {}
            for name, value in (passed | kwargs).items():
                if value is not None:
                    given[name] = self._views.frozen(value)
            arguments = signature.read(given)
            if arguments is not None:
                return _use(kind, arguments, result)
        return None


def _use(kind: Kind, arguments: Arguments, result: Tensor) -> Use | None:
    """The use that a call is, if its kind has rules for the parameters in it."""
    if not isinstance(arguments.get("input"), Tensor):
        return None
    for role in ("weight", "bias"):
        if isinstance(parameter := arguments.get(role), (View, Tensor)):
            arguments[f"{role}_shape"] = parameter.shape
    use = Use(kind, arguments, result.shape, get_gradient_edge(result))
    if (use.weight and not kind.has_weight) or (use.bias and not kind.bias):
        return None
    if use.weight is None:
        del arguments["input"]  # needed for the columns of weights only
    return use
