"""A model that casts by itself, run in one precision throughout.

Norms of language models take squares in float32, and attention its softmax, whatever
the precision of the rest is. In a run in float64 that would leave rounding of float32
in all that comes after, which differences with small steps show as large errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivit_linop.checkpoints import Repeated
from vivit_linop.modes import to_leave

_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_TO_OTHER = {Tensor.to, Tensor.type_as}


class Widened(Repeated):
    """Lets casts to a lower precision be casts to this one, and ``dtype=`` likewise.

    Autocast that a model enters by itself does nothing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        below = [torch.float16, torch.bfloat16]
        if dtype is torch.float64:
            below.append(torch.float32)
        self._instead = dict.fromkeys(below, dtype)
        for lower in below:
            if lower is not torch.bfloat16:  # torch has no pairs of these
                self._instead[lower.to_complex()] = dtype.to_complex()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function with other dtypes, outside of autocast."""
        kwargs = {name: self._widened(value) for name, value in (kwargs or {}).items()}
        if func in _CASTS:
            func, args = Tensor.to, (args[0], self._dtype, *args[1:])
        elif func in _TO_OTHER and len(args) > 1 and isinstance(args[1], Tensor):
            x, other, *rest = args
            dtype = self._instead.get(other.dtype, other.dtype)
            func, args = Tensor.to, (x, other.device, dtype, *rest)
        args = tuple(map(self._widened, args))
        with contextlib.ExitStack() as off:
            for mode in to_leave(inference=False):
                off.enter_context(mode)
            return func(*args, **kwargs)

    def _widened(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self._instead.get(value, value)
        return value
