"""Arguments as users give them: numbers, counts, yes or no."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivit_linop.modes import as_given


def as_numbers(given: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of what stands for numbers.

    Args:
        given: What the user gave.
        name: What errors call it.
        dtype: That of numbers without one.

    Raises:
        TypeError: If it does not stand for numbers.
    """
    try:
        return as_given(given, dtype)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}: numbers, in a tensor, an array or a list, got {given!r}."
        ) from None


def as_real_numbers(given: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return what :func:`as_numbers` does, of real numbers only."""
    numbers = as_numbers(given, name, dtype)
    if numbers.is_complex():
        raise TypeError(f"{name}: must be real, got {given!r}.")
    return numbers


def as_count(given: Any, name: str, least: int = 1) -> int:
    """Return an integer of at least some value."""
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"{name}: an integer, got {given!r}.")
    if given < least:
        raise ValueError(f"{name}: at least {least}, got {given}.")
    return int(given)


def check_real(given: Any, name: str) -> None:
    """Refuse what is no real number."""
    value = given.item() if isinstance(given, Tensor) and given.ndim == 0 else given
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: a number, got {given!r}.")


def check_flag(given: Any, name: str) -> None:
    """Refuse what is neither True nor False: "no" would count as yes."""
    if not isinstance(given, bool):
        raise TypeError(f"{name}: True or False, got {given!r}.")
