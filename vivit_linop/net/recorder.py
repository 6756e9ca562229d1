"""Recording how a net uses its parameters while it runs.

A ``TorchFunctionMode`` sees each call of a torch function. Calls that are of a known
kind of layer (:mod:`vivit_linop.net.kinds`) are recorded with their input and with the
place of their output in the graph. Every other call that is given a parameter, or a
view of it, marks it as opaque.

A net often hands on a view of a parameter: ``x @ w.T``, the three parts of an attention
layer's input weight, an embedding of the first positions. Where such a view is used as
a layer uses its weight, it is a use of the parameter like any other. Which entries a
view has is seen from a twin of the parameter without data: what is done to the one is
done to the other, and the twin's offset and strides tell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vivit_linop.graphs import TOUCHES_GRAPH
from vivit_linop.net.kinds import Arguments, Kind, View, functions, readings
from vivit_linop.net.recurrent import CELLS, LAYERS, unrolled
from vivit_linop.net.structure import Use
from vivit_linop.risk.checks import same_outputs
from vivit_linop.risk.kept import watched_by
from vivit_linop.risk.model.original import Params
from vivit_linop.risk.model.tensors_used import (
    is_of_optimiser,
    left_out,
    takes_one_vector,
    tensors_in,
)

_HAS_GRAPH = attrgetter("requires_grad")
# Functions that give views of their first argument, or copies where that cannot be.
_VIEWS = {
    *functions("transpose swapaxes swapdims t permute movedim moveaxis"),
    *functions("unsqueeze squeeze view unflatten"),
    *functions("narrow select chunk split tensor_split unbind __getitem__"),
    *functions("reshape flatten ravel contiguous"),
    *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")),
}


class Recorder(TorchFunctionMode):
    """Records the uses of some parameters while it is active.

    Args:
        params: The parameters.
        unfolds: Whether recurrent layers run step by step, where their columns are
            asked for; torch's own are several times as fast.

    Attributes:
        uses: The recorded calls, in order.
        opaque: Names of parameters with a use that has no known structure.
        has_hooks: Whether the net may have put hooks into the graph.
        keeps_gradients: Whether the net asks for gradients of what it computes, or
            puts hooks on parameters, which is left out here.
        has_folded: Whether recurrent layers were met, and ran as they are.
    """

    def __init__(self, params: Params, unfolds: bool = True) -> None:
        super().__init__()
        self._unfolds, self.has_folded = unfolds, False
        self.uses, self.opaque = list[Use](), set[str]()
        self.has_hooks = self.keeps_gradients = False
        # A parameter without entries has no columns, however it is used.
        self._views = Views({name: p for name, p in params.items() if p.numel()})
        self._params = {*map(id, params.values())}
        self._dtype = next(iter(params.values())).dtype
        self._in_attention = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and record it if it is given parameters."""
        kwargs = kwargs or {}
        if is_of_optimiser(func, args, self._params):
            self.keeps_gradients = True
            return left_out(func)
        if func is F.multi_head_attention_forward and not self._in_attention:
            return self._attention(func, args, kwargs)
        if func in TOUCHES_GRAPH:
            self.has_hooks = True
            takes_one_vector(args[0])
        result = func(*args, **kwargs)
        names = self._views.names((args, kwargs))
        if func in LAYERS or func in CELLS:
            if names and not kwargs:
                if self._unfolds:
                    return self._recurrent(func, args, result, names)
                self.has_folded = True
        # What gives no tensor (shape, dtype, dim), or a constant, is no use.
        if not names or not any(map(_HAS_GRAPH, tensors_in(result))):
            return result
        if self._views.follow(func, args, kwargs, result):
            return result
        use = self._structured(func, args, kwargs, result)
        if use is None or set(use.names) != names:
            self.opaque |= names
            return result
        if _may_move(result, (args, kwargs)):
            result = result.clone()
            use.edge = get_gradient_edge(result)
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

    def _recurrent(
        self, func: Callable[..., Any], args: tuple[Any, ...], result: Any, names: Any
    ) -> Any:
        """Run recurrent layers so that the linear layers inside are seen."""
        known = len(self.uses)
        own = unrolled(
            func, args, lambda *of: self.__torch_function__(F.linear, (), of)
        )
        if own is not None:
            self.opaque |= self._views.names(args[1])  # states that are learnt
            given = [result] if isinstance(result, Tensor) else result
            if all(map(same_outputs, own, given)):
                return own[0] if isinstance(result, Tensor) else own
        del self.uses[known:]
        self.opaque |= names
        return result

    def _structured(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Arguments,
        result: Any,
    ) -> Use | None:
        if not isinstance(result, Tensor) or result.dtype != self._dtype:
            return None  # else a cotangent is not what it is here
        if any(tensor.is_nested for tensor in tensors_in((args, kwargs, result))):
            return None  # samples have no axis, and several shapes
        for signature, kind in readings(func):
            # In the order of their names, also where they came by name.
            names = signature.names
            passed = dict.fromkeys(names) | dict(zip(names, args, strict=False))
            given = {}
            for name, value in (passed | kwargs).items():
                if value is not None:
                    given[name] = self._views.frozen(value)
            arguments = signature.read(given) if signature.read else given
            if arguments is not None:
                return _use(kind, arguments, result)
        return None


watched_by(partial(Recorder, unfolds=False))


def _may_move(result: Tensor, given: Any) -> bool:
    """Whether a result moves in the graph where it is written to.

    A layer may give a view of what it has computed (``F.linear`` of one transposed
    sample). Where a view is written to, signals pass by the place that was recorded.
    Views of what the net has itself are left to it.
    """
    base = result._base
    return base is not None and not any(
        base is tensor or base is tensor._base for tensor in tensors_in(given)
    )


def _use(kind: Kind, arguments: Arguments, result: Tensor) -> Use | None:
    """The use that a call is, if its kind has rules for the parameters in it."""
    if not isinstance(arguments.get("input", result), Tensor):
        return None
    for role in ("weight", "bias"):
        if isinstance(parameter := arguments.get(role), (View, Tensor)):
            arguments[f"{role}_shape"] = parameter.shape
    use = Use(kind, arguments, result.shape, get_gradient_edge(result))
    if (use.weight and not kind.has_weight) or (use.bias and not kind.bias):
        return None
    if use.weight is None:
        arguments.pop("input", None)  # needed for the columns of weights only
    return use


class Views:
    """The parameters that a net is given, and the views that it makes of them."""

    def __init__(self, params: Params) -> None:
        # Tensors are known by identity, so they must live as long as this does. Twins
        # of parameters are made when there is a view of one.
        self._known: dict[int, tuple[Tensor, str, Tensor | None]] = {
            id(p): (p, name, None) for name, p in params.items()
        }

    def names(self, tree: Any) -> set[str]:
        """Return the parameters of which there are views in a tree of arguments."""
        found = set()
        for tensor in tensors_in(tree):
            if id(tensor) in self._known:
                found.add(self._known[id(tensor)][1])
        return found

    def frozen(self, value: Any) -> Any:
        """Return an argument detached; a known tensor as what it is a view of.

        Known tensors that have entries from all over are None.
        """
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            return value.detach()
        _, name, twin = self._known[id(value)]
        if twin is None:
            return View(name, (0, value.numel()), value.shape)
        start = int(twin.storage_offset())
        place = start, start + twin.numel()
        if twin.is_contiguous():
            return View(name, place, twin.shape)
        if twin.ndim == 2 and twin.mT.is_contiguous():
            return View(name, place, twin.shape, transposed=True)
        return None

    def follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> bool:
        """Learn the views that a call has made; returns whether it has done only so."""
        if func not in _VIEWS or not args or id(args[0]) not in self._known:
            return False
        if tensors_in((args[1:], kwargs)):
            return False
        viewed, name, twin = self._known[id(args[0])]
        if twin is None:
            twin = torch.empty(viewed.shape, dtype=viewed.dtype, device="meta")
        try:
            twins = func(twin, *args[1:], **kwargs)
        # A view because of the strides that the parameter has, or entries by their
        # values, which a twin has not.
        except RuntimeError:
            return False
        base = twin if twin._base is None else twin._base
        for view, its_twin in zip(tensors_in(result), tensors_in(twins), strict=True):
            if its_twin is not twin and its_twin._base is not base:
                return False  # a copy
            if (view.shape, view.dtype) != (its_twin.shape, its_twin.dtype):
                return False
            self._known[id(view)] = view, name, its_twin
        return True
