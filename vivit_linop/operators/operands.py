"""What operators are given to work with: vectors from outside, and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Complex, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from vivit_linop.arguments import as_device
from vivit_linop.modes import is_differentiated

_CPU = torch.device("cpu")
Scalar: TypeAlias = float | Tensor


# Vectors and devices -----------------------------------------------------------------


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
    if type(device) is torch.device and device == _CPU:  # nearly always, for each node
        return _CPU
    device = as_device(device)
    if device.type == "cpu":
        return _CPU
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {device} is not there ({error}).") from None


"""A number; a tensor without axes where gradients flow to it."""


# Numbers -----------------------------------------------------------------------------


def is_scalar(x: Any) -> bool:
    """Whether ``x`` is a number, or an array or tensor without axes."""
    if isinstance(x, (float, int)):  # asked first, as above
        return True
    if isinstance(x, (Tensor, np.ndarray)):
        return x.ndim == 0
    return isinstance(x, (Complex, np.generic))


def as_scalar(x: Any) -> Scalar:
    """Return a real finite scalar: a float, or a tensor where gradients flow to it."""
    if type(x) is float and math.isfinite(x):  # asked first: it is what most are
        return x
    if isinstance(x, Tensor) and is_differentiated(x):
        as_float(x.detach())
        return x
    return as_float(x)


def without_gradient(x: Any, name: str) -> float:
    """Return a scalar as a float; refuse one that gradients would not reach."""
    if isinstance(x, Tensor) and is_differentiated(x):
        raise TypeError(
            f"{name}: found a tensor that requires grad, which gradients would not "
            "reach here. Write the expression with operators (c * A, A + delta * "
            f"Identity(n)), or pass {name}.detach()."
        )
    return float(x)


def log_abs(x: Scalar) -> Scalar:
    """Return log |x|, a tensor for a tensor."""
    return x.abs().log() if isinstance(x, Tensor) else math.log(abs(x))


def as_float(x: Any) -> float:
    """Return a real finite scalar as a float, or say why it is none."""
    if type(x) is float and math.isfinite(x):
        return x
    value = x.item() if isinstance(x, (Tensor, np.ndarray, np.generic)) else x
    if not isinstance(value, Real):
        raise TypeError(f"An operator is scaled by a real number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"An operator is scaled by a finite number, got {value!r}.")
    return float(value)
