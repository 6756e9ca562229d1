"""Modes of torch that a caller may be in, and that must not change results."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
Result = TypeVar("Result")


def uncompiled(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a function that a caller's ``torch.compile`` is to leave as it is.

    The graph breaks there: the function, and all that it calls, runs uncompiled. It
    costs a call where nothing is compiled, and the compiler, which takes seconds to
    import, is imported only where the caller has done so.
    """

    @functools.wraps(function)
    def decorated(*args: P.args, **kwargs: P.kwargs) -> Result:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    # The compiler counts by code object how often it has compiled a function.
    code = decorated.__code__  # type: ignore[attr-defined]
    decorated.__code__ = code.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return decorated


class ordinary_mode:
    """Run outside of the caller's inference mode, autocast and compilation.

    What is kept must be ordinary tensors, and everything is computed in the precision
    of the operators. For ``with``, and as a decorator of functions.
    """

    def __call__(self, function: Callable[P, Result]) -> Callable[P, Result]:
        """Decorate a function; one context for each call, since they may be nested."""

        @functools.wraps(function)
        def decorated(*args: P.args, **kwargs: P.kwargs) -> Result:
            with ordinary_mode():
                return function(*args, **kwargs)

        return uncompiled(decorated)

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
