"""Which global variables a loss reads: others may set them after a risk is built."""

from __future__ import annotations

import dis
import functools
import types
from typing import Any

from torch import nn

from vivit_linop.risk.model.copies import codes_of

_NUMBERS = (bool, int, float, complex, str)


def numbers_read(called: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The global variables of functions, and the numbers and texts among them.

    Those that a function reads and does not set, and that functions do which it calls
    by their names; of a module those of its ``forward``.
    """
    while isinstance(called, functools.partial):
        called = called.func
    if isinstance(called, nn.Module):  # compiled by torch.jit, classes have none
        called = getattr(type(called), "forward", None)
    if not isinstance(called, types.FunctionType):
        return []
    named = _read(called).values()
    helpers = [f for f in named if isinstance(f, types.FunctionType)]
    return [
        (function.__globals__, numbers)
        for function in (called, *helpers)
        if (numbers := _numbers_in(_read(function)))
    ]


def _numbers_in(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if type(value) in _NUMBERS}


def _read(function: types.FunctionType) -> dict[str, Any]:
    """The global variables that a function reads and does not set."""
    names: dict[str, set[str]] = {"LOAD_GLOBAL": set(), "STORE_GLOBAL": set()}
    for code in codes_of(function):
        for step in dis.get_instructions(code):
            names.get(step.opname, set()).add(step.argval)
    space = function.__globals__
    read = names["LOAD_GLOBAL"] - names["STORE_GLOBAL"]
    return {name: space[name] for name in read if name in space}
