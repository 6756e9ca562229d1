"""Whether what a copy was made of is still what it was then.

A risk runs on copies of the user's modules and functions
(:mod:`vivit_linop.risk.model.copies`). Parameters and buffers move in training; here it
is seen whether anything else of the originals has changed that the copies have of their
own: attributes, containers in them, hooks, submodules, closures. What copies share with
the originals is the same object, and not looked into.
"""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Container, Iterable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.devices import tolerated
from vivit_linop.risk.data.containers import slots_of
from vivit_linop.risk.model.copies import (
    ATOMS,
    CACHED,
    FUNCTIONS,
    OWN,
    Generators,
    is_cached,
    parts_of,
    referent,
)
from vivit_linop.risk.model.parameters import HALVES, have_equal_entries
from vivit_linop.risk.model.sharded import without_sharding

# Modes are those of construction; the others are set on copies.
_NOT_COMPARED = frozenset({"training", "_compiled_call_impl", "scale_grad_by_freq"})
_MISSING = object()


class Twins:
    """Compares originals with their copies.

    Args:
        replaced: Pairs of a tensor of the originals and what stands for it in copies:
            these may have any values.
        unused: Copies, by identity, of what was computed from tensors that require
            grad, which nothing reads before it is computed anew: hooks leave such.
    """

    def __init__(
        self, replaced: Iterable[tuple[Tensor, Tensor]], unused: Container[int] = ()
    ) -> None:
        pairs = list(replaced)
        self.replaced = {id(tensor): new for tensor, new in pairs}
        self.new, self.unused = {id(new) for _, new in pairs}, unused
        # Objects may lead to themselves. They are kept here, so that no other one gets
        # their numbers.
        self._seen: dict[tuple[int, int], tuple[Any, Any]] = {}

    def __call__(self, value: Any, twin: Any) -> bool:
        """Whether an object is what it was when its twin was made."""
        if value is twin:
            return True
        kind = type(value)
        if kind in ATOMS:
            return _same_atoms(value, twin)
        key = id(value), id(twin)
        if key in self._seen:
            return True
        self._seen[key] = value, twin
        return _same(value, twin, self)

    def each(self, values: Iterable[Any], twins: Iterable[Any]) -> bool:
        """Whether objects one by one are what they were."""
        mine, others = list(values), list(twins)
        return len(mine) == len(others) and all(map(self, mine, others))


def _same_atoms(value: Any, twin: Any) -> bool:
    if value in HALVES and isinstance(twin, torch.dtype):
        return True  # copies compute in another precision
    if type(value) is not type(twin):
        return False
    return bool(value == twin or (value != value and twin != twin))


@singledispatch
def _same(value: Any, twin: Any, twins: Twins) -> bool:
    """Of objects that are not shared: by their attributes."""
    if type(value) is not type(twin) or not hasattr(value, "__dict__"):
        return False
    return twins(vars(value), vars(twin))


@_same.register
def _same_tensors(value: Tensor, twin: Any, twins: Twins) -> bool:
    if id(value) in twins.replaced:
        is_its_own = twins.replaced[id(value)] is twin
        return is_its_own and twins(_marks(value), _marks(twin))
    if id(twin) in twins.unused and not value.is_leaf:
        return True
    if not isinstance(twin, Tensor) or id(twin) in twins.new:
        return False
    with tolerated(RuntimeError):  # not all kinds of tensors can be compared
        return have_equal_entries(value.detach().to(twin), twin)
    return False


def _marks(tensor: Tensor) -> dict[str, Any]:
    """The numbers and words that are attributes of a tensor."""
    return {k: v for k, v in vars(tensor).items() if type(v) in ATOMS}


@_same.register
def _same_modules(value: nn.Module, twin: Any, twins: Twins) -> bool:
    proxies = {type(value), type(twin)}.intersection(weakref.ProxyTypes)
    if proxies:
        return type(value) is type(twin) and twins(*map(referent, (value, twin)))
    # The copy of a parametrized module has a class of its own.
    if not isinstance(twin, nn.Module) or type(value) not in type(twin).__mro__[:2]:
        return False
    mine, others = value.__dict__, twin.__dict__
    for name in mine.keys() | others.keys():
        own, other = mine.get(name, _MISSING), others.get(name, _MISSING)
        if own is other or name in _NOT_COMPARED:
            continue
        if name in OWN and not own and not other:
            continue
        if other is _MISSING and is_cached(value, name, own):
            continue
        if name in OWN or isinstance(own, FUNCTIONS):
            own = without_sharding(name, own)
        if not twins(own, other):
            return False
    if type(value).__basicsize__ > nn.Module.__basicsize__:
        names = list(slots_of(type(value)))
        both = [[getattr(m, name, _MISSING) for name in names] for m in (value, twin)]
        return twins.each(*both)
    return True


@_same.register(dict | list | tuple | collections.deque)
@_same.register(types.MethodType | types.BuiltinMethodType | types.FunctionType)
@_same.register(functools.partial | CACHED)
def _same_parts(value: Any, twin: Any, twins: Twins) -> bool:
    if not isinstance(twin, type(value)) and not isinstance(value, type(twin)):
        return False
    mine, others = parts_of(value), parts_of(twin)
    names = twins.each(mine, others)
    return names and twins.each(mine.values(), others.values())


@_same.register(Generators)
def _same_generators(value: Any, twin: Any, twins: Twins) -> bool:
    return type(value) is type(twin)  # in any state, since no outputs depend on it


@_same.register(set | frozenset)
def _same_sets(value: Any, twin: Any, twins: Twins) -> bool:
    return bool({twins.replaced.get(id(v), v) for v in value} == twin)


@_same.register
def _same_references(
    value: weakref.ReferenceType,  # type: ignore[type-arg]
    twin: Any,
    twins: Twins,
) -> bool:
    return isinstance(twin, weakref.ReferenceType) and twins(value(), twin())
