"""Modes of torch that a caller may be in, and that must not change results."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
Result = TypeVar("Result")


class ordinary_mode:
    """Run outside of the caller's inference mode and autocast.

    What is kept must be ordinary tensors, and everything is computed in the precision
    of the operators. For ``with``, and as a decorator of functions.
    """

    def __call__(self, function: Callable[P, Result]) -> Callable[P, Result]:
        """Decorate a function; one context for each call, since they may be nested."""

        @functools.wraps(function)
        def decorated(*args: P.args, **kwargs: P.kwargs) -> Result:
            with ordinary_mode():
                return function(*args, **kwargs)

        return decorated

    def __enter__(self) -> None:
        """Leave the modes."""
        # Written out, since it is entered in each product of small operators.
        autocasts: list[contextlib.AbstractContextManager[object]] = [
            torch.autocast(device, enabled=False)
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ]
        self._modes = [torch.inference_mode(False), *autocasts]
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *exception: object) -> None:
        """Enter them again."""
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
