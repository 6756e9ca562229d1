"""Whatever holds tensors: its parts, and another one of its type with other parts.

Inputs reach a model as the type that they are: lists, named tuples, dataclasses, packed
sequences, mappings of any kind, objects with tensors as attributes. :func:`opened` says
what the parts of a value are; a type that needs another answer is registered with it.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import (
    Callable,
    Hashable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from functools import singledispatch
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

# What is one value, whatever it has inside.
_VALUES = (
    *(str, bytes, bytearray, int, float, complex, range, type, ModuleType),
    *(torch.dtype, torch.device, torch.Generator, torch.Size),
    *(nn.Module, set, frozenset),
)
# How many parts of a list errors name: it may hold something for each sample.
_DESCRIBED = 8


class Opened(NamedTuple):
    """A container, opened.

    Attributes:
        names: The names of its parts.
        parts: The parts.
        build: Returns a container of its type that has other parts.
    """

    names: Sequence[Hashable]
    parts: Sequence[Any]
    build: Callable[[Sequence[Any]], Any]


def _nothing(value: Any) -> bool:
    return False


def attribute(value: Any, name: str) -> Any:
    """Return what an object has under a name, None where it fails to say so."""
    try:
        return getattr(value, name, None)
    # Its ``__getattr__`` may raise anything.
    except Exception:
        return None


@singledispatch
def opened(value: Any) -> Opened | None:
    """Return the parts of a container, None for a value that is none."""
    kind = type(value)
    if value is None or isinstance(value, _VALUES) or hasattr(kind, "__array__"):
        return None
    if isinstance(stores := attribute(value, "stores"), list):
        return _with_stores(value, stores)
    if all(hasattr(kind, name) for name in ("keys", "__getitem__", "__setitem__")):
        return _with_items(value)
    if isinstance(value, Mapping):
        return Opened(
            list(value),
            list(value.values()),
            lambda parts: type(value)(dict(zip(value, parts, strict=True))),  # type: ignore[call-arg]
        )
    return _with_attributes(value)


@opened.register
def opened_tensor(value: Tensor) -> Opened | None:
    """A tensor is what containers hold; a nested one holds others."""
    if not value.is_nested:
        return None
    layout, parts = value.layout, value.unbind()

    def build(parts: Sequence[Any]) -> Tensor:
        return torch.nested.as_nested_tensor(list(parts), layout=layout)

    return Opened(range(len(parts)), parts, build)


def is_leaf(value: Any) -> bool:
    """Whether a value is a tensor that holds no others."""
    return isinstance(value, Tensor) and not value.is_nested


def strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what a sparse tensor consists of; of any other, itself."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


@opened.register(list | collections.deque)
def opened_list(value: Any) -> Opened:
    """Also of a subclass, which keeps its attributes."""
    if type(value) is list:
        return Opened(range(len(value)), value, list)

    def build(parts: Sequence[Any]) -> Any:
        result = copy.copy(value)
        result.clear()
        result.extend(parts)
        return result

    return Opened(range(len(value)), list(value), build)


@opened.register(tuple)
def opened_tuple(value: tuple[Any, ...]) -> Opened:
    """Named ones, too."""
    kind: Any = type(value)
    fields = getattr(value, "_fields", None)
    make = getattr(kind, "_make", kind)
    return Opened(fields or range(len(value)), value, make)


@opened.register
def opened_packed(value: PackedSequence) -> Opened:
    """Its batch sizes stay where torch wants them, on the host."""

    def build(parts: Sequence[Any]) -> PackedSequence:
        data, order, back = parts
        return PackedSequence(data, value.batch_sizes, order, back)

    names = ("data", "sorted_indices", "unsorted_indices")
    return Opened(names, [getattr(value, name) for name in names], build)


def _with_items(value: Any) -> Opened:
    """Open what has keys: a copy of it gets other items."""
    names = list(value.keys())
    own = [value[name] for name in names]

    def build(parts: Sequence[Any]) -> Any:
        result = _with_own_items(value)
        for name, part, before in zip(names, parts, own, strict=True):
            result[name] = part
            if part is not before and value[name] is part:
                value[name] = before
                raise _shares_items(value)
        return result

    return Opened(names, own, build)


def without_item(value: Mapping[Any, Any], name: Hashable) -> tuple[Any, Any]:
    """Return a mapping of the same type without one of its items, and this item."""
    if not isinstance(value, MutableMapping):
        others = {key: item for key, item in value.items() if key != name}
        return type(value)(others), value[name]  # type: ignore[call-arg]
    result = _with_own_items(value)
    item = result.pop(name)
    if name not in value:
        value[name] = item
        raise _shares_items(value)
    return result, item


def _with_own_items(value: Any) -> Any:
    """A copy of an object with keys; a shallow one may share the items."""
    result = copy.copy(value)
    for name in [] if isinstance(value, dict) else _attributes(value):
        if isinstance(part := attribute(result, name), (dict, list)):
            object.__setattr__(result, name, copy.copy(part))
    return result


def _shares_items(value: Any) -> TypeError:
    return TypeError(
        f"data: a copy of {type(value).__name__} has its items in common with it, so "
        "that none could be replaced. Give it __copy__, or give a dict of its items."
    )


def _with_stores(value: Any, stores: Sequence[Any]) -> Opened:
    """Open a graph of torch_geometric: it has stores of items, one for each type."""
    places = [(at, key) for at, store in enumerate(stores) for key in store]
    parts = [stores[at][key] for at, key in places]

    def build(parts: Sequence[Any]) -> Any:
        result = copy.copy(value)
        for (at, key), part in zip(places, parts, strict=True):
            result.stores[at][key] = part
        return result

    names = [place[1] if len(stores) == 1 else place for place in places]
    return Opened(names, parts, build)


def _with_attributes(value: Any) -> Opened | None:
    """Open a dataclass or another object: a copy of it gets other attributes."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = _attributes(value)
    names = [name for name in names if hasattr(value, name)]
    if not names or callable(value):
        return None

    def build(parts: Sequence[Any]) -> Any:
        result = copy.copy(value)
        for name, part in zip(names, parts, strict=True):
            object.__setattr__(result, name, part)  # frozen ones, too
        return result

    return Opened(names, [getattr(value, name) for name in names], build)


def _attributes(value: Any) -> list[str]:
    """The names of all that an object may keep."""
    return [*slots_of(type(value)), *getattr(value, "__dict__", ())]


def slots_of(kind: type) -> Iterator[str]:
    """The names of the slots of a class that are no dictionary of attributes."""
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield name


def leaves(value: Any, stop: Callable[[Any], bool] = _nothing) -> Iterator[Any]:
    """Return the tensors of a value, one after the other.

    Args:
        value: A tensor, or what holds some.
        stop: Which containers are yielded themselves, in place of their tensors.
    """
    return iter((value,)) if is_leaf(value) else _walk(value, stop, (), {})


def holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or holds one."""
    return next(leaves(value), None) is not None


def _walk(
    value: Any,
    stop: Callable[[Any], bool],
    above: tuple[int, ...],
    barren: dict[int, Any],
) -> Iterator[Any]:
    """Walk down; what holds nothing is entered once, however many ways lead to it."""
    if is_leaf(value) or stop(value):
        yield value
        return
    # What refers to itself has no end.
    if id(value) in above or id(value) in barren:
        return
    holds = False
    if (found := opened(value)) is not None:
        for part in found.parts:
            for leaf in _walk(part, stop, (*above, id(value)), barren):
                holds = True
                yield leaf
    if not holds:
        barren[id(value)] = value


def map_leaves(
    function: Callable[[Any], Any], value: Any, stop: Callable[[Any], bool] = _nothing
) -> Any:
    """Apply a function to the tensors of a value; everything else stays.

    What holds tensors is built anew, so that what is done to the result is not done to
    the value.

    Args:
        function: The function.
        value: A tensor, or what holds some.
        stop: Which containers are given to the function themselves.
    """
    if is_leaf(value):
        return function(value)
    return _mapped(function, value, stop, (), {})[0]


def _mapped(
    function: Callable[[Any], Any],
    value: Any,
    stop: Callable[[Any], bool],
    above: tuple[int, ...],
    barren: dict[int, Any],
) -> tuple[Any, bool]:
    """The result, and whether there was a tensor."""
    if is_leaf(value) or stop(value):
        return function(value), True
    if id(value) in above or id(value) in barren:
        return value, False
    mapped: list[tuple[Any, bool]] = []
    if (found := opened(value)) is not None:
        within = (*above, id(value))
        mapped = [_mapped(function, p, stop, within, barren) for p in found.parts]
    holds = any(held for _, held in mapped)
    if not holds:
        barren[id(value)] = value
    # The standard ones can always be built; of others nobody knows that.
    if found is not None and (holds or type(value) in (tuple, list, dict)):
        return found.build([part for part, _ in mapped]), holds
    return value, False


def rebuilt(value: Any) -> Any:
    """Return another container with the same tensors: whoever has it may change it."""
    return map_leaves(lambda leaf: leaf, value)


def copied(value: Any) -> Any:
    """Return a value in memory of its own, for what is kept: the user's may change.

    What is one tensor in two places stays one.
    """
    # With each the tensor itself, which may be made as it is asked for, and go: another
    # one would have its number then.
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(leaf: Tensor) -> Tensor:
        if id(leaf) not in copies:
            own = leaf.detach().clone()
            # Not asked for in vain: transformations of functions do not allow it.
            own = own.requires_grad_() if leaf.requires_grad else own
            copies[id(leaf)] = leaf, own
        return copies[id(leaf)][1]

    return map_leaves(copy, value)


def described(value: Any) -> str:
    """Say what a value is, with the shapes of its tensors."""
    if is_leaf(value):
        return f"a tensor {list(value.shape)}"
    found = opened(value)
    if found is None:
        return type(value).__name__
    if type(value) in (tuple, list):
        few = [*map(described, value[:_DESCRIBED])]
        items = ", ".join(few + ["…"] * (len(value) > _DESCRIBED))
        return f"({items})" if type(value) is tuple else f"[{items}]"
    named = zip(found.names, found.parts, strict=True)
    items = ", ".join(f"{name}: {described(part)}" for name, part in named)
    name = "" if type(value) is dict else type(value).__name__
    return f"{name}{{{items}}}"
