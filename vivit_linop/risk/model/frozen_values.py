"""What a net makes of its parameters that is constant to its derivatives.

Differences of outputs or gradients at other parameters see it change, and derivatives
do not: to compare the two, it is recorded once and put in its places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What gives constants: a method, and the getter of ``Tensor.data``.
DETACHES = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


def switches_gradients(func: Any) -> bool:
    """Whether a function that a net calls switches gradients on or off."""
    return getattr(func, "__name__", "") == "_set_grad_enabled"


class FrozenValues:
    """What a net makes of its parameters through which no derivative flows.

    What it detaches, and what it computes with gradients off. To torch these values are
    constants. They are recorded in one evaluation, and put in their places in others.
    Not among them is what an ``autograd.Function`` does in its forward pass: its
    backward pass answers for that.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def recording(self) -> TorchFunctionMode:
        """What records an evaluation of the net, for ``with``."""
        self.values = []
        return _Frozen(self.values, None)

    def replaying(self) -> AbstractContextManager[Any]:
        """What lets an evaluation of the net meet the recorded values."""
        values = self.values
        return _Frozen(values, iter(values)) if values else nullcontext()


class _Frozen(TorchFunctionMode):
    def __init__(self, values: list[Tensor], replay: Iterator[Tensor] | None) -> None:
        super().__init__()
        self._values, self._replay, self._off = values, replay, False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if switches_gradients(func):
            self._off = not args[0]
            return result
        # In the forward pass of a Function gradients are off without the user's word.
        off = self._off or torch.is_inference_mode_enabled()
        frozen = off or (func in DETACHES and torch.is_grad_enabled())
        is_new = isinstance(result, Tensor) and all(result is not a for a in args)
        if not (frozen and is_new and result.is_floating_point()):
            return result
        if self._replay is None:
            self._values.append(result.clone())
            return result
        value = next(self._replay, None)
        # Another number of calls, or others: whatever then comes out will not agree.
        return result if value is None or value.shape != result.shape else value.clone()
