"""What a loss reads beside its arguments: others may set it after a risk is built."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from vivit_linop.risk.model.copies import codes_of, is_empty

Space = dict[str, Any]
Path = tuple[Any, ...]
# A mapping, where in it by names, and the number or numbers that were there.
Known = tuple[Space, Path, Any]

_NUMBERS = (bool, int, float, complex, str)
_NOT_OPENED = (types.ModuleType, type, types.FunctionType, nn.Module, Tensor)
# What has more entries is a table, of which nobody makes a copy for each call.
_FEW = 1000


class NumbersRead:
    """Numbers and texts that a function reads by names of others.

    Global variables that it reads and does not set, those that functions do which it
    calls by their names, what is around it, attributes of a module. Of containers and
    objects there it has the numbers that these hold: those that are named in the code,
    or all where none is. Also of mappings and objects in them whose names are in the
    code, and of lists in lists.

    Args:
        called: What is called.
    """

    def __init__(self, called: Any) -> None:
        spaces, functions = _spaces(called)
        named = {
            text
            for function in functions
            for code in codes_of(function)
            for text in (*code.co_names, *code.co_consts)
            if isinstance(text, str)
        }
        self._known = list[Known]()
        todo = list[tuple[Space, Path]]()
        todo += [(space, (name,)) for space, names in spaces for name in names]
        opened = set[int]()
        for space, path in todo:
            value = _at(space, path)
            numbers = _numbers_of(value)
            if isinstance(numbers, dict):
                own = {key: numbers[key] for key in numbers if key in named}
                numbers = own or numbers
            if numbers is not None:
                self._known.append((space, path, numbers))
            if id(value) not in opened:
                opened.add(id(value))
                known = numbers if isinstance(numbers, dict) else ()
                for key, part in _held_by(value).items():
                    if key not in known and (key in named or _is_row(value, part)):
                        todo.append((space, (*path, key)))

    def settle(self) -> None:
        """Leave out what the function itself has changed in a call: what it logs."""
        changed = {id(known) for known, _ in self._changed()}
        self._known = [known for known in self._known if id(known) not in changed]

    def change(self) -> str | None:
        """Say what has another value, if anything has."""
        for (_, path, then), (key, now) in self._changed():
            name = repr(path[0]) + "".join(f"[{part!r}]" for part in path[1:])
            if isinstance(then, dict):
                name, then = f"{name}, whose {key!r}", then[key]
            else:
                name = f"{name}, which"
            return f"{name} was {then!r} when the risk was built and is {now!r}"
        return None

    def _changed(self) -> Iterator[tuple[Known, tuple[Any, Any]]]:
        """Yield what has, with the value that it has and where in a container."""
        for known in self._known:
            space, path, then = known
            now = _numbers_of(_at(space, path))
            if not isinstance(then, dict):
                now, then = {None: now}, {None: then}
            held = now if isinstance(now, dict) else {}
            # What is new there was not read.
            for key, value in then.items():
                if held.get(key) is not value and held.get(key) != value:
                    yield known, (key, held.get(key))
                    break


def _spaces(
    called: Any,
) -> tuple[list[tuple[dict[str, Any], list[str]]], list[types.FunctionType]]:
    """Where a function reads names of others, and these; and what it calls, with it."""
    while isinstance(called, functools.partial):
        called = called.func
    spaces = list[tuple[dict[str, Any], list[str]]]()
    if isinstance(called, nn.Module):  # compiled by torch.jit, classes have no forward
        spaces.append((vars(called), [*vars(called)]))
        called = getattr(type(called), "forward", None)
    if not isinstance(called, types.FunctionType):
        return spaces, []
    cells = zip(called.__code__.co_freevars, called.__closure__ or (), strict=True)
    around = {name: c.cell_contents for name, c in cells if not is_empty(c)}
    spaces.append((around, [*around]))
    named = [called.__globals__.get(name) for name in _read(called)]
    functions = [
        function
        for function in (called, *named, *around.values())
        if isinstance(function, types.FunctionType)
    ]
    spaces += [(function.__globals__, [*_read(function)]) for function in functions]
    return spaces, functions


def _read(function: types.FunctionType) -> set[str]:
    """The names of global variables that a function reads and does not set."""
    names: dict[str, set[str]] = {"LOAD_GLOBAL": set(), "STORE_GLOBAL": set()}
    for code in codes_of(function):
        for step in dis.get_instructions(code):
            names.get(step.opname, set()).add(step.argval)
    return names["LOAD_GLOBAL"] - names["STORE_GLOBAL"]


def _numbers_of(value: Any) -> Any:
    """A number or a text, or those that a container or an object holds, by name."""
    if type(value) in _NUMBERS:
        return value
    held = _held_by(value)
    return {key: part for key, part in held.items() if type(part) in _NUMBERS} or None


def _held_by(value: Any) -> dict[Any, Any]:
    """What a container or an object holds by name; nothing of what is not opened."""
    if isinstance(value, _NOT_OPENED):
        return {}
    held = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
    held = held if isinstance(held, dict) else getattr(value, "__dict__", None)
    return held if isinstance(held, dict) and len(held) <= _FEW else {}


def _is_row(value: Any, part: Any) -> bool:
    """Whether something is a list in a list: rows have no names in a code."""
    return isinstance(value, (list, tuple)) and isinstance(part, (list, tuple))


def _at(space: Space, path: Path) -> Any:
    """What stands somewhere in a mapping, None if nothing does."""
    value: Any = space.get(path[0])
    for key in path[1:]:
        value = _held_by(value).get(key)
    return value
