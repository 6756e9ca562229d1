"""What comes from outside as vectors: arrays, lists, sparse matrices, devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor


def as_array(x: Any) -> np.ndarray:
    """Return numbers that are no tensor as an array; a product with them is dense."""
    of_tensors = isinstance(x, (list, tuple)) and any(
        isinstance(part, Tensor) and part.ndim > 0 for part in x
    )
    if of_tensors or isinstance(x, (Mapping, Iterator)):
        raise TypeError(
            f"x: a {type(x).__name__} of tensors is no vector. Multiply "
            "risk.flatten(tensors); risk.unflatten(result) is the way back."
        )
    if isinstance(x, (list, tuple)):  # NumPy takes no numbers from other devices
        x = [part.item() if isinstance(part, Tensor) else part for part in x]
    array = x.toarray() if issparse(x) else np.asarray(x)
    check_numbers(array)
    return array


def check_numbers(x: np.ndarray) -> None:
    """Refuse what is no number."""
    if x.dtype.kind not in "fiubc":
        raise TypeError(
            f"x: vectors must be numbers, got {x.dtype}. Convert with x.astype(float)."
        )


def numbered(device: torch.device | str) -> torch.device:
    """Return a device as tensors on it name it: "cuda" is the current one."""
    if isinstance(device, torch.device) and device.type == "cpu":
        return _CPU
    return torch.empty(0, device=device).device


_CPU = torch.device("cpu")
