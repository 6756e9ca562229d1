"""Which tensors are used while something runs: those that a copy has not replaced."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vivit_linop.graphs import TOUCHES_GRAPH


class Watch(TorchFunctionMode):
    """Sees which tensors are used while it is active: what others are made of.

    Args:
        among: The tensors of interest, by identity; None for all that were not made
            meanwhile.

    Attributes:
        used: Those that were used, by identity.
    """

    def __init__(self, among: Mapping[int, Any] | None = None) -> None:
        super().__init__()
        self._among = among
        self.used: dict[int, Tensor] = {}
        # Weak, since what is made need not live on; another may have its number then.
        self._made: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._called(func, args, kwargs)
        made = tensors_in(result)
        # What gives none (shape, dtype, device) is no use.
        if made:
            for tensor in tensors_in((args, kwargs)):
                if self._is_wanted(tensor):
                    self.used[id(tensor)] = tensor
        if self._among is None:
            self._were_made(made)
        return result

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _were_made(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in self.used:
                self._made[id(tensor)] = weakref.ref(tensor)

    def _is_wanted(self, tensor: Tensor) -> bool:
        if self._among is None:
            made = self._made.get(id(tensor))
            return made is None or made() is not tensor
        return id(tensor) in self._among


class Replaced(Watch):
    """Sees tensors, by identity, and lets functions have others in their place."""

    def __init__(self, instead: Mapping[int, Tensor]) -> None:
        super().__init__(instead)
        self._instead = instead

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*self._replaced(args), **self._replaced(kwargs))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._instead.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(map(self._replaced, value))
        if type(value) is dict:
            return {name: self._replaced(item) for name, item in value.items()}
        return value


class WithoutKeptGradients(TorchFunctionMode):
    """Lets no tensor keep its gradient, and no parameter have hooks that change its.

    Those of several vectors at once are none, and derivatives are of the function.
    Other hooks see gradients of one vector at a time.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__()
        self._params = {*map(id, params)}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if is_of_optimiser(func, args, self._params):
            return left_out(func)
        if func in TOUCHES_GRAPH:
            takes_one_vector(args[0])
        return func(*args, **(kwargs or {}))


def takes_one_vector(tensor: Tensor) -> None:
    """Let backward passes of several vectors through a tensor fail; there are slower.

    What hooks that follow kept of these (sums, running means) would raise torch's
    errors ever after.
    """
    if tensor.requires_grad and not tensor.is_leaf:
        tensor.register_hook(_refuse_several)


def _refuse_several(gradient: Tensor) -> None:
    gradient.data_ptr()  # which several vectors at once do not have: torch's error


def is_of_optimiser(func: Any, args: Any, params: Container[int]) -> bool:
    """Whether a call is about gradients as ``.backward()`` leaves them."""
    return func is Tensor.retain_grad or (
        func in _HOOKS and bool(args) and id(args[0]) in params
    )


_HOOKS = Tensor.register_hook, Tensor.register_post_accumulate_grad_hook


def left_out(func: Any) -> RemovableHandle | None:
    """What such a call returns if nothing is done."""
    return RemovableHandle(OrderedDict()) if func in _HOOKS else None


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in arguments or results of torch functions, in order."""
    found, rest = [], [value]
    while rest:
        item = rest.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            rest.extend(reversed(item))
        elif isinstance(item, dict):
            rest.extend(reversed(item.values()))
    return found
