"""Arguments as users give them: numbers, counts, yes or no, indices, vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Complex, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from vivit_linop.modes import is_differentiated

Index: TypeAlias = Tensor | np.ndarray | list[int] | range
"""Numbers of rows, or a boolean mask of them."""

Scalar: TypeAlias = float | Tensor
"""A number; a tensor without axes where gradients flow to it."""

_CPU = torch.device("cpu")


def as_torch_takes(array: np.ndarray) -> np.ndarray:
    """Return an array, or a copy where torch does not take its memory as it is.

    That has negative strides, or such as are no multiples of an entry (a field of a
    structured array), is not aligned, read-only, or in a foreign order of bytes.
    """
    flags, size = array.flags, array.itemsize or 1
    if (
        array.dtype.isnative
        and flags.writeable
        and flags.aligned
        and all(stride >= 0 and stride % size == 0 for stride in array.strides)
    ):
        return array
    return array.astype(array.dtype.newbyteorder("="))


def as_numbers(given: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor as it is, and one on the CPU of what else stands for numbers.

    ``torch.as_tensor`` alone would move both to the caller's default device.

    Args:
        given: A tensor, an array, or numbers.
        name: What errors call it.
        dtype: That of numbers without one.

    Raises:
        TypeError: If it does not stand for numbers.
    """
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray):
        given = as_torch_takes(given)
    try:
        numbers = torch.as_tensor(given, device="cpu")
        if dtype is None or isinstance(given, np.ndarray) or numbers.is_complex():
            return numbers
        return torch.as_tensor(given, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}: numbers, in a tensor, an array or a list, got {given!r}."
        ) from None


def check_has_values(tensor: Tensor, what: str) -> None:
    """Refuse a tensor that has a shape alone, and say what it is."""
    if tensor.is_meta:
        raise ValueError(
            f"{what} is on device 'meta', without values. Give one on 'cpu' or a GPU."
        )


def as_real_numbers(given: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return what :func:`as_numbers` does, of real numbers only."""
    numbers = as_numbers(given, name, dtype)
    if numbers.is_complex() or isinstance(given, bool):
        raise TypeError(f"{name}: must be real, got {given!r}.")
    check_has_values(numbers, f"{name}: a tensor")
    return numbers


def as_count(given: Any, name: str, least: int = 1) -> int:
    """Return an integer of at least some value."""
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"{name}: an integer, got {given!r}.")
    if given < least:
        raise ValueError(f"{name}: at least {least}, got {given}.")
    return int(given)


def check_k(k: Any, count: int) -> None:
    """Refuse k where there are no k eigenvalues among so many."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"k: an integer, got {k!r}.")
    if not 1 <= k <= count:
        raise ValueError(
            f"k: this operator has {count} eigenvalues, so k is between 1 and {count}, "
            f"got {k}."
        )


def check_choice(given: Any, name: str, choices: Iterable[str]) -> None:
    """Refuse what is not one of the words."""
    if not isinstance(given, str) or given not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: one of {listed}, got {given!r}.")


def as_list(given: Any, name: str, what: str) -> list[Any]:
    """Return a list of what can be gone through; a string is one thing."""
    if not isinstance(given, (str, bytes)) and hasattr(given, "__iter__"):
        try:
            return list(given)
        except TypeError:  # tensors and arrays without axes
            pass
    raise TypeError(f"{name}: a list of {what}, got {given!r}.")


def check_function(given: Any, name: str, what: str = "a function") -> None:
    """Refuse what cannot be called, and classes."""
    if not callable(given):
        raise TypeError(f"{name}: {what}, got {type(given).__name__}.")
    if isinstance(given, type):
        kind = given.__name__
        raise TypeError(f"{name}: {what}, got the class {kind}; make one, {kind}().")


def check_generator(given: Any) -> None:
    """Refuse what is neither a generator of torch nor None."""
    if given is not None and not isinstance(given, torch.Generator):
        raise TypeError(f"generator: a torch.Generator or None, got {given!r}.")


def as_device(given: Any) -> torch.device:
    """Return a device; it need not be there."""
    try:
        if isinstance(given, (str, torch.device)):
            return torch.device(given)
    except RuntimeError:  # it knows no such name
        pass
    raise ValueError(f"device: a device of torch, as 'cpu' or 'cuda:0', got {given!r}.")


def numbered(device: torch.device | str) -> torch.device:
    """Return a device as tensors on it name it: "cuda" is the current one."""
    device = as_device(device)
    if device.type == "cpu":
        return _CPU
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {device} is not there ({error}).") from None


def check_real(given: Any, name: str) -> None:
    """Refuse what is no real number."""
    bare = isinstance(given, (Tensor, np.ndarray)) and given.ndim == 0
    value = given.item() if bare else given
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: a number, got {given!r}.")


def check_finite(given: Any, name: str) -> None:
    """Refuse what is no real number, NaN and infinity."""
    check_real(given, name)
    if not math.isfinite(given.item() if isinstance(given, Tensor) else given):
        raise ValueError(f"{name}: a finite number, got {given!r}.")


def check_flag(given: Any, name: str) -> None:
    """Refuse what is neither True nor False: "no" would count as yes."""
    if not isinstance(given, bool):
        raise TypeError(f"{name}: True or False, got {given!r}.")


def as_index(given: Any, count: int, name: str = "index") -> Tensor:
    """Return distinct numbers, int64, from indices or from a mask.

    Raises:
        TypeError: If they are neither integers nor booleans.
        ValueError: If there is none, or one is out of range or listed twice.
    """
    given = list(given) if isinstance(given, range) else given
    index = as_numbers(given, name).detach()
    check_has_values(index, f"{name}: a tensor")
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


# What operators are multiplied with and scaled by ------------------------------------


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
    if array.dtype.kind == "O" and not array.ndim:
        raise TypeError(f"x: a vector or a matrix of numbers, got {type(x).__name__}.")
    check_numbers(array)
    return array


def check_numbers(x: np.ndarray) -> None:
    """Refuse what is no number."""
    if x.dtype.kind not in "fiubc":
        raise TypeError(
            f"x: vectors must be numbers, got {x.dtype}. Convert with x.astype(float)."
        )


def check_is_no_number(x: Any) -> None:
    """Refuse numbers and matrices where operators are added, and say what to add."""
    if is_scalar(x):
        raise TypeError(
            f"An operator is added to operators, got the number {as_float(x):g}. A "
            "damping is a multiple of the identity: A + delta * Identity(n)."
        )
    if isinstance(x, (Tensor, np.ndarray)) or issparse(x):
        raise TypeError(
            "An operator is added to operators, got an array of shape "
            f"{list(x.shape)}. Make it one: A + Dense(matrix), A + Diagonal(entries); "
            "in the place of delta * eye(n) add delta * Identity(n)."
        )


def is_scalar(x: Any) -> bool:
    """Whether ``x`` is a number, or an array or tensor without axes."""
    if isinstance(x, (float, int)):  # asked first, as above
        return True
    if isinstance(x, (Tensor, np.ndarray)):
        return x.ndim == 0
    return isinstance(x, (Complex, np.generic))


def without_axes(x: Any, rows: int) -> Any:
    """Return a tensor of one number as that, unless an operator has one such row.

    Learnt dampings are often parameters ``[1]``.
    """
    one = isinstance(x, Tensor) and x.ndim > 0 and x.numel() == 1 and rows != 1
    return x.reshape(()) if one else x


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
    if isinstance(x, Tensor):
        check_has_values(x, "The number that scales or damps an operator")
    value = x.item() if isinstance(x, (Tensor, np.ndarray, np.generic)) else x
    if not isinstance(value, Real):
        raise TypeError(f"An operator is scaled by a real number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"An operator is scaled by a finite number, got {value!r}.")
    return float(value)
