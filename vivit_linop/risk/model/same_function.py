"""Whether all ranks of a process group have the same model and loss, by digests."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.data import fingerprint
from vivit_linop.risk.model.copies import parts_of

_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def check_alike(ranks: Ranks, digests: Callable[[], Mapping[str, str]]) -> None:
    """Raise an error unless all ranks have the same."""
    with ranks.together("the same function"):
        own = digests()
    every = ranks.gathered(own)
    for name in dict.fromkeys(name for each in every for name in each):
        seen = [each.get(name) for each in every]
        other = next((r for r, digest in enumerate(seen) if digest != seen[0]), None)
        if other is not None:
            raise ValueError(
                f"process_group: rank {other} has other {name} than rank 0. All ranks "
                "need the same: load one checkpoint, or broadcast them."
            )


def digests_of(value: Any, name: str) -> dict[str, str]:
    """Return by name what tells a loss from another: its tensors and attributes.

    Args:
        value: What is called. Followed are containers, modules, closures and defaults
            of functions; of other objects only this one.
        name: How it is called.
    """
    found, known = dict[str, str](), dict[int, Any]()
    todo = [(name, value)]
    owner = getattr(value, "__self__", value)
    while todo:
        path, item = todo.pop()
        found[path] = _own(item)
        parts = _parts(item)
        if item is owner and not (parts or isinstance(item, type)):
            parts = getattr(item, "__dict__", {})
        if parts and id(item) not in known:
            known[id(item)] = item
            todo += [(f"{path}.{key}", part) for key, part in parts.items()]
    return found


def _own(item: Any) -> str:
    """What an object is, without its parts."""
    match item:
        case int() | float() | complex() | str() | bytes() | np.generic():
            return repr(item)
        case Tensor():
            return fingerprint.of_tensors([("", item)])
        case np.ndarray():
            return f"{item.dtype}{item.shape}{_digest(item.tobytes())}"
        case types.FunctionType():
            return f"{item.__qualname__} {_digest(*_instructions(item.__code__))}"
    return type(item).__qualname__


def _instructions(code: types.CodeType) -> Iterable[bytes]:
    """What a function does, with which names and numbers."""
    yield code.co_code + repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)
        elif isinstance(constant, frozenset):  # in another order in each process
            yield repr(sorted(map(repr, constant))).encode()
        else:
            yield repr(constant).encode()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _parts(item: Any) -> Mapping[Any, Any]:
    """What an object is made of, by name; sets have no order that all ranks share."""
    if isinstance(item, nn.Module):
        others = {k: v for k, v in vars(item).items() if k not in _OF_ANY_MODULE}
        return {**others, **item._parameters, **item._buffers, **item._modules}
    return {} if isinstance(item, (set, frozenset)) else parts_of(item)
