"""Private copies of what the user's code computes with.

A risk must neither change the user's modules nor change with them, and it has other
tensors in their place: its parameters, tangents, columns. So it runs on copies. A copy
is shallow, of each module once, however many ways lead to it; tensors are replaced
wherever they are kept, by identity: in slots, in the flat weights of an RNN, in plain
lists. What leads to modules is rebuilt to lead to their copies: containers, bound
methods, ``functools.partial`` and closures. All else (locks, loggers, arrays but for
those of a loss) is shared with the original and never copied.

Not followed are objects of other classes and global variables of methods. Whoever runs
a copy sees whether tensors of the original are used
(:mod:`vivit_linop.risk.model.tensors_used`).
"""

from __future__ import annotations

import collections
import copy
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import singledispatch
from operator import attrgetter
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from vivit_linop.risk.data.containers import slots_of
from vivit_linop.risk.model.sharded import without_sharding

# Nothing in these is ever replaced.
ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.Size}
)
# Where torch keeps the hooks of a module: dictionaries, which are false if empty.
FORWARD_HOOKS = attrgetter("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = attrgetter("_backward_hooks", "_backward_pre_hooks")
# Where it keeps those on all modules of the process.
_ON_ALL = [f"_global_{h}" for h in ("forward_hooks", "forward_pre_hooks")]
_ON_ALL_GRADIENTS = [f"_global_{h}" for h in ("backward_hooks", "backward_pre_hooks")]
# What every module has, of its own: its slots, and dictionaries of hooks.
_SLOTS = frozenset({"_parameters", "_buffers", "_modules"})
OWN = frozenset(k for k, v in vars(nn.Module()).items() if isinstance(v, (dict, set)))
CACHED = type(functools.cache(len))
FUNCTIONS = (
    CACHED,
    types.FunctionType,
    types.MethodType,
    types.BuiltinMethodType,
    functools.partial,
    torch.jit.ScriptFunction,
)
# What one draws from, beside the global generators.
Generators = torch.Generator | np.random.Generator | np.random.RandomState | Random
# Of the global variables of each function.
_OF_MODULES = "__builtins__", "__name__", "__package__"
# What belongs to a loss.
_STAY = (Tensor, np.ndarray)
_MISSING = object()


def has_hooks_on_all(gradients_only: bool = False) -> bool:
    """Whether there are hooks on all modules of the process.

    Args:
        gradients_only: Whether those on forward passes do not count.
    """
    names = _ON_ALL_GRADIENTS + ([] if gradients_only else _ON_ALL)
    return any(getattr(nn.modules.module, name) for name in names)


class Copies:
    """Copies objects that belong together, each of them once.

    Args:
        replaced: Pairs of a tensor and what stands for it in copies.
        other: What becomes of other tensors.
        frozen: Whether a function is rebuilt also if it leads to tensors only, or if
            it is no function of a module of Python, to which it has a name: with the
            numbers and arrays that variables around it have now.

    Attributes:
        modules: The modules that were copied, each with its copy.
    """

    def __init__(
        self,
        replaced: Iterable[tuple[Tensor, Tensor]],
        other: Callable[[Tensor], Tensor] | None = None,
        frozen: bool = False,
    ) -> None:
        # Copies by the identity of originals, which whoever asks keeps alive.
        self.known: dict[int, Any] = {}
        for tensor, new in replaced:
            self.known[id(tensor)] = new
            if vars(tensor):
                _mark(new, tensor)
        self.other, self.frozen = other, frozen
        self.modules: list[tuple[nn.Module, nn.Module]] = []
        # Hooks and other functions of modules: where they belong, and what they are.
        self.later: list[tuple[dict[str, Any], str, Any]] = []

    def __call__(self, value: Any) -> Any:
        """Return the copy of an object, or the object if there is nothing to copy."""
        if type(value) in ATOMS:
            return value
        known = self.known.get(id(value), _MISSING)
        return _copy(value, self) if known is _MISSING else known

    def of(self, value: Any) -> Any:
        """Return the copy of an object and of all that it leads to."""
        new = self(value)
        # What is shared with functions unless it belongs to a module is known now.
        while self.later:
            state, name, attribute = self.later.pop()
            state[name] = self(attribute)
        return new

    def of_called(self, value: Any) -> Any:
        """Return the copy of what is called: of an object, its attributes too.

        An object with ``__call__``, or whose method is called, is to its attributes
        what a function is to its closure.
        """
        owner = getattr(value, "__self__", value)
        followed = isinstance(owner, (nn.Module, type, types.ModuleType, *FUNCTIONS))
        if not followed and id(owner) not in self.known and hasattr(owner, "__dict__"):
            new = self.remember(owner, copy.copy(owner))
            new.__dict__.update({k: self(v) for k, v in vars(owner).items()})
        return self.of(value)

    def remember(self, value: Any, new: Any) -> Any:
        """Let this be the copy of an object."""
        self.known[id(value)] = new
        return new

    def inside(self, value: Any) -> Any:
        """Return the copy of what a function holds, if modules are in it."""
        return self(value) if self.frozen or self.leads_somewhere(value) else value

    def leads_somewhere(self, value: Any) -> bool:
        """Whether a module or a known tensor is in it, or what is copied too."""
        todo, seen = [value], set[int]()
        while todo:
            item = todo.pop()
            if type(item) in ATOMS or id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, nn.Module) or id(item) in self.known:
                return True
            if self.frozen and (isinstance(item, _STAY) or is_local(item)):
                return True
            if self.other is not None and isinstance(item, Generators):
                return True
            parts = parts_of(item)
            todo += [*parts, *parts.values()]
        return False


@singledispatch
def _copy(value: Any, copies: Copies) -> Any:
    return value


@_copy.register
def _copy_tensor(value: Tensor, copies: Copies) -> Any:
    if copies.other is None:
        return value
    new = copies.remember(value, copies.other(value))
    _mark(new, value)
    return new


def _mark(new: Tensor, tensor: Tensor) -> None:
    """Give what stands for a tensor the attributes that others have set on it."""
    if new is not tensor:
        vars(new).update(vars(tensor) | vars(new))


@_copy.register
def _copy_array(value: np.ndarray, copies: Copies) -> Any:
    # Not what lies in a file.
    if not copies.frozen or type(value) is not np.ndarray:
        return value
    return copies.remember(value, value.copy())


@_copy.register(Generators)
def _copy_generator(value: Any, copies: Copies) -> Any:
    # Draws move the risk's own from call to call, so that they are found out.
    if copies.other is None:
        return value
    if not isinstance(value, torch.Generator):
        return copies.remember(value, copy.deepcopy(value))
    new = copies.remember(value, torch.Generator(value.device))
    new.set_state(value.get_state())
    return new


@_copy.register
def _copy_module(value: nn.Module, copies: Copies) -> Any:
    if type(value) in weakref.ProxyTypes:
        target = referent(value)
        new = copies.known.get(id(target), target)
        return value if new is target else weakref.proxy(new)
    if isinstance(value, torch.jit.ScriptModule):
        if [*value.parameters(), *value.buffers()]:
            raise ValueError(
                f"model: {type(value).__name__} was made by torch.jit; its parameters "
                "cannot be replaced. Give the module that it was made from."
            )
        return value
    kind: Any = type(value)
    if copies.other is not None and is_parametrized(value):
        kind = _of_its_own_parameters(value)
    new = copies.remember(value, object.__new__(kind))
    copies.modules.append((value, new))
    state = new.__dict__
    state.update(value.__dict__)
    # Written out, since it is done for each module in each evaluation.
    for name, attribute in value.__dict__.items():
        kind = type(attribute)
        if kind in ATOMS or (kind is tuple and _flat(attribute)):
            continue
        if name in OWN and not attribute:
            state[name] = kind()
        elif name in _SLOTS:
            state[name] = {key: copies(item) for key, item in attribute.items()}
        elif name == "_compiled_call_impl" or is_cached(value, name, attribute):
            del state[name]  # it is of the original, and made anew
        elif name in OWN or isinstance(attribute, FUNCTIONS):
            copies.later.append((state, name, without_sharding(name, attribute)))
        else:
            state[name] = copies(attribute)
    if type(value).__basicsize__ > nn.Module.__basicsize__:
        for name in slots_of(type(value)):
            if hasattr(value, name):
                object.__setattr__(new, name, copies(getattr(value, name)))
    return new


def _of_its_own_parameters(module: nn.Module) -> type:
    """A class like that of a parametrized module, for copies of it.

    Torch's own goes by the ``id`` of the original in what ``parametrize.cached`` keeps,
    which copies would share with it and with each other.
    """

    def of_self(name: str, original: property) -> property:
        return property(lambda self: self.parametrizations[name](), original.fset)

    kind: Any = type(module)
    names: Any = module.parametrizations
    computed = {name: of_self(name, getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), computed)


@_copy.register
def _copy_dict(value: dict, copies: Copies) -> Any:  # type: ignore[type-arg]
    new = copies.remember(value, copy.copy(value))
    if not value or (_flat(value.values()) and _flat(value)):
        return new
    if isinstance(value, collections.defaultdict):
        new.default_factory = copies(value.default_factory)
    new.clear()
    for key, item in value.items():
        new[copies(key)] = copies(item)
    return new


@_copy.register(list | collections.deque | set)
def _copy_items(value: Any, copies: Copies) -> Any:
    new = copies.remember(value, copy.copy(value))
    if not _flat(value):
        items = [copies(item) for item in value]
        new.clear()
        (new.update if isinstance(new, set) else new.extend)(items)
    return new


@_copy.register(tuple | frozenset)
def _copy_fixed(value: Any, copies: Copies) -> Any:
    if _flat(value):
        return value
    items = [copies(item) for item in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    kind: Any = type(value)
    return copies.remember(
        value, kind._make(items) if hasattr(kind, "_make") else kind(items)
    )


@_copy.register
def _copy_method(value: types.MethodType, copies: Copies) -> Any:
    function, owner = copies(value.__func__), copies(value.__self__)
    if function is value.__func__ and owner is value.__self__:
        return value
    return copies.remember(value, types.MethodType(function, owner))


@_copy.register
def _copy_builtin_method(value: types.BuiltinMethodType, copies: Copies) -> Any:
    owner = value.__self__
    new = owner if isinstance(owner, types.ModuleType) else copies.inside(owner)
    return value if new is owner else getattr(new, value.__name__)


@_copy.register
def _copy_partial(value: functools.partial, copies: Copies) -> Any:  # type: ignore[type-arg]
    if not copies.leads_somewhere(value):
        return value
    new = functools.partial(
        copies(value.func),
        *map(copies, value.args),
        **{name: copies(item) for name, item in value.keywords.items()},
    )
    new.__dict__.update(value.__dict__)
    return copies.remember(value, new)


@_copy.register(CACHED)
def _copy_cached(value: Any, copies: Copies) -> Any:
    if not copies.leads_somewhere(value):
        return value
    again = functools.lru_cache(**value.cache_parameters())
    return copies.remember(value, again(copies(value.__wrapped__)))


@_copy.register
def _copy_function(value: types.FunctionType, copies: Copies) -> Any:
    """Rebuild a function with the copies of what it closes over.

    The containers in it are shared unless they lead to modules: a hook that counts
    in a list of the user's still does.
    """
    if not copies.leads_somewhere(value):
        return value
    cells, space = value.__closure__, value.__globals__
    used = {n: m for n, m in _globals(value).items() if copies.leads_somewhere(m)}
    if copies.frozen and is_local(value):
        named = {n: space[n] for n in _names(value) if n in space}
        kinds = (dict, list, set, np.ndarray)
        used |= {n: m for n, m in named.items() if isinstance(m, kinds)}
        space = {n: space[n] for n in _OF_MODULES if n in space} | named
    elif used:
        space = dict(space)
    new = types.FunctionType(
        value.__code__,
        space,
        value.__name__,
        closure=cells and tuple(types.CellType() for _ in cells),
    )
    copies.remember(value, new)  # it may close over itself
    for name, item in used.items():
        space[name] = copies(item)
    for old_cell, cell in zip(cells or (), new.__closure__ or (), strict=True):
        if not is_empty(old_cell):
            cell.cell_contents = copies.inside(old_cell.cell_contents)
    new.__defaults__ = copies.inside(value.__defaults__)
    new.__kwdefaults__ = copies.inside(value.__kwdefaults__)
    new.__dict__.update(value.__dict__)
    new.__qualname__, new.__doc__ = value.__qualname__, value.__doc__
    new.__module__ = value.__module__
    return new


@_copy.register
def _copy_reference(value: weakref.ReferenceType, copies: Copies) -> Any:  # type: ignore[type-arg]
    target = value()
    new = copies.known.get(id(target), target)
    return value if new is target or new is None else weakref.ref(new)


def referent(proxy: Any) -> Any:
    """What a weak proxy stands for: its methods are bound to that."""
    return proxy.__init__.__self__


def parts_of(value: Any) -> Mapping[Any, Any]:
    """What a copy of an object has copies of, by name: dictionaries of their keys too.

    Those of sets and sequences have numbers.
    """
    match value:
        case dict():
            return value
        case list() | tuple() | set() | frozenset() | collections.deque():
            return dict(enumerate(value))
        case types.FunctionType():
            return _parts_of_function(value)
        case types.MethodType():
            return {value.__func__.__name__: value.__func__, "__self__": value.__self__}
        case types.BuiltinMethodType():
            owner = value.__self__
            known = not isinstance(owner, types.ModuleType)
            return {"__name__": value.__name__, "__self__": owner} if known else {}
        case functools.partial():
            numbered = dict(enumerate(value.args))
            return {"the function": value.func, **numbered, **value.keywords}
    return {"__wrapped__": value.__wrapped__} if isinstance(value, CACHED) else {}


def _parts_of_function(function: types.FunctionType) -> Mapping[Any, Any]:
    """Its code, what it closes over, its defaults, modules and tensors."""
    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closed = {name: c.cell_contents for name, c in cells if not is_empty(c)}
    arguments = reversed(code.co_varnames[: code.co_argcount])
    defaults = reversed(function.__defaults__ or ())
    given = dict(zip(arguments, defaults, strict=False))
    given |= (function.__kwdefaults__ or {}) | closed
    return {"__code__": code, **_globals(function), **given}


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """Modules, tensors and generators that a function names as global variables."""
    found = {name: function.__globals__.get(name) for name in _names(function)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, nn.Module | Tensor | Generators)
    }


def _names(function: types.FunctionType) -> set[str]:
    """The names in its code, among them those of global variables."""
    return {name for code in codes_of(function) for name in code.co_names}


def codes_of(function: types.FunctionType) -> Iterator[types.CodeType]:
    """Its code, and that of what is defined inside."""
    codes = [function.__code__]
    while codes:
        yield (code := codes.pop())
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]


def is_local(value: Any) -> bool:
    """Whether it is a function that no module has under its name: a lambda, as a rule.

    What has a name there is pickled by it, so it is not to be rebuilt.
    """
    if not isinstance(value, types.FunctionType):
        return False
    owner: Any = sys.modules.get(value.__module__ or "")
    for name in value.__qualname__.split("."):
        owner = getattr(owner, name, None)
    return owner is not value


def is_cached(module: nn.Module, name: str, attribute: Any) -> bool:
    """Whether an attribute was computed from parameters, and will be when asked for."""
    computed = isinstance(attribute, Tensor) and not attribute.is_leaf
    made = getattr(type(module), name, None)
    return computed and isinstance(made, functools.cached_property)


def is_empty(cell: types.CellType) -> bool:
    """Whether a function has nothing in a cell."""
    try:
        return cell.cell_contents is _MISSING
    except ValueError:
        return True


def _flat(values: Iterable[Any]) -> bool:
    return ATOMS.issuperset(map(type, values))
