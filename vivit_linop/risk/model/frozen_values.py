"""What a net makes of its parameters that is constant to its derivatives.

Differences of outputs or gradients at other parameters see it change, and derivatives
do not: to compare the two, it is recorded once and put in its places.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit_linop.checkpoints import Again, Repeated

# What gives constants: a method, and the getter of ``Tensor.data``.
DETACHES = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


def switches_gradients(func: Any) -> bool:
    """Whether a function that a net calls switches gradients on or off."""
    return getattr(func, "__name__", "") == "_set_grad_enabled"


class FrozenValues:
    """What a net makes of its parameters through which no derivative flows.

    What it detaches, what it computes with gradients off, and rows of embeddings for
    padding. To torch these values are constants. They are recorded in one evaluation,
    and put in their places in others.
    Not among them is what an ``autograd.Function`` does in its forward pass: its
    backward pass answers for that.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def recording(self) -> AbstractContextManager[Any]:
        """What records an evaluation of the net, for ``with``."""
        self.values = []
        return _Frozen(self.values)

    def replaying(self) -> AbstractContextManager[Any]:
        """What lets an evaluation of the net meet the recorded values."""
        values = self.values
        return _Frozen(values, 0) if values else nullcontext()


class _Frozen(Repeated):
    """Records values, or replays them from one of them on."""

    def __init__(self, values: list[Tensor], start: int | None = None) -> None:
        super().__init__()
        self._values, self._next, self._off = values, start, False

    def again(self) -> Again:
        """Return what meets the values that come next."""
        if self._next is None:
            return nullcontext
        return partial(_Frozen, self._values, self._next)

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
        padding = None
        if func is F.embedding and not frozen:
            padding = _padding(*args, **(kwargs or {}))
            frozen = padding is not None
        is_new = isinstance(result, Tensor) and all(result is not a for a in args)
        if not (frozen and is_new and result.is_floating_point()):
            return result
        if self._next is None:
            self._values.append(result.detach().clone())
            return result
        known = self._values[self._next : self._next + 1]
        self._next += 1
        # Another number of calls, or others: whatever then comes out will not agree.
        if not known or known[0].shape != result.shape:
            return result
        (value,) = known
        return value.clone() if padding is None else torch.where(padding, value, result)


def _padding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> Tensor | None:
    """Where an embedding, called so, has rows for padding, ``[..., 1]``."""
    if padding_idx is None:
        return None
    return (input == padding_idx % len(weight)).unsqueeze(-1)
