"""Numbers of rows or samples, as users give them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vivit_linop.arguments import as_numbers

Index: TypeAlias = Tensor | np.ndarray | list[int] | range
"""Numbers of rows, or a boolean mask of them."""


def as_index(given: Any, count: int, name: str = "index") -> Tensor:
    """Return distinct numbers, int64, from indices or from a mask.

    Args:
        given: What the user gave.
        count: How many rows or samples there are.
        name: What errors call it.

    Raises:
        TypeError: If they are neither integers nor booleans.
        ValueError: If there is none, or one is out of range or listed twice.
    """
    given = list(given) if isinstance(given, range) else given
    index = as_numbers(given, name).detach()
    if index.ndim != 1 or not index.numel():
        raise ValueError(
            f"{name}: numbers along one axis, at least one, got shape "
            f"{list(index.shape)}."
        )
    if index.dtype == torch.bool:
        if len(index) != count:
            raise ValueError(f"{name}: a mask has {count} entries, got {len(index)}.")
        index = index.nonzero().squeeze(1)
        if not len(index):
            raise ValueError(f"{name}: the mask is False everywhere.")
    if index.is_floating_point() or index.is_complex():
        raise TypeError(
            f"{name}: integers or a boolean mask, got {index.dtype}. Take mask > 0.5, "
            "or index.long()."
        )
    index = index.long()
    read = index.cpu()  # a GPU is waited for once
    if read.min() < 0 or read.max() >= count:
        raise ValueError(
            f"{name}: must lie in 0..{count - 1}, got {int(read.min())}.."
            f"{int(read.max())}."
        )
    if len(read.unique()) < len(read):
        raise ValueError(f"{name}: one number is listed twice.")
    return index
