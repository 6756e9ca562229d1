"""Parameters as arguments of calls: whole, a slice of their rows, or transposed.

A net often hands on a view of a parameter: ``x @ w.T``, the three parts of an attention
layer's input weight, an embedding of the first positions. Where such a view is used as
a layer uses its weight, it is a use of the parameter like any other. Which entries a
view has is seen from a twin of the parameter without data: what is done to the one is
done to the other, and the twin's offset and strides tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vivit_linop.risk.model import Params


def functions(names: str) -> list[Callable[..., Any]]:
    """Return the functions of these names, of ``torch`` and of tensors."""
    found = (
        getattr(place, name, None)
        for name in names.split()
        for place in (torch, Tensor)
    )
    return [function for function in found if function is not None]


# Functions that give a view of their first argument, whatever its strides are.
_VIEWS = {
    *functions("transpose swapaxes swapdims t permute movedim moveaxis"),
    *functions("unsqueeze squeeze view unflatten"),
    *functions("narrow select chunk split tensor_split unbind __getitem__"),
    *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")),
}
# Functions that give one of a contiguous tensor.
_VIEWS_IF_CONTIGUOUS = {*functions("reshape flatten ravel contiguous")}


@dataclass(frozen=True)
class View:
    """Consecutive entries of a flattened parameter as an argument.

    Attributes:
        name: The parameter.
        place: Which of its entries these are, from the first to before the second.
        shape: The shape of the argument.
        transposed: Whether the entries are, in order, those of its transpose.
    """

    name: str
    place: tuple[int, int]
    shape: torch.Size
    transposed: bool = False

    @property
    def mT(self) -> View:
        """The transpose of a matrix."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    @property
    def as_row(self) -> View:
        """A vector as a matrix with one row."""
        return replace(self, shape=torch.Size((1, *self.shape)))


class Views:
    """The parameters that a net is given, and the views that it makes of them.

    Args:
        params: The parameters, by name.
    """

    def __init__(self, params: Params) -> None:
        # Tensors are known by identity, so they must live as long as this does.
        self._known = {
            id(p): (p, name, torch.empty(p.shape, dtype=p.dtype, device="meta"))
            for name, p in params.items()
        }

    def names(self, tree: Any) -> set[str]:
        """Return the parameters of which there are views in a tree of arguments."""
        found = set()
        for tensor in tensors(tree):
            if id(tensor) in self._known:
                found.add(self._known[id(tensor)][1])
        return found

    def frozen(self, value: Any) -> Any:
        """Return an argument detached; a known tensor as what it is a view of.

        Known tensors that have entries from all over are None.
        """
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            return value.detach()
        _, name, twin = self._known[id(value)]
        start = int(twin.storage_offset())
        place = start, start + twin.numel()
        if twin.is_contiguous():
            return View(name, place, twin.shape)
        if twin.ndim == 2 and twin.mT.is_contiguous():
            return View(name, place, twin.shape, transposed=True)
        return None

    def follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> bool:
        """Learn the views that a call has made; returns whether it has done only so."""
        if not args or id(args[0]) not in self._known:
            return False
        _, name, twin = self._known[id(args[0])]
        if func not in _VIEWS and not (
            func in _VIEWS_IF_CONTIGUOUS and twin.is_contiguous()
        ):
            return False
        if func is Tensor.__getitem__ and not _is_basic(args[1]):
            return False
        if tensors((args[1:], kwargs)):
            return False
        try:
            twins = func(twin, *args[1:], **kwargs)
        except RuntimeError:  # a view because of the strides that the parameter has
            return False
        for view, its_twin in zip(tensors(result), tensors(twins), strict=True):
            if (view.shape, view.dtype) != (its_twin.shape, its_twin.dtype):
                return False
            self._known[id(view)] = view, name, its_twin
        return True


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or results, in order."""
    found, rest = [], [tree]
    while rest:
        item = rest.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            rest.extend(reversed(item))
        elif isinstance(item, dict):
            rest.extend(reversed(item.values()))
    return found


def _is_basic(index: Any) -> bool:
    """Whether an index gives a view."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None
        or part is Ellipsis
        or isinstance(part, slice)
        or (isinstance(part, int) and not isinstance(part, bool))
        for part in parts
    )
